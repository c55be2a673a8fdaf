"""A stand-in for the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from amira.ports import LOOPBACK

COMMIT = "0" * 40


@contextmanager
def hub_with(repositories: Mapping[str, Path], requests: list[str] | None = None) -> Iterator[str]:
    """Serve directories as repositories ``owner/name``; yield the URL.

    Args:
        repositories: the directories, by repository.
        requests: receives the path of each request.
    """
    contents = {name: {path.name: path.read_bytes() for path in root.iterdir()} for name, root in repositories.items()}

    def respond(name: str, files: Mapping[str, bytes], path: str) -> bytes | None:
        if path.startswith(f"/api/models/{name}/tree/"):
            listed = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}  # noqa: S324
                for file, data in files.items()
            ]
            return json.dumps(listed).encode()
        if path == f"/api/models/{name}" or path.startswith(f"/api/models/{name}/"):
            siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
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
                self._answer(body)

        do_HEAD = do_GET  # noqa: N815

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')  # noqa: S324
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

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
