"""Triton as the gateway sees it: endpoints, sequences, retries."""
