"""A server on loopback with the part of the Hugging Face hub's API that reading files needs."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs


class _Handler(BaseHTTPRequestHandler):
    """The dataset me/data."""

    def __init__(self, files: dict[str, bytes], *arguments: Any) -> None:
        self.files = files
        super().__init__(*arguments)

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, content: bytes | Any, status: int = 200, **headers: str) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def _entry(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if match := re.fullmatch(r"/datasets/me/data/resolve/(?:main|abc)/(.*)", path):
            content = self.files[match[1]]
            if "Range" not in self.headers:
                return self._send(content)
            start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            content_range = f"bytes {start}-{end}/{len(content)}"
            self._send(content[start : end + 1], 206, Content_Range=content_range)
        elif match := re.fullmatch(r"/api/datasets/me/data/tree/(?:main|abc)/?(.*)", path):
            prefix = match[1].rstrip("/") + "/" if match[1] else ""
            below = [name for name in self.files if name.startswith(prefix)]
            folders = {
                prefix + n[len(prefix) :].split("/")[0] for n in below if "/" in n[len(prefix) :]
            }
            files = [n for n in below if "recursive=true" in query or "/" not in n[len(prefix) :]]
            folder = {"type": "directory", "oid": "0" * 40, "size": 0}
            entries = [folder | {"path": name} for name in sorted(folders)]
            self._send(entries + [self._entry(name) for name in files])
        elif path.startswith("/api/datasets/me/data"):
            self._send({"id": "me/data", "sha": "abc", "siblings": [], "tags": []})
        else:
            self._send({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        self._send([self._entry(path) for path in paths if path in self.files])


@contextmanager
def start_hub(files: dict[str, bytes]) -> Iterator[str]:
    """Yields the endpoint of a server of these files, by their names in the dataset."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, files)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
