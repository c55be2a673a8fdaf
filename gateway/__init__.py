"""The gateway: the REST and WebSocket API in front of Triton."""

import os
from importlib.metadata import version

__version__ = version("amira-asr")

# numpy reads this at its import. The products here are small: more threads would mostly spin while they wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
