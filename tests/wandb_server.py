"""A server on the loopback interface that answers wandb as its own does, or misbehaves."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Mode = Literal["ok", "slow", "stall", "401", "500"]


class WandbServer(ThreadingHTTPServer):
    """Keeps the path and body of every request; `mode` may change while it runs."""

    daemon_threads = True

    def __init__(self, mode: Mode) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode = mode
        self.requests: list[tuple[str, bytes]] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def history(self) -> list[dict[str, Any]]:
        """The records that were uploaded to the run's history."""
        lines: list[dict[str, Any]] = []
        for path, body in self.requests:
            if path.endswith("file_stream"):
                part = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
                lines += [json.loads(line) for line in part.get("content", [])]
        return lines


class Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.path, body))
        mode = self.server.mode
        if mode == "stall":
            self.server.closing.wait()
            return
        if mode == "slow":
            time.sleep(0.5)
        code = 200 if mode in ("ok", "slow") else int(mode)
        answer = {"errors": [{"message": "no"}]} if code != 200 else {}
        if code == 200 and self.path.endswith("graphql"):
            answer = {"data": graphql(json.loads(body))}
        text = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_PUT = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing."""


def graphql(request: dict[str, Any]) -> dict[str, Any]:
    """What wandb's server answers for a run that it does not know yet; no file is wanted."""
    query, variables = request["query"], request.get("variables") or {}
    if "upsertBucket" in query:
        project = {"id": "cA==", "name": "p", "entity": {"id": "ZQ==", "name": "e"}}
        bucket = {
            "id": "aWQ=",
            "name": variables.get("name"),
            "displayName": "run",
            "config": "{}",
            "historyLineCount": 0,
            "project": project,
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}
    if "createRunFiles" in query:
        return {"createRunFiles": {"runID": "aWQ=", "uploadHeaders": [], "files": []}}
    if "viewer" in query:
        return {"viewer": {"id": "dg==", "entity": "e", "flags": "{}", "teams": {"edges": []}}}
    return {"model": {"bucket": None}}


@contextmanager
def wandb_server(mode: Mode) -> Iterator[WandbServer]:
    """Yields a running server."""
    server = WandbServer(mode)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
