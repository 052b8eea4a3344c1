"""What the tests' jobs do: imported by whoever enqueues them, and by the horses that run them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from opentelemetry import baggage, trace
from rq import Queue, Retry, get_current_job
from rq.job import Job
from rq.version import VERSION as RQ_VERSION

import otelexec
from otelexec import runtime
from tests.memory import run_out_of
from tests.records import until

LOGGED = "OTELEXEC_TEST_CALLBACKS"
"""The variable with the file in which callbacks say that they were called."""


def count(mark: str) -> int:
    """Note a run in a file, and give how many there were before."""
    path = Path(mark)
    before = len(path.read_text().splitlines()) if path.exists() else 0
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return before


def give(value: Any = None) -> Any:
    """Return what it was given."""
    return value


def look(*_: Any, **__: Any) -> dict[str, Any]:
    """Say who runs here and for whom."""
    run = otelexec.current_execution()
    span = trace.get_current_span().get_span_context()
    return {
        "execution_id": run.id,
        "attempt": run.attempt,
        "span_id": f"{span.span_id:016x}",
        "trace_id": f"{span.trace_id:032x}",
        "baggage": {name: str(value) for name, value in baggage.get_all().items()},
    }


async def look_async() -> dict[str, Any]:
    """Do so in a coroutine."""
    return look()


class Press:
    """Has jobs of every kind that RQ takes from an object or a class."""

    def run(self) -> None:
        """Be a job."""

    @classmethod
    def make(cls) -> None:
        """Be a job."""

    @staticmethod
    def count() -> None:
        """Be a job."""

    def __call__(self) -> None:
        """Be a job."""


class Lenient(Job):
    """A job that makes a value of a failure, after a second try."""

    def perform(self) -> Any:
        """Run the function twice at most."""
        try:
            return super().perform()
        except ValueError:
            try:
                return super().perform()
            except ValueError:
                return "default"


class Strict(Job):
    """A job that fails although its function has returned."""

    def perform(self) -> Any:
        """Run the function, and fail in what comes after it."""
        super().perform()
        raise RuntimeError("teardown")


def replace_meta(mark: str) -> None:
    """Save another meta in place of the one that was there, and run until killed."""
    job: Any = get_current_job()
    job.meta = {"mine": 1}
    job.save_meta()
    count(mark)
    time.sleep(60)


def trace_a_query() -> None:
    """Add a span of the global provider's."""
    with trace.get_tracer("app").start_as_current_span("query"):
        pass


def fail(text: str = "no") -> None:
    """Raise."""
    raise ValueError(text)


def fail_at_first(mark: str, times: int = 1) -> str:
    """Fail in the first so many runs."""
    if count(mark) < times:
        raise ConnectionError("hung up")
    return "done"


INTERRUPTIONS = {each.__name__: each for each in (asyncio.CancelledError, KeyboardInterrupt, otelexec.ExecutionCancelled)}
"""What speaks of a cancellation, by name."""


def interrupt(kind: str, mark: str) -> str:
    """Raise one of them, the first time."""
    if not count(mark):
        raise INTERRUPTIONS[kind]("own")
    return "done"


def leave(code: int) -> None:
    """Exit."""
    sys.exit(code)


def vanish() -> None:
    """End the process as if all were well."""
    os._exit(0)


def ask_again(mark: str, times: int) -> Any:
    """Return a `Retry` in the first so many runs."""
    return Retry(max=times) if count(mark) < times else "done"


def ask_for_ever() -> Any:
    """Return a `Retry` each time."""
    return Retry(max=1)


def sleep(seconds: float, mark: str = "") -> str:
    """Take so long."""
    if mark:
        count(mark)
    time.sleep(seconds)
    return "slept"


def sleep_at_first(seconds: float, mark: str) -> str:
    """Take that long the first time it runs."""
    if not count(mark):
        time.sleep(seconds)
    return "slept"


class Poison:
    """What ends the process that reads it."""

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return sys.exit, (9,)


def heed(mark: str) -> str:
    """Run until it is told of a cancellation."""
    count(mark)
    until(lambda: otelexec.current_execution().cancel_requested, 30)
    raise RuntimeError("told")


def heed_at_first(mark: str) -> str:
    """Run until it is told of a cancellation, and fail; the first time only."""
    return "done" if Path(mark).exists() else heed(mark)


def die(mark: str, times: int = 1) -> str:
    """Be killed in the first so many runs."""
    if count(mark) < times:
        run = otelexec.current_execution()
        run.progress("before the kill", done=1, total=2)
        until(lambda: "before the kill" in _progress_of(run.id))  # written within a poll, not at once
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def _progress_of(execution_id: str | None) -> str:
    store = runtime.get().store
    record = None if store is None or execution_id is None else store.execution(execution_id)
    assert record is not None
    return record.attempts[-1].progress or ""


def hog(mark: str, procs: str) -> str:
    """Be killed by the kernel in the first run, for want of memory."""
    if not count(mark):
        run_out_of(Path(procs))
    return "alive"


def die_with_meta(mark: str, times: int) -> str:
    """Write the job's meta, twice, and be killed in between in the first so many runs."""
    job: Any = get_current_job()
    job.meta["seen"] = count(mark)
    job.save_meta()
    if job.meta["seen"] < times:
        os.kill(os.getpid(), signal.SIGKILL)
    job.meta = {"seen": "last"}
    job.save_meta()
    return "alive"


def forget_meta(mark: str) -> str:
    """Throw the job's meta away, and fail once."""
    job: Any = get_current_job()
    job.meta = {}
    job.save_meta()
    return fail_at_first(mark)


def brief(number: int) -> None:
    """Take a little; what is killed at random."""
    time.sleep(0.01 * number)


@otelexec.execution("invoice.run", core=True)
def invoice(how: str) -> str:
    """Be the job itself."""
    if how == "core fails":
        raise ValueError("core")
    if how == "core is late":
        time.sleep(30)
    return "paid"


def core(how: str = "") -> str:
    """Call the job; what the function around it does then changes nothing about a success."""
    paid = invoice(how)
    if how == "then fails":
        raise RuntimeError("after the core")
    return paid


def enqueue_more(url: str, queue: str) -> str:
    """Enqueue a child."""
    from redis import Redis

    with Redis.from_url(url) as connection:
        return str(Queue(queue, connection=connection).enqueue(look).id)


# Callbacks


def on_success(job: Any, _: Any, __: Any) -> None:
    """Say that it was called."""
    _log("success", job)


def on_failure(job: Any, _: Any, *__: Any) -> None:
    """Say that it was called."""
    _log("failure", job)


def on_stopped(job: Any, _: Any) -> None:
    """Say that it was called."""
    _log("stopped", job)


def on_success_enqueues(job: Any, connection: Any, _: Any) -> None:
    """Enqueue another job."""
    Queue("of-callbacks", connection=connection).enqueue(give)


def on_success_raises(*_: Any) -> None:
    """Raise."""
    raise KeyError("success callback")


def on_failure_raises(*_: Any) -> None:
    """Raise."""
    raise KeyError("failure callback")


def on_stopped_raises(*_: Any) -> None:
    """Raise."""
    raise KeyError("stopped callback")


def _log(kind: str, job: Any) -> None:
    with Path(os.environ[LOGGED]).open("a") as file:
        file.write(f"{kind} {job.id}\n")


VERSION = tuple(int(part) for part in RQ_VERSION.split(".")[:2])
