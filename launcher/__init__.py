"""The ``amira`` command: the gateway, the embedded Triton and what runs the two together."""
