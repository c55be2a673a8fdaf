"""Client of Triton: endpoints, sequences and retries."""
