"""
A TCP proxy before a PostgreSQL server, in a process of its own, that cuts, holds and refuses connections as told.

It reads the protocol (https://www.postgresql.org/docs/current/protocol-message-formats.html), so that it can cut a
connection before a request reaches the server, right behind it, or when the server has answered and the client doesn't
know yet: the one moment at which a commit's outcome is unknown.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urlsplit

from tests.postgres_servers import at
from tests.servers import ROOT, stop

ENCRYPTION_REQUESTS: Final = frozenset({80877103, 80877104})  # SSLRequest, GSSENCRequest
CANCEL_REQUEST: Final = 80877102
READY: Final = b"Z"
REQUESTS: Final = frozenset({b"S", b"Q"})
"""Sync and Query: each is answered by one ReadyForQuery."""

MOMENTS: Final = ("before", "behind", "answer")
"""
When a connection is cut: before the request reaches the server, right behind it (the server does the work or not), or
when the server has done it and answered.
"""


class Proxy:
    """
    A running proxy, as a test drives it.

    Args:
        process: It.
        host: The address that it listens on.
        port: The same for its port.
    """

    def __init__(self, process: subprocess.Popen[str], host: str, port: int) -> None:
        self.host = host
        self.port = port
        self._process = process

    def url(self, url: str) -> str:
        """Give a server's URL with the proxy as its place."""
        return at(url, host=self.host, port=self.port)

    def _tell(self, command: str, **arguments: Any) -> dict[str, int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, int] = json.loads(self._process.stdout.readline())
        return answer

    def cut_at(self, number: int, moment: str) -> None:
        """Cut the connection that makes the n-th request from now on, at one of `MOMENTS`; and no other one."""
        self._tell("cut_at", number=number, moment=moment)

    def cut_randomly(self, share: float, seed: int = 0) -> None:
        """Cut at a random moment of this share of all requests; 0 ends it."""
        self._tell("cut_randomly", share=share, seed=seed)

    def cut_all(self) -> None:
        """Cut every connection now; new ones are taken."""
        self._tell("cut_all")

    def hold(self) -> None:
        """Take what comes, pass nothing on and answer nothing: as a network that swallows every packet."""
        self._tell("hold")

    def release(self) -> None:
        """Pass on again, what was held back too."""
        self._tell("release")

    def refuse(self) -> None:
        """Cut every connection and listen no more."""
        self._tell("refuse")

    def listen(self) -> None:
        """Listen again."""
        self._tell("listen")

    def lead_to(self, url: str) -> None:
        """Take new connections to another server."""
        parts = urlsplit(url)
        self._tell("lead_to", host=parts.hostname, port=parts.port)

    def counts(self) -> dict[str, int]:
        """Give how many `requests` were seen since the last `cut_at`, how many connections were `cut`, and how many were `taken`."""
        return self._tell("counts")


@contextmanager
def running_proxy(url: str, *, host: str = "127.0.0.1") -> Iterator[Proxy]:
    """
    Run a proxy until the block ends.

    Args:
        url: The server's.
        host: The address to listen on.
    """
    parts = urlsplit(url)
    command = [sys.executable, "-m", "tests.postgres_proxy", host, str(parts.hostname), str(parts.port)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        yield Proxy(process, host, int(process.stdout.readline()))
    finally:
        stop(process)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class _Connection:
    """One client, its server, and what has passed between them."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client = client
        self.server = server
        self.asked = self.answered = 0
        self.swallow: int | None = None
        self.unbuffered = False

    def cut(self) -> None:
        for writer in (self.client, self.server):
            with contextlib.suppress(OSError):
                # A reset, so that nothing still in a buffer is delivered.
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class _Relay:
    """
    The proxy itself.

    Args:
        host: The address to listen on.
        target: Host and port of the server.
    """

    def __init__(self, host: str, target: tuple[str, int]) -> None:
        self.host = host
        self.port = 0
        self.target = target
        self.connections: set[_Connection] = set()
        self.open = asyncio.Event()
        self.open.set()
        self.requests = self.cuts = self.taken = 0
        self.cut_number = 0
        self.cut_moment = ""
        self.share = 0.0
        self.random = random.Random(0)
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self) -> None:
        if self._listener is None:
            self._listener = await asyncio.start_server(self._accept, self.host, self.port, backlog=500)
            self.port = self._listener.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self.cut_all()

    def cut_all(self) -> None:
        for connection in list(self.connections):
            self._cut(connection)

    def _cut(self, connection: _Connection) -> None:
        self.cuts += 1
        connection.cut()

    async def _accept(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self.taken += 1
        try:
            startup = await self._startup(client_reader, client)
            await self.open.wait()
            server_reader, server = await asyncio.open_connection(*self.target, limit=1 << 26)
        except (OSError, asyncio.IncompleteReadError):
            client.transport.abort()
            return
        server.write(startup)
        connection = _Connection(client, server)
        self.connections.add(connection)
        try:
            await asyncio.wait(
                [
                    asyncio.ensure_future(self._requests(connection, client_reader)),
                    asyncio.ensure_future(self._answers(connection, server_reader)),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
            await asyncio.sleep(0)
        finally:
            self.connections.discard(connection)
            for writer in (client, server):
                writer.close()

    async def _startup(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> bytes:
        while True:
            head = await reader.readexactly(8)
            length, code = struct.unpack("!II", head)
            if code not in ENCRYPTION_REQUESTS:
                return head + await reader.readexactly(length - 8)
            await self.open.wait()
            client.write(b"N")

    async def _requests(self, connection: _Connection, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                kind, message = await _message(reader)
                await self.open.wait()
                if kind == b"H":
                    connection.unbuffered = True
                if kind not in REQUESTS:
                    connection.server.write(message)
                    continue
                moment = self._moment()
                connection.asked += 1
                if moment == "before":
                    self._cut(connection)
                    return
                connection.server.write(message)
                if moment == "answer":
                    connection.swallow = connection.asked
                await connection.server.drain()
                if moment == "behind":
                    connection.server.close()  # what is on its way to the server arrives
                    connection.client.transport.abort()
                    self.cuts += 1
                    return

    def _moment(self) -> str:
        self.requests += 1
        if self.requests == self.cut_number:
            return self.cut_moment
        if self.share and self.random.random() < self.share:
            return self.random.choice(MOMENTS)
        return ""

    async def _answers(self, connection: _Connection, reader: asyncio.StreamReader) -> None:
        held = bytearray()
        started = False
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                kind, message = await _message(reader)
                await self.open.wait()
                held += message
                if kind == READY and started:
                    connection.answered += 1
                    if connection.answered == connection.swallow:
                        self._cut(connection)
                        return
                if kind == READY or connection.asked <= connection.answered or connection.unbuffered or kind in (b"G", b"W", b"H"):
                    connection.client.write(bytes(held))
                    held.clear()
                    await connection.client.drain()
                if kind == READY:
                    started = True
                    connection.unbuffered = False


async def _message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readexactly(5)
    (length,) = struct.unpack("!I", head[1:])
    return head[:1], head + await reader.readexactly(length - 4)


async def _serve(host: str, target: tuple[str, int]) -> None:
    relay = _Relay(host, target)
    await relay.listen()
    sys.stdout.write(f"{relay.port}\n")
    sys.stdout.flush()
    while line := await asyncio.to_thread(sys.stdin.readline):
        match json.loads(line):
            case {"command": "cut_at", "number": number, "moment": moment}:
                relay.requests, relay.cut_number, relay.cut_moment = 0, number, moment
            case {"command": "cut_randomly", "share": share, "seed": seed}:
                relay.share, relay.random = share, random.Random(seed)
            case {"command": "cut_all"}:
                relay.cut_all()
            case {"command": "hold"}:
                relay.open.clear()
            case {"command": "release"}:
                relay.open.set()
            case {"command": "refuse"}:
                relay.refuse()
            case {"command": "listen"}:
                await relay.listen()
            case {"command": "lead_to", "host": to, "port": port}:
                relay.target = (to, port)
            case _:
                pass
        sys.stdout.write(json.dumps({"requests": relay.requests, "cut": relay.cuts, "taken": relay.taken}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], (sys.argv[2], int(sys.argv[3]))))
