"""Limits: authentication, quotas, places and priority."""
