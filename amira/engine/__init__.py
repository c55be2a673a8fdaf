"""The embedded Triton: its wheel, its process, and the service around it."""

import os

# Triton is restarted while gRPC's threads run. gRPC's fork handlers can't work then and log an error each time.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
