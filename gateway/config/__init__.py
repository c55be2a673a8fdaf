"""Settings of the gateway and their sources."""
