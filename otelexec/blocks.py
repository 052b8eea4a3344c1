"""A lifecycle around a `with` or an `async with` block."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from contextvars import Token
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from opentelemetry import context as otel_context

from otelexec import runtime as _runtime
from otelexec.context import detach
from otelexec.drivers import AsyncDriver, advance, drop, expect, stoppable
from otelexec.errors import ExecutionError
from otelexec.handle import handle_of
from otelexec.running import RunningExecution

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from otelexec.lifecycle import Call, Steps

T = TypeVar("T")


class Block(ABC, Generic[T]):
    """A context manager, also an asynchronous one, that runs its block as the call of a lifecycle."""

    def __init__(self) -> None:
        self._entered: _Entered | None = None

    @abstractmethod
    def _lifecycle(self, runtime: _runtime.Runtime) -> Steps:
        """Give the lifecycle of one block."""

    def _timeout(self) -> float | None:
        """Give the seconds after which an asynchronous block is cancelled; None: no limit."""
        return None

    def __enter__(self) -> T:
        """Run the lifecycle up to the block."""
        entered = self._enter()
        try:
            entered.call = expect(advance(entered.runtime, entered.steps))
        except BaseException:
            self._entered = None
            raise
        entered.attach()
        given: T = _given(entered.call.subject)
        return given

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        """Run the rest of it."""
        entered = self._leave()
        if isinstance(exc, GeneratorExit):
            drop(entered.steps, exc)
        else:
            advance(entered.runtime, entered.steps, exc)

    async def __aenter__(self) -> T:
        """Run the lifecycle up to the block."""
        entered = self._enter()
        driver = entered.driver = AsyncDriver(entered.runtime, entered.steps)
        try:
            entered.call = expect(await driver.advance())
        except BaseException:
            self._entered = None
            raise
        entered.attach()
        subject = entered.call.subject
        if isinstance(subject, RunningExecution):
            entered.stoppable = stoppable(subject)
            entered.stoppable.__enter__()
        timeout = self._timeout()
        if timeout is not None:
            entered.timeout = asyncio.timeout(timeout)
            await entered.timeout.__aenter__()
        given: T = _given(subject)
        return given

    async def __aexit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        """Run the rest of it."""
        entered = self._leave()
        raised = exc
        if entered.timeout is not None:
            try:
                await entered.timeout.__aexit__(exc_type, exc, traceback)
            except TimeoutError as error:
                if isinstance(entered.call.subject, RunningExecution):
                    entered.call.subject.timed_out = True
                raised = error
        if isinstance(raised, GeneratorExit):
            drop(entered.steps, raised)
        elif entered.driver is not None:
            await entered.driver.advance(raised)
        if raised is not None and raised is not exc:
            raise raised

    def _enter(self) -> _Entered:
        if self._entered is not None:
            raise ExecutionError("This block is open already. Make a new one for each `with`.")
        runtime = _runtime.get()
        self._entered = _Entered(runtime, self._lifecycle(runtime))
        return self._entered

    def _leave(self) -> _Entered:
        entered, self._entered = self._entered, None
        if entered is None:
            raise ExecutionError("This block is not open.")
        entered.detach()
        return entered


def _given(subject: Any) -> Any:
    """Give what a block gets of what runs in it: of an execution its handle."""
    return handle_of(subject) if isinstance(subject, RunningExecution) else subject


class _Entered:
    __slots__ = ("call", "driver", "runtime", "steps", "stoppable", "timeout", "token")

    call: Call

    def __init__(self, runtime: _runtime.Runtime, steps: Steps) -> None:
        self.runtime = runtime
        self.steps = steps
        self.driver: AsyncDriver | None = None
        self.stoppable: Any = None
        self.timeout: asyncio.Timeout | None = None
        self.token: Token[Context] | None = None

    def attach(self) -> None:
        self.token = otel_context.attach(self.call.context)

    def detach(self) -> None:
        if self.stoppable is not None:
            self.stoppable.__exit__(None, None, None)
        if self.token is not None:
            detach(self.token)
