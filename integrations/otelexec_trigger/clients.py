"""
The HTTP clients that a backend's requests go through: one for each process.

A connection belongs to the process that opened it: two processes that read from one get each other's answers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar
from weakref import WeakSet

from otelexec.errors import SettingsError
from otelexec_trigger.runs import BackendError

if TYPE_CHECKING:
    import httpx

Made = TypeVar("Made")

_inherited: list[object] = []
"""What the parent has open. To drop it would close its sockets, with a warning for each."""


class NotSent(BackendError):
    """This backend was closed, and nothing was sent. Make another one."""


class Client(Protocol):
    """What is needed of an `httpx.Client`."""

    def request(self, method: str, url: str, *, headers: Mapping[str, str], content: bytes | None) -> httpx.Response:
        """Send a request, and give the answer once it was read."""
        ...

    def close(self) -> None:
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

    def request(self, method: str, url: str, *, headers: Mapping[str, str], content: bytes | None) -> httpx.Response:
        """
        Send a request.

        Raises:
            NotSent: The client was closed.
        """
        return self._own().request(method, url, headers=headers, content=content)

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


_all: WeakSet[ClientOfProcess] = WeakSet()


def _after_fork_in_child() -> None:
    for client in list(_all):
        client.forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
