"""
How a backend's methods are written once for synchronous and asynchronous callers.

A method is a generator that yields what it wants done and is sent the result; an error of it is thrown in. Two drivers do
it: one in the calling thread, one with `await`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from otelexec.publishing import Message, publish
from otelexec_trigger.clients import AsyncClient, Client

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Http:
    """
    Send a request; the answer is an `httpx.Response` that has been read.

    Attributes:
        method: Its method.
        url: Where it goes.
        headers: Its headers.
        content: Its body; None without one.
        presigned: Whether the URL's query is a signature, which nobody else is to see.
    """

    method: str
    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    content: bytes | None = field(default=None, repr=False)
    presigned: bool = False


@dataclass(frozen=True, slots=True)
class Do:
    """Call a function that may block, and give what it returns."""

    function: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for some seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Enter:
    """Enter a publish block, and give its message."""

    block: publish


@dataclass(frozen=True, slots=True)
class Leave:
    """Leave a publish block, with what was raised in it; None when nothing was."""

    block: publish
    error: BaseException | None = None


Effect = Http | Do | Wait | Enter | Leave
Steps = Generator[Effect, Any, Result]


def published(block: publish, send: Callable[[Message], Steps[Result]]) -> Steps[Result]:
    """
    Send something in a publish block.

    Args:
        block: The block.
        send: Takes its message, and gives the steps of sending it.
    """
    message: Message = yield Enter(block)
    try:
        result = yield from send(message)
    except BaseException as error:
        yield Leave(block, error)
        raise
    yield Leave(block)
    return result


def drive(steps: Steps[Result], client: Client | None) -> Result:
    """
    Take steps in this thread.

    Args:
        steps: What to do.
        client: Sends requests; None where there are none.
    """
    answer: Any = None
    error: BaseException | None = None
    while True:
        try:
            effect = steps.send(answer) if error is None else steps.throw(error)
        except StopIteration as stop:
            result: Result = stop.value
            return result
        answer, error = None, None
        try:
            answer = _perform(effect, client)
        except BaseException as raised:
            error = raised


def _perform(effect: Effect, client: Client | None) -> Any:
    if isinstance(effect, Http):
        return _client(client).request(effect.method, **_arguments(effect))
    if isinstance(effect, Wait):
        return time.sleep(effect.seconds)
    if isinstance(effect, Enter):
        return effect.block.__enter__()
    if isinstance(effect, Leave):
        error = effect.error
        return effect.block.__exit__(None if error is None else type(error), error, None if error is None else error.__traceback__)
    return effect.function()


async def drive_async(steps: Steps[Result], client: AsyncClient | None) -> Result:
    """
    Take steps without blocking the event loop.

    Args:
        steps: What to do.
        client: Sends requests; None where there are none.
    """
    answer: Any = None
    error: BaseException | None = None
    while True:
        try:
            effect = steps.send(answer) if error is None else steps.throw(error)
        except StopIteration as stop:
            result: Result = stop.value
            return result
        answer, error = None, None
        try:
            answer = await _perform_async(effect, client)
        except BaseException as raised:
            error = raised


async def _perform_async(effect: Effect, client: AsyncClient | None) -> Any:
    if isinstance(effect, Http):
        return await _client(client).request(effect.method, **_arguments(effect))
    if isinstance(effect, Wait):
        return await asyncio.sleep(effect.seconds)
    if isinstance(effect, Enter):
        return await effect.block.__aenter__()
    if isinstance(effect, Leave):
        error = effect.error
        return await effect.block.__aexit__(None if error is None else type(error), error, None if error is None else error.__traceback__)
    return await asyncio.to_thread(effect.function)


def _arguments(effect: Http) -> dict[str, Any]:
    url, extensions = httpx.URL(effect.url), {}
    if effect.presigned:
        # httpx logs the URL of every request, and what traces it puts that on the span; what is sent is the target.
        url, extensions = url.copy_with(query=None), {"target": url.raw_path}
    return {"url": url, "headers": dict(effect.headers), "content": effect.content, "extensions": extensions}


def _client(client: Any) -> Any:
    if client is None:
        msg = "a backend that sends requests has a client"
        raise AssertionError(msg)
    return client
