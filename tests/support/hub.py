"""A stand-in for the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from amira.ports import LOOPBACK

COMMIT = "0" * 40


@dataclass
class Faults:
    """What goes wrong with the bodies of downloads.

    Attributes:
        cut: names of files whose connection breaks after half of the body, once each.
        changed: names of files whose body differs from the published one, once each.
        ranges: receives the Range of each request that has one.
    """

    cut: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    ranges: list[str] = field(default_factory=list)


@contextmanager
def hub_with(
    repositories: Mapping[str, Path], requests: list[str] | None = None, faults: Faults | None = None
) -> Iterator[str]:
    """Serve directories as repositories ``owner/name``; yield the URL.

    Args:
        repositories: the directories, by repository.
        requests: receives the path of each request.
        faults: what goes wrong.
    """
    chosen = faults or Faults()
    contents = {name: {path.name: path.read_bytes() for path in root.iterdir()} for name, root in repositories.items()}

    def respond(name: str, files: Mapping[str, bytes], path: str) -> bytes | None:
        if path.startswith(f"/api/models/{name}/tree/"):
            listed = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}  # noqa: S324
                for file, data in files.items()
            ]
            return json.dumps(listed).encode()
        if path == f"/api/models/{name}" or path.startswith(f"/api/models/{name}/"):
            siblings = [
                {
                    "rfilename": file,
                    "size": len(data),
                    "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130},
                }
                for file, data in files.items()
            ]
            return json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
        return files.get(path.removeprefix(f"/{name}/resolve/{COMMIT}/"))

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if requests is not None:
                requests.append(path)
            body = next((body for name, files in contents.items() if (body := respond(name, files, path)) is not None), None)
            if body is None:
                self.send_error(404)
            else:
                _answer(self, body, chosen)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    with ThreadingHTTPServer((LOOPBACK, 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://{LOOPBACK}:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def _answer(handler: BaseHTTPRequestHandler, body: bytes, faults: Faults) -> None:
    """Send a body, from where the request wants it, and with the faults that it has."""
    name = handler.path.partition("?")[0].rpartition("/")[2]
    first = 0
    if given := handler.headers.get("Range"):
        faults.ranges.append(given)
        first = int(given.removeprefix("bytes=").partition("-")[0])
    handler.send_response(206 if first else 200)
    handler.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')  # noqa: S324
    handler.send_header("X-Repo-Commit", COMMIT)
    handler.send_header("Content-Length", str(len(body) - first))
    if first:
        handler.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
    handler.end_headers()
    if handler.command != "GET":
        return
    if name in faults.changed:
        faults.changed.discard(name)
        body = bytes(len(body))
    if name in faults.cut:
        faults.cut.discard(name)
        body = body[: len(body) // 2]
        handler.close_connection = True
    handler.wfile.write(body[first:])
