"""A server on the loopback interface that answers wandb as its own does, or misbehaves."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Mode = Literal["ok", "slow", "stall", "401", "500"]


@dataclass
class ServedSweep:
    """A sweep whose trials go to the agents that ask, in order; then agents are asked to exit.

    Attributes:
        file: text of the sweep file.
        trials: overrides by run id.
    """

    file: str
    trials: dict[str, Mapping[str, Any]]
    agents: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, query: str, variables: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer to a request of an agent; None for any other."""
        with self.lock:
            if "SweepWithRuns" in query:
                sweep = {"name": variables["sweep"], "config": self.file, "runs": {"edges": []}}
                return {"project": {"sweep": sweep}}
            if "createAgent" in query:
                self.agents.append(variables["host"])
                return {"createAgent": {"agent": {"id": f"agent{len(self.agents)}"}}}
            if "agentHeartbeat" in query:
                is_busy = json.loads(variables["runState"]) != {}
                commands = [] if is_busy else [self._next()]
                agent = {"id": variables["id"]}
                return {"agentHeartbeat": {"agent": agent, "commands": json.dumps(commands)}}
        return None

    def _next(self) -> dict[str, Any]:
        if not self.trials:
            return {"type": "exit"}
        run_id = next(iter(self.trials))
        arguments = {key: {"value": value} for key, value in self.trials.pop(run_id).items()}
        return {"type": "run", "run_id": run_id, "program": "launch.trial", "args": arguments}


class WandbServer(ThreadingHTTPServer):
    """Keeps the path and body of every request; `mode` may change while it runs."""

    daemon_threads = True

    def __init__(self, mode: Mode, sweep: ServedSweep | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode = mode
        self.sweep = sweep
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
            answer = {"data": self.answer(json.loads(body))}
        text = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_PUT = do_POST

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL request."""
        sweep = self.server.sweep
        of_agent = sweep and sweep.answer(request["query"], request.get("variables") or {})
        return of_agent or graphql(request)

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
def wandb_server(mode: Mode, sweep: ServedSweep | None = None) -> Iterator[WandbServer]:
    """Yields a running server."""
    server = WandbServer(mode, sweep)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
