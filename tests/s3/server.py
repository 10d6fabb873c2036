"""`python -m tests.s3.server`: moto's S3 behind a layer of faults; prints its port.

POST /faults has a list of faults in JSON. Each applies to requests of `method` whose path, with
its query, fits the pattern `path`, `times` times after the first `skip` of them:

    status     answers with this number
    slow       waits for this many seconds first
    cut        closes the connection after this many bytes of the request's body
    torn       closes the connection after this many bytes of the answer's body
    frozen     answers what was answered to the same request when the fault was set: a list of
               objects that lags behind
    ignore_conditions    drops If-None-Match

GET /requests has the requests so far, and /faults how often each fault applied.
"""

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

Environ = dict[str, Any]
Respond = Callable[..., Any]


class Faults:
    """A WSGI application around moto's."""

    def __init__(self, application: Callable[[Environ, Respond], Iterable[bytes]]) -> None:
        self.application = application
        self.faults: list[dict[str, Any]] = []
        self.applied: list[int] = []
        self.answers: dict[str, tuple[str, list[tuple[str, str]], bytes]] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def __call__(self, environ: Environ, respond: Respond) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path in ("/faults", "/requests"):
            return self._control(environ, respond, path)
        target = f"{path}?{environ['QUERY_STRING']}"
        request = f"{environ['REQUEST_METHOD']} {target}"
        with self.lock:
            self.requests.append(request)
            fault = self._fault_of(environ["REQUEST_METHOD"], target)
        if fault is None:
            return self.application(environ, respond)
        if "slow" in fault:
            time.sleep(fault["slow"])
        if "cut" in fault:
            environ["wsgi.input"].read(fault["cut"])
            connection = environ["werkzeug.socket"]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        if "status" in fault:
            respond(f"{fault['status']} Fault", [("Content-Type", "application/xml")])
            return [b"<Error><Code>%d</Code><Message>a fault</Message></Error>" % fault["status"]]
        if "ignore_conditions" in fault:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if "torn" in fault:
            return self._torn(environ, respond, fault["torn"])
        if "frozen" in fault:
            return self._frozen(environ, respond, request)
        return self.application(environ, respond)

    def _control(self, environ: Environ, respond: Respond, path: str) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "POST":
            size = int(environ["CONTENT_LENGTH"])
            with self.lock:
                self.faults = json.loads(environ["wsgi.input"].read(size))
                self.applied = [0] * len(self.faults)
                self.answers.clear()
        respond("200 OK", [("Content-Type", "application/json")])
        with self.lock:
            content = self.requests if path == "/requests" else self.applied
            return [json.dumps(content).encode()]

    def _fault_of(self, method: str, target: str) -> dict[str, Any] | None:
        for number, fault in enumerate(self.faults):
            if fault.get("method", method) != method or not re.search(fault["path"], target):
                continue
            if fault.get("skip", 0) > 0:
                fault["skip"] -= 1
                continue
            if self.applied[number] >= fault.get("times", 1):
                continue
            self.applied[number] += 1
            return fault
        return None

    def _torn(self, environ: Environ, respond: Respond, size: int) -> Iterable[bytes]:
        yield b"".join(self.application(environ, respond))[:size]
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)

    def _frozen(self, environ: Environ, respond: Respond, request: str) -> Iterable[bytes]:
        if request not in self.answers:
            head: list[Any] = []
            body = b"".join(self.application(environ, lambda *given: head.extend(given)))
            self.answers[request] = (head[0], head[1], body)
        status, headers, body = self.answers[request]
        respond(status, headers)
        return [body]


def main() -> None:
    application = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
