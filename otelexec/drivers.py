"""
The sync and the async driver of the lifecycle.

A driver performs the effects that the lifecycle yields. Both attach the context in the caller's own context; in the
async driver only the commit leaves the loop. Neither lets anything but the user's own exception, or one that a signal
handler raised, come out.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sys
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any

from opentelemetry import context as otel_context

from otelexec import loop_commit
from otelexec.context import detach
from otelexec.effects import Block, Commit, Effect, perform, perform_without_waiting
from otelexec.lifecycle import Call, Steps

if TYPE_CHECKING:
    from otelexec.running import RunningExecution
    from otelexec.runtime import Runtime


def advance(runtime: Runtime, steps: Steps, answer: Any = None, *, how: Callable[[Runtime, Effect], Any] = perform) -> Call | None:
    """
    Go on until the lifecycle wants its call made, or ends.

    Args:
        runtime: The runtime of this process.
        steps: The lifecycle.
        answer: What it is waiting for.
        how: Performs an effect.

    Returns:
        The call; None at the end.
    """
    thrown: BaseException | None = None
    while True:
        try:
            if thrown is None:
                effect = steps.send(answer)
            else:
                error, thrown = thrown, None
                effect = steps.throw(error)
            if isinstance(effect, Call):
                return effect
            answer = how(runtime, effect)
        except StopIteration:
            return None
        except BaseException as error:
            if inspect.getgeneratorstate(steps) == inspect.GEN_CLOSED:  # it has ended, and this is what it raises
                raise
            thrown = error  # a signal handler's: the lifecycle holds it until the commit is through


def drop(steps: Steps, error: GeneratorExit) -> None:
    """Finish a lifecycle whose code was dropped, wherever it stands: it then performs its effects itself."""
    with contextlib.suppress(GeneratorExit, StopIteration):
        steps.throw(error)


def expect(call: Call | None) -> Call:
    """Give the call that a lifecycle wants made; it raises where it wants none."""
    if call is None:
        msg = "the lifecycle ended without a call"
        raise RuntimeError(msg)
    return call


def call_sync(runtime: Runtime, steps: Steps, function: Callable[[], Any]) -> Any:
    """Run a function under the lifecycle; it can't be stopped, so a timeout is a deadline for it to look at."""
    _, value = _call(runtime, steps, function)
    advance(runtime, steps)
    return value


def call_either(runtime: Runtime, steps: Steps, function: Callable[[], Any], timeout_seconds: float | None) -> Any:
    """
    Run a function under the lifecycle, which goes on over a coroutine or a generator that the function gives.

    A wrapper around a coroutine function may give the coroutine, or run it to the end (`asyncio.run`); and neither it nor
    a compiled function need look like what it is.

    Args:
        runtime: The runtime of this process.
        steps: The lifecycle.
        function: Gives the value, a coroutine or a generator.
        timeout_seconds: As for `call_async`; for anything else than coroutines as for `call_sync`.
    """
    call, value = _call(runtime, steps, function)
    kind = type(value)
    if hasattr(kind, "throw") or hasattr(kind, "athrow"):  # of all values it asks only few for more
        if inspect.isawaitable(value):
            return _await(AsyncDriver(runtime, steps), call, steps, lambda: value, timeout_seconds)
        if isinstance(value, Generator):
            return iterate_sync(runtime, steps, lambda: value, call=call)
        if isinstance(value, AsyncGenerator):
            return iterate_async(runtime, steps, lambda: value, timeout_seconds, call=call)
    advance(runtime, steps)
    return value


def _call(runtime: Runtime, steps: Steps, function: Callable[[], Any]) -> tuple[Call, Any]:
    before = otel_context.get_current()
    call = expect(advance(runtime, steps))
    # By value and not by token: a signal handler may raise before the token is there, and the next job must not run in
    # this one's context.
    try:
        otel_context.attach(call.context)
        value = function()
        otel_context.attach(before)
    except BaseException as error:
        otel_context.attach(before)
        advance(runtime, steps, error)
        raise
    return call, value


def iterate_sync(
    runtime: Runtime,
    steps: Steps,
    function: Callable[[], Generator[Any, Any, Any]],
    _timeout_seconds: float | None = None,
    *,
    call: Call | None = None,
) -> Generator[Any, Any, Any]:
    """
    Run a generator under the lifecycle; its execution is current only while its body runs. A timeout as for `call_sync`.

    Args:
        runtime: The runtime of this process.
        steps: The lifecycle.
        function: Gives the generator.
        call: The lifecycle's call, where that has come so far already.
    """
    call = call or expect(advance(runtime, steps))
    context = call.context
    resume: Callable[[], Any] | None = None
    closing = False
    try:
        body = function()
        while True:
            token = otel_context.attach(context)
            try:
                item = next(body) if resume is None else resume()
            finally:
                context = otel_context.get_current()
                detach(token)
                resume = None
            try:
                sent = yield item
                if sent is not None:
                    resume = _bind(body.send, sent)
            except GeneratorExit as error:
                closing = True
                token = otel_context.attach(context)
                try:
                    body.throw(error)
                finally:
                    detach(token)
                raise RuntimeError("generator ignored GeneratorExit") from None
            except BaseException as error:  # thrown in by the consumer, for the body
                resume = _bind(body.throw, error)
    except StopIteration as stop:
        if closing:
            drop(steps, GeneratorExit())
        else:
            advance(runtime, steps)
        return stop.value
    except GeneratorExit as error:
        drop(steps, error)
        raise
    except BaseException as error:
        # Whether the consumer or the garbage collector closes it can't be told.
        advance(runtime, steps, error, how=perform_without_waiting if closing else perform)
        raise


def _bind(method: Callable[[Any], Any], argument: Any) -> Callable[[], Any]:
    return lambda: method(argument)


class AsyncDriver:
    """Performs effects for one coroutine."""

    def __init__(self, runtime: Runtime, steps: Steps) -> None:
        self._runtime = runtime
        self._steps = steps
        self._held: asyncio.CancelledError | None = None

    async def advance(self, answer: Any = None) -> Call | None:
        """Go on until the lifecycle wants its call made, or ends; a cancellation waits until the commit is through."""
        thrown: BaseException | None = None
        while True:
            try:
                if thrown is None:
                    effect = self._steps.send(answer)
                else:
                    error, thrown = thrown, None
                    effect = self._steps.throw(error)
                if isinstance(effect, Call):
                    if self._held is None:
                        return effect
                    # Cancelled while the attempt was being opened: the function is not called.
                    thrown, self._held = self._held, None
                    continue
                answer = await self._perform(effect)
            except StopIteration:
                if self._held is not None:
                    raise self._held from None
                return None
            except GeneratorExit as error:
                drop(self._steps, error)
                raise
            except BaseException as error:
                if inspect.getgeneratorstate(self._steps) == inspect.GEN_CLOSED:
                    raise
                thrown = error

    async def _perform(self, effect: Effect) -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any]
        if isinstance(effect, Commit):
            return await loop_commit.of(loop).commit(self._runtime, effect, self._hold)
        if isinstance(effect, Block):
            future = self._runtime.journal.in_thread(loop, effect.function)
        else:
            future = loop.create_task(asyncio.sleep(effect.seconds))
        while not future.done():
            try:
                await asyncio.shield(future)
            except asyncio.CancelledError as error:
                self._hold(error)
        return future.result()

    def _hold(self, error: asyncio.CancelledError) -> None:
        # Also a second one and a third: the effect is under way, and its answer is wanted.
        self._held = error


async def call_async(runtime: Runtime, steps: Steps, function: Callable[[], Awaitable[Any]], timeout_seconds: float | None) -> Any:
    """
    Run a coroutine function under the lifecycle.

    Args:
        runtime: The runtime of this process.
        steps: The lifecycle.
        function: Gives the awaitable.
        timeout_seconds: Seconds after which it is cancelled and TimeoutError raised; None: no limit.
    """
    driver = AsyncDriver(runtime, steps)
    return await _await(driver, expect(await driver.advance()), steps, function, timeout_seconds)


async def _await(
    driver: AsyncDriver, call: Call, steps: Steps, function: Callable[[], Awaitable[Any]], timeout_seconds: float | None
) -> Any:
    token = otel_context.attach(call.context)
    try:
        try:
            with stoppable(call.subject):
                if timeout_seconds is None:
                    value = await function()
                else:
                    value = await _limited(call.subject, function, asyncio.get_running_loop().time() + timeout_seconds)
        finally:
            detach(token)
    except GeneratorExit as error:
        drop(steps, error)
        raise
    except BaseException as error:
        await driver.advance(error)
        raise
    await driver.advance()
    return value


async def _limited(execution: RunningExecution, function: Callable[[], Awaitable[Any]], deadline: float) -> Any:
    raised: BaseException | None = None
    try:
        async with asyncio.timeout_at(deadline):
            try:
                return await function()
            except BaseException as error:
                raised = error
                raise
    except TimeoutError as error:
        # The body's own TimeoutError is a failure like any other.
        execution.timed_out = error is not raised
        if execution.timed_out:
            error.args = (f"{execution.name} was stopped after its timeout of {execution.options.timeout:g} s",)
        raise


@contextlib.contextmanager
def stoppable(execution: RunningExecution) -> Generator[None]:
    """Let `request_cancel(terminate=True)` cancel the task that runs here."""
    task = asyncio.current_task()
    if task is None:
        yield
        return
    # The runtime holds the execution, and must not keep alive by it a task that nobody waits for any more.
    reference = weakref.ref(task)

    def cancel() -> None:
        running = reference()
        if running is not None and execution.stop is stop:  # not when the code has ended meanwhile: then the task does something else
            running.cancel()

    def stop() -> None:
        running = reference()
        if running is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                running.get_loop().call_soon_threadsafe(cancel)

    execution.stop = stop
    execution.stop_if_asked()
    try:
        yield
    finally:
        execution.stop = None


def _begin(body: AsyncGenerator[Any, Any]) -> Awaitable[Any]:
    """Ask a body for its first item unknown to its loop, which at its end would close it beside the generator that closes it."""
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, None)
    try:
        return body.__anext__()
    finally:
        sys.set_asyncgen_hooks(*hooks)


async def iterate_async(
    runtime: Runtime,
    steps: Steps,
    function: Callable[[], AsyncGenerator[Any, Any]],
    timeout_seconds: float | None,
    *,
    call: Call | None = None,
) -> AsyncGenerator[Any, Any]:
    """
    Run an async generator under the lifecycle; its execution is current only while its body runs.

    Args:
        runtime: The runtime of this process.
        steps: The lifecycle.
        function: Gives the generator.
        timeout_seconds: Seconds after which the body is cancelled, counted from its start; None: no limit.
        call: As for `iterate_sync`.
    """
    driver = AsyncDriver(runtime, steps)
    call = call or expect(await driver.advance())
    context = call.context
    deadline = None if timeout_seconds is None else asyncio.get_running_loop().time() + timeout_seconds
    closing = False
    try:
        body = function()
        resume: Callable[[], Awaitable[Any]] = partial(_begin, body)
        while True:
            token = otel_context.attach(context)
            try:
                with stoppable(call.subject):
                    item = await (resume() if deadline is None else _limited(call.subject, resume, deadline))
            finally:
                context = otel_context.get_current()
                detach(token)
                resume = body.__anext__
            try:
                sent = yield item
                if sent is not None:
                    resume = _bind(body.asend, sent)
            except GeneratorExit as error:
                closing = True
                token = otel_context.attach(context)
                try:
                    await body.athrow(error)  # a cleanup: neither limited nor stopped
                finally:
                    detach(token)
                raise RuntimeError("async generator ignored GeneratorExit") from None
            except BaseException as error:  # thrown in by the consumer, for the body
                resume = _bind(body.athrow, error)
    except StopAsyncIteration:
        if closing:
            drop(steps, GeneratorExit())
        else:
            await driver.advance()
    except GeneratorExit as error:
        drop(steps, error)
        raise
    except BaseException as error:
        await driver.advance(error)
        raise
