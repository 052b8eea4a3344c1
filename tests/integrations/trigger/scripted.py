"""A server that answers as a test says."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CUT = 0
"""A status that is none: the connection is cut after the request was read."""


@dataclass
class Served:
    """
    What a scripted server got, and what it answers next.

    Attributes:
        url: Where it is.
        answers: What comes next; the last one is given for ever.
        requests: Method, path, headers by lowercase name and body of each request.
        ports: For each request the client's port, which tells one connection from another.
        ended: Released once for each connection that has ended.
        before: Called before each answer.
    """

    url: str = ""
    answers: list[tuple[int, dict[str, str], Any]] = field(default_factory=list)
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    ended: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    before: Callable[[], object] = lambda: None

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        self.answers.append((status, {name.replace("_", "-"): value for name, value in headers.items()}, body))


@contextmanager
def scripted() -> Iterator[Served]:
    """Run a server on loopback."""
    state = Served()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            state.requests.append((self.command, self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            state.ports.append(self.client_address[1])
            state.before()
            status, headers, answer = state.answers.pop(0) if len(state.answers) > 1 else state.answers[0]
            if status == CUT:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response_only(status)
            known = {"date": self.date_time_string(), "content-type": "application/json", "content-length": str(len(data))}
            for name, value in {**known, **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def finish(self) -> None:
            super().finish()
            state.ended.release()

        def do_GET(self) -> None:
            self._serve()

        def do_POST(self) -> None:
            self._serve()

        def do_PUT(self) -> None:
            self._serve()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield state
        server.shutdown()
        thread.join()
