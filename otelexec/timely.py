"""
HTTP answers that end in time, however slowly they trickle in.

The timeout of requests and urllib3 is one for each piece that arrives: an endpoint that sends a byte a second holds a
caller for as long as it likes, beyond the relay's claim on the rows and a process's time to exit.
"""

from __future__ import annotations

import http.client
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from otelexec.clock import monotonic

if TYPE_CHECKING:
    import socket

_here: Final = threading.local()


@contextmanager
def answered_by(deadline: float) -> Iterator[None]:
    """
    Have the answers that this thread waits for in a `with` block end at a time.

    Args:
        deadline: That time, by `clock.monotonic()`.
    """
    _here.deadline = deadline
    try:
        yield
    finally:
        del _here.deadline


class _Timely(io.RawIOBase):
    """What arrives on a socket until the deadline of the thread that reads it."""

    def __init__(self, inner: io.RawIOBase, connection: socket.socket) -> None:
        super().__init__()
        self._inner = inner
        self._connection = connection

    def readable(self) -> bool:
        """Give True."""
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        """Read what has arrived; raises TimeoutError once it is too late."""
        deadline = getattr(_here, "deadline", None)
        if deadline is not None:
            left = deadline - monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            self._connection.settimeout(left)
        return self._inner.readinto(buffer)

    def close(self) -> None:
        """Close the stream; the socket is the connection's."""
        self._inner.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Timely(self.fp.detach(), sock))


class _Connection(HTTPConnection):
    response_class = _Response


class _SecureConnection(HTTPSConnection):
    response_class = _Response


class _Pool(HTTPConnectionPool):
    ConnectionCls: Any = _Connection  # urllib3 declares it as a protocol that its own classes do not match


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls: Any = _SecureConnection


class TimelyAdapter(HTTPAdapter):
    """An adapter for `requests` whose answers end in time; see `answered_by`."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Make the pools of direct connections."""
        super().init_poolmanager(*args, **kwargs)
        _use_ours(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        """Give the pools of connections through a proxy."""
        pools = super().proxy_manager_for(*args, **kwargs)
        if pools.pool_classes_by_scheme["http"] is HTTPConnectionPool:  # not one of SOCKS, which connects in its own way
            _use_ours(pools)
        return pools


def _use_ours(pools: Any) -> None:
    pools.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}
