"""
What a worker does until it is killed: every kind of execution, in a process of its own.

A scenario writes into a `Ledger` what it saw with its own eyes, one line per write, so that a test can hold the store
to it after the kill.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import AsyncIterator, Callable, Generator
from pathlib import Path
from typing import Any, Final

from opentelemetry import trace

import otelexec
from tests import stores

OUTSIDE: Final = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
"""A caller's span that no test writes: the one parent that may be missing."""

tracer = trace.get_tracer("app")


class Ledger:
    """
    What the process knows to have happened; it survives the process.

    Args:
        descriptor: The file, open for appending.
        name: Goes in front of every execution id, so that many processes can share a store.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        self._descriptor = descriptor

    @classmethod
    def at(cls, path: Path, name: str) -> Ledger:
        """Open the ledger in a file, which several processes may share."""
        return cls(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), name)

    def part(self, suffix: str) -> Ledger:
        """Give a ledger in the same file with names of its own."""
        return Ledger(self._descriptor, self.name + suffix)

    def note(self, event: str, execution_id: str, attempt: int, state: str = "") -> None:
        """Write one line with one system call; attempt 0: its number was not known, since the store was away."""
        line = json.dumps({"event": event, "id": execution_id, "attempt": attempt, "state": state, "process": self.name})
        os.write(self._descriptor, line.encode() + b"\n")

    def called(self) -> otelexec.Execution:
        """Note that the code of the current execution runs; give its handle."""
        run = otelexec.current_execution()
        assert isinstance(run, otelexec.Execution)
        self.note("called", run.id, run._execution.number or 0)
        return run

    def returned(self, run: otelexec.Execution | None, state: str) -> None:
        """Note that a call came back to its caller, who from here on relies on it."""
        assert run is not None
        self.note("returned", run.id, run._execution.number or 0, state)

    def correlated(self, suffix: str) -> contextlib.AbstractContextManager[Any]:
        """Open a scope with an execution id of this process."""
        return otelexec.correlate(source="workflow", workflow_id="w", execution_id=f"{self.name}-{suffix}", request_id=self.name)


class Kept:
    """Runs a body as an execution and keeps its handle for the ledger."""

    def __init__(self, ledger: Ledger, name: str, **options: Any) -> None:
        self.ledger = ledger
        self.run: otelexec.Execution | None = None
        self._name = name
        self._options = options

    def __call__(self, body: Callable[[otelexec.Execution], Any], state: str = "succeeded") -> None:
        """Call it; `state` is what it must be recorded as once this has returned."""

        @otelexec.execution(self._name, **self._options)
        def executor() -> None:
            self.run = self.ledger.called()
            body(self.run)

        with contextlib.suppress(ValueError, asyncio.CancelledError):
            executor()
        self.ledger.returned(self.run, state)


def _work(run: otelexec.Execution) -> None:
    with tracer.start_as_current_span("outer step"), tracer.start_as_current_span("inner step"):
        run.progress("half", done=1, total=2)
    with tracer.start_as_current_span("last step"):
        run.set_output({"answer": 42})


def _fail(_: otelexec.Execution) -> None:
    with tracer.start_as_current_span("failing step"):
        raise ValueError("no")


def block(ledger: Ledger) -> None:
    """One execution with a child span: what a sweep over stores that are being made has time for."""
    with otelexec.execution("block") as run, tracer.start_as_current_span("step"):
        ledger.called()
    ledger.returned(run, "succeeded")


def plain(ledger: Ledger) -> None:
    """Functions: one that succeeds with children, one that fails, one under a carrier from outside, a `with` block, a generator."""
    with ledger.correlated("a"):
        Kept(ledger, "job")(_work)
    Kept(ledger, "job")(_fail, "failed")
    with otelexec.extract_headers({"traceparent": OUTSIDE}):
        Kept(ledger, "job", timeout=30)(_work)
    with otelexec.execution("block") as block:
        ledger.called()
        _work(block)
    ledger.returned(block, "succeeded")

    @otelexec.execution("items")
    def items() -> Generator[otelexec.Execution, None, None]:
        with tracer.start_as_current_span("item"):
            yield ledger.called()

    (run,) = items()
    ledger.returned(run, "succeeded")
    dropped = items()
    run = next(dropped)
    dropped.close()
    ledger.returned(run, "cancelled")


def nested(ledger: Ledger) -> None:
    """A core in an outer executor that fails, another that succeeds, a child after it; an outer that raises after its core."""

    def outer(run: otelexec.Execution) -> None:
        with tracer.start_as_current_span("before the core"):
            Kept(ledger, "core", core=True)(_fail, "failed")
            Kept(ledger, "core", core=True)(_work)
            Kept(ledger, "core", core=True)(_work)

    with ledger.correlated("a"):
        outer_call = otelexec.execution("task")(lambda: outer(ledger.called()))
        outer_call()

    @otelexec.execution("task")
    def raising() -> None:
        ledger.called()
        Kept(ledger, "core", core=True)(_work)
        raise ValueError("after the core")

    with contextlib.suppress(ValueError):
        raising()


def children(ledger: Ledger) -> None:
    """Executions inside executions, each under spans that are still open when the child opens."""

    def parent(_: otelexec.Execution) -> None:
        with tracer.start_as_current_span("a"), tracer.start_as_current_span("b"):
            Kept(ledger, "child")(middle)
            Kept(ledger, "child")(_fail, "failed")

    def middle(_: otelexec.Execution) -> None:
        with tracer.start_as_current_span("c"):
            Kept(ledger, "grandchild")(_work)

    with ledger.correlated("a"):
        Kept(ledger, "parent")(parent)
    with tracer.start_as_current_span("no execution around"), ledger.correlated("b"):
        Kept(ledger, "parent")(parent)


def messages(ledger: Ledger) -> None:
    """Publish and inject, run what was sent, be refused, turn work away."""
    sent: list[dict[str, Any]] = []

    def sender(_: otelexec.Execution) -> None:
        with tracer.start_as_current_span("sending"):
            with otelexec.publish("job", destination="queue", system="test") as message:
                sent.append(otelexec.inject({"n": 1}))
            ledger.note("published", message.id, 0)
            with contextlib.suppress(ValueError), otelexec.publish("job", destination="queue"):
                raise ValueError("the queue is full")
            sent.append(otelexec.inject({"n": 2}))

    with ledger.correlated("a"):
        Kept(ledger, "sender")(sender)
    with tracer.start_as_current_span("a request"), ledger.correlated("b"):
        sent.append(otelexec.inject({"n": 3}))
    for payload in sent:
        with otelexec.extract(payload):
            Kept(ledger, "job")(_work)
    with ledger.correlated("c"):
        ledger.note("returned", otelexec.reject("rate_limited"), 1, "rejected")


def attempts(ledger: Ledger) -> None:
    """Pause and resume, retry with another message, redelivery after success, cancellation before and in the middle."""

    def pause(run: otelexec.Execution) -> None:
        run.pause("approval", snapshot={"at": run.attempt})

    for body, state in ((pause, "paused"), (pause, "paused"), (_work, "succeeded")):
        with ledger.correlated("a"):
            Kept(ledger, "job")(body, state)
    again: list[dict[str, Any]] = []

    def retrying(run: otelexec.Execution) -> None:
        again.append(otelexec.inject({}, retry=True))
        _fail(run)

    with ledger.correlated("b"):
        Kept(ledger, "job")(retrying, "failed")
    for _ in range(2):  # the second one is a redelivery after success
        with otelexec.extract(again[0]):
            Kept(ledger, "job")(_work)
    otelexec.request_cancel(f"{ledger.name}-c")
    with ledger.correlated("c"), contextlib.suppress(otelexec.ExecutionCancelled):
        otelexec.execution("job")(ledger.called)()
    ledger.note("returned", f"{ledger.name}-c", 1, "cancelled")

    def cancelled(run: otelexec.Execution) -> None:
        otelexec.request_cancel(run.id)
        raise asyncio.CancelledError

    with ledger.correlated("d"):
        Kept(ledger, "job")(cancelled, "cancelled")


def tasks(ledger: Ledger) -> None:
    """Coroutines: several at once, a core in an outer one, a block, a generator."""

    @otelexec.execution("job")
    async def job() -> otelexec.Execution:
        run = ledger.called()
        with tracer.start_as_current_span("waiting"):
            await asyncio.sleep(0)
        return run

    @otelexec.execution("items")
    async def items() -> AsyncIterator[otelexec.Execution]:
        yield ledger.called()

    @otelexec.execution("task")
    async def outer() -> otelexec.Execution:
        run = ledger.called()
        with tracer.start_as_current_span("around"):
            await core()
        return run

    @otelexec.execution("core", core=True)
    async def core() -> None:
        run = ledger.called()
        await job()
        run.progress("done")

    async def noted() -> None:
        ledger.returned(await job(), "succeeded")

    async def everything() -> None:
        await asyncio.gather(noted(), noted(), noted())
        ledger.returned(await outer(), "succeeded")
        async with otelexec.execution("block") as block:
            ledger.called()
        ledger.returned(block, "succeeded")
        kept = [run async for run in items()]
        ledger.returned(kept.pop(), "succeeded")

    with ledger.correlated("a"):
        asyncio.run(everything())


def interrupted(ledger: Ledger) -> None:
    """Coroutines that are stopped: by their timeout, and by whoever cancels their task."""
    kept: list[otelexec.Execution] = []

    @otelexec.execution("slow", timeout=0.01)
    async def slow() -> None:
        kept.append(ledger.called())
        with tracer.start_as_current_span("waiting"):
            await asyncio.sleep(30)

    @otelexec.execution("stuck")
    async def stuck(running: asyncio.Event) -> None:
        kept.append(ledger.called())
        running.set()
        await asyncio.sleep(30)

    async def everything() -> None:
        with contextlib.suppress(TimeoutError):
            await slow()
        ledger.returned(kept.pop(), "timed_out")
        running = asyncio.Event()
        task = asyncio.create_task(stuck(running))
        await running.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        ledger.returned(kept.pop(), "cancelled")

    with ledger.correlated("a"):
        asyncio.run(everything())


def threads(ledger: Ledger) -> None:
    """Threads that share commits, each with executions in executions."""

    def parent(_: otelexec.Execution) -> None:
        with tracer.start_as_current_span("around"):
            Kept(ledger, "child")(_work)

    def worker(number: int) -> None:
        with ledger.correlated(f"t{number}"):
            Kept(ledger, "parent")(parent)
            Kept(ledger, "job")(_fail, "failed")

    workers = [threading.Thread(target=worker, args=(number,)) for number in range(3)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()


def spooled(ledger: Ledger) -> None:
    """The store is locked by somebody else from the middle of one execution on to the end of the next one."""
    otelexec.configure(open_timeout_seconds=0.02, finalize_timeout_seconds=0.02)
    other = contextlib.ExitStack()

    def locking(run: otelexec.Execution) -> None:
        with tracer.start_as_current_span("locking"):
            other.enter_context(stores.locked(os.environ["OTELEXEC_STORE"]))
        _work(run)

    with ledger.correlated("a"):
        Kept(ledger, "job")(locking)
    nested(ledger.part("n"))

    def unlocking(run: otelexec.Execution) -> None:
        with tracer.start_as_current_span("unlocking"):
            other.close()
            Kept(ledger, "child")(_work)

    Kept(ledger, "job")(unlocking)


SCENARIOS: Final[dict[str, Callable[[Ledger], None]]] = {
    function.__name__: function for function in (block, plain, nested, children, messages, attempts, tasks, interrupted, threads, spooled)
}
