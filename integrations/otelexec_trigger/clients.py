"""
The HTTP clients that a backend's requests go through: one for each process, and with `await` one for each event loop of it.

A connection belongs to the process and the event loop that opened it: two processes that read from one get each other's answers, and
a loop that waits for another one's socket waits for ever.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

import httpx

from otelexec.errors import SettingsError
from otelexec_trigger.runs import BackendError

Made = TypeVar("Made")
Kind = TypeVar("Kind", httpx.Client, httpx.AsyncClient)

_inherited: list[object] = []
"""What the parent has open. To drop it would close its sockets, with a warning for each."""


class NotSent(BackendError):
    """This backend was closed, and nothing was sent. Make another one."""


class Client(Protocol):
    """What is needed of an `httpx.Client`."""

    def request(
        self, method: str, url: httpx.URL, *, headers: Mapping[str, str], content: bytes | None, extensions: dict[str, Any]
    ) -> httpx.Response:
        """Send a request, and give the answer once it was read."""
        ...

    def close(self) -> None:
        """Close connections."""
        ...


class AsyncClient(Protocol):
    """What is needed of an `httpx.AsyncClient`."""

    async def request(
        self, method: str, url: httpx.URL, *, headers: Mapping[str, str], content: bytes | None, extensions: dict[str, Any]
    ) -> httpx.Response:
        """Send a request, and give the answer once it was read."""
        ...

    async def aclose(self) -> None:
        """Close connections."""
        ...


class ClientOfProcess:
    """
    A client that a forked child has one of its own of; see `httpx.Client`.

    Args:
        make: Makes the client of a process. The first one is made at once, so that what is wrong with it is said here.
    """

    def __init__(self, make: Callable[[], httpx.Client]) -> None:
        self._make = make
        self._client: httpx.Client | None = make()
        self._closed = False
        self._lock = threading.RLock()  # a signal handler may send something, too
        _all.add(self)

    def request(
        self, method: str, url: httpx.URL, *, headers: Mapping[str, str], content: bytes | None, extensions: dict[str, Any]
    ) -> httpx.Response:
        """
        Send a request.

        Raises:
            NotSent: The client was closed.
        """
        return self._own().request(method, url, headers=headers, content=content, extensions=extensions)

    def close(self) -> None:
        """Close the connections of this process; nothing is sent any more."""
        with self._lock:
            self._closed = True
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def forget(self) -> None:
        """Leave the client to the parent; for a forked child."""
        self._lock = threading.RLock()
        client, self._client = self._client, None
        if client is not None:
            _inherited.append(client)

    def _own(self) -> httpx.Client:
        with self._lock:
            if self._closed:
                raise NotSent
            if self._client is None:
                self._client = made(self._make)
            return self._client


class ClientOfLoop:
    """
    A client that each event loop has one of its own of; see `httpx.AsyncClient`.

    Args:
        make: Makes the client of a loop. One is made at once, so that what is wrong with it is said here.
    """

    def __init__(self, make: Callable[[], httpx.AsyncClient]) -> None:
        make()
        self._make = make
        self._held: dict[asyncio.AbstractEventLoop, _Held] = {}
        self._closed = False
        self._lock = threading.RLock()
        _all.add(self)

    async def request(
        self, method: str, url: httpx.URL, *, headers: Mapping[str, str], content: bytes | None, extensions: dict[str, Any]
    ) -> httpx.Response:
        """
        Send a request.

        Raises:
            NotSent: The client was closed.
        """
        client = await self._own()
        return await client.request(method, url, headers=headers, content=content, extensions=extensions)

    async def aclose(self) -> None:
        """Close the connections of this process; nothing is sent any more."""
        with self._lock:
            self._closed = True
            held, self._held = self._held, {}
        own = held.pop(asyncio.get_running_loop(), None)
        for loop, each in held.items():
            if loop.is_running():
                asyncio.run_coroutine_threadsafe(each.end.aclose(), loop)
        if own is not None:
            await own.end.aclose()

    def forget(self) -> None:
        """Leave the clients to the parent; for a forked child."""
        self._lock = threading.RLock()
        held, self._held = self._held, {}
        _inherited.append(held)

    async def _own(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._closed:
                raise NotSent
            held = self._held.get(loop)
            if held is not None:
                return held.client
            for ended in [each for each in self._held if each.is_closed()]:
                del self._held[ended]
            client = made(self._make)
            held = self._held[loop] = _Held(client, self._until_the_end(loop, client))
        await anext(held.end)
        return client

    async def _until_the_end(self, loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient) -> AsyncGenerator[None]:
        """Close a client when its loop ends: `asyncio.run` closes the asynchronous generators that have not come to their own end."""
        try:
            yield
        finally:
            with self._lock:
                self._held.pop(loop, None)
            await client.aclose()


@dataclass(frozen=True, slots=True)
class _Held:
    client: httpx.AsyncClient
    end: AsyncGenerator[None]


def made(make: Callable[[], Made]) -> Made:
    """
    Make a client in the middle of a call.

    Raises:
        NotSent: The environment has changed since the first one was made, and there can be none.
    """
    try:
        return make()
    except SettingsError as error:
        raise NotSent(str(error)) from error


def client_maker(kind: type[Kind], timeout_seconds: float) -> Callable[[], Kind]:
    """
    Give what makes clients as the environment has proxies and certificates; the latter are read once.

    Args:
        kind: Which clients.
        timeout_seconds: How long one waits for a connection, and for each part of an answer.

    Raises:
        SettingsError: The certificates can't be read; and, from what this gives, the proxies can't be used.
    """
    try:
        certificates = httpx.create_ssl_context()
    except OSError as error:
        given = [f"{name}={os.environ[name]!r}" for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
        raise SettingsError(f"{', '.join(given) or 'certifi'}: has no certificates that can be read: {error}") from None

    def make() -> Kind:
        proxies = ", ".join(sorted(name for name in os.environ if name.lower().endswith("_proxy"))) or "the system's proxies"
        try:
            return kind(timeout=timeout_seconds, verify=certificates)
        except ImportError:
            raise SettingsError(f"{proxies}: a SOCKS proxy needs another package: pip install 'httpx[socks]'") from None
        except (ValueError, httpx.InvalidURL):
            # Without what httpx says of it, which may hold the proxy's password.
            raise SettingsError(f"{proxies}: a proxy is http://, https:// or socks5:// and a host") from None

    return make


_all: WeakSet[ClientOfProcess | ClientOfLoop] = WeakSet()


def _after_fork_in_child() -> None:
    for client in list(_all):
        client.forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
