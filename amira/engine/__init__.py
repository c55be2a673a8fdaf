"""The embedded Triton: wheel, process, and service."""

import os

# Triton is restarted while gRPC threads run. gRPC's fork handlers cannot work then, and log an error each time.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
