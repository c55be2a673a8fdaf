"""The engines do not depend on a protocol."""

from __future__ import annotations

import subprocess
import sys

import pytest

FACES = ("starlette", "fastapi", "uvicorn", "websockets", "asgi_correlation_id", "gateway.api", "gateway.app")


@pytest.mark.parametrize("module", ["gateway.live.sessions", "gateway.recordings.transcribe"])
def test_engine_imports_without_any_protocol(module: str) -> None:
    code = f"""if True:
        import sys
        sys.modules.update(dict.fromkeys({FACES!r}))
        import {module}
        assert not [name for name in sys.modules if name.partition(".")[0] in {FACES!r} and sys.modules[name]]
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_faces_need_what_is_blocked() -> None:
    """Otherwise the test above would prove nothing."""
    code = f"import sys; sys.modules.update(dict.fromkeys({FACES[:4]!r})); import gateway.api.native_websocket"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 1
