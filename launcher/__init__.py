"""The ``amira`` command: the gateway, the embedded Triton and what runs the two together."""

import os

# Triton is restarted while gRPC's threads run; its fork handlers can't work then, and say so into the log.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
