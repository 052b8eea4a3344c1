"""What the tests' tasks do, and the Celery application that both sides make of them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from celery import Celery
from celery.exceptions import Ignore, Reject
from opentelemetry import baggage, context, trace

import otelexec
from otelexec import runtime
from otelexec.store.records import AttemptRecord
from tests.memory import run_out_of
from tests.records import until

QUEUE = "tests"
SETTINGS = "OTELEXEC_TEST_CELERY"
"""The variable with the settings that a worker makes its application of, as JSON."""
INSTRUMENT = "OTELEXEC_TEST_INSTRUMENT"
"""The variable with the options of `instrument()` as JSON; without it a worker does not instrument itself."""
METRICS = "OTELEXEC_TEST_METRICS"
"""The variable with the folder for a worker's metrics; without it a worker has no meter provider."""
BESIDE = "OTELEXEC_TEST_BESIDE"
"""The variable that names who else instruments a worker, before it does itself: `sentry` or `contrib`."""

BASE: Mapping[str, Any] = {
    "task_default_queue": QUEUE,
    "worker_hijack_root_logger": True,
    "broker_connection_retry_on_startup": True,
    "broker_connection_timeout": 2.0,
    "worker_cancel_long_running_tasks_on_connection_loss": True,
    "result_expires": 600,
    "worker_lost_wait": 1.0,  # seconds in which a dead child's result may still come; 10 by default
}
LATE: Mapping[str, Any] = {"acks_late": True}
LOST_AGAIN: Mapping[str, Any] = {"acks_late": True, "reject_on_worker_lost": True}

_BODIES: list[tuple[str, Callable[..., Any], Mapping[str, Any]]] = []
B = Callable[..., Any]


def make_app(settings: Mapping[str, Any]) -> Celery:
    """
    Make an application with every task.

    Args:
        settings: Celery's own, beside those that all tests share.
    """
    app = Celery("otelexec-tests", set_as_current=False)
    app.conf.update({**BASE, **settings})
    for name, body, options in _BODIES:
        app.task(body, name=name, **options)
    return app


def task(name: str, **options: Any) -> Callable[[B], B]:
    """Add a body to every application that is made."""

    def add(body: B) -> B:
        _BODIES.append((name, body, options))
        return body

    return add


def count(mark: str) -> int:
    """Count a run of a task in a file, and give how many there were before it."""
    with Path(mark).open("a+", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")
        file.flush()
        file.seek(0)
        return len(file.readlines()) - 1


def tell() -> dict[str, Any]:
    """Give what the code of a task sees of itself."""
    run = otelexec.current_execution()
    correlation = run.correlation
    here = trace.get_current_span().get_span_context()
    return {
        "execution_id": run.id,
        "attempt": run.attempt,
        "request_id": correlation and correlation.request_id,
        "source": correlation and correlation.source,
        "trace_id": f"{here.trace_id:032x}",
        "span_id": f"{here.span_id:016x}",
        "baggage": {key: str(value) for key, value in baggage.get_all().items()},
    }


# Plain endings


@task("add")
def add(x: int, y: int) -> int:
    return x + y


@task("add.late", **LATE)
def add_late(x: int, y: int) -> int:
    return x + y


@task("who")
def who() -> dict[str, Any]:
    return tell()


@task("who.request", bind=True)
def who_with_request(self: Any) -> dict[str, Any]:
    """Give what the user's own code finds in the request."""
    return tell() | {
        "headers": dict(self.request.headers or {}),
        "stamps": {key: self.request.stamps.get(key) for key in self.request.stamped_headers or ()},
        "retries": self.request.retries,
    }


@task("total")
def total(numbers: Sequence[int]) -> int:
    return sum(numbers)


@task("fail")
def fail(text: str = "no") -> None:
    raise ValueError(text)


INTERRUPTIONS: Mapping[str, type[BaseException]] = {
    each.__name__: each for each in (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, otelexec.ExecutionCancelled)
}


@task("interrupts")
def interrupts(name: str, mark: str | None = None) -> None:
    """Raise by itself what says that somebody else ended it; with a mark not before somebody wants it cancelled."""
    if mark is not None:
        count(mark)
        until(lambda: otelexec.current_execution().cancel_requested, 30)
    raise INTERRUPTIONS[name]("by itself")


@task("ctrl.c")
def ctrl_c() -> None:
    """Be interrupted from the terminal."""
    signal.raise_signal(signal.SIGINT)


@task("ignore")
def ignore() -> None:
    raise Ignore("not now")


@task("reject", bind=True, **LATE)
def reject(self: Any, mark: str, *, requeue: bool = False) -> str:
    if count(mark) > 0:
        return "taken the second time"
    raise Reject("broken", requeue=requeue)


@task("reject.early", bind=True)
def reject_early(self: Any, mark: str) -> None:
    """Want a message back that is acknowledged already."""
    count(mark)
    raise Reject("too late", requeue=True)


@task("unstorable")
def unstorable() -> object:
    return object()


def _reject(*_: Any) -> None:
    raise Reject("too late")


@task("done.then.rejects", after_return=_reject, **LATE)
def done_then_rejects() -> str:
    return "done"


@task("leave")
def leave(code: int) -> None:
    sys.exit(code)


@task("sleep")
def sleep(seconds: float, mark: str | None = None) -> str:
    if mark is not None:
        count(mark)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.02)
    return "slept"


task("sleep.late", **LATE)(sleep)
task("sleep.again", **LOST_AGAIN)(sleep)


@task("meet", **LATE)
def meet(mark: str) -> str:
    """Go on until it runs a second time."""
    count(mark)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and len(Path(mark).read_text(encoding="utf-8").splitlines()) < 2:
        time.sleep(0.02)
    time.sleep(0.3)
    return "met"


@task("stuck")
def stuck(mark: str) -> None:
    """Heed no soft limit, nor anything else that raises."""
    count(mark)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    time.sleep(60)


task("stuck.late", **LATE)(stuck)


# Death


def attempt_of(execution_id: str | None) -> AttemptRecord:
    """Read what the store has of the running attempt."""
    store = runtime.get().store
    record = None if store is None or execution_id is None else store.execution(execution_id)
    assert record is not None
    return record.attempts[-1]


def die(mark: str, times: int = 1) -> str:
    """Be killed in the first so many runs."""
    if count(mark) < times:
        run = otelexec.current_execution()
        run.progress("before the kill", done=1, total=2)
        until(lambda: "before the kill" in (attempt_of(run.id).progress or ""))  # written within a poll, not at once
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


@task("hog.again", **LOST_AGAIN)
def hog_again(mark: str, procs: str) -> str:
    """Be killed by the kernel in the first run, for want of memory."""
    if not count(mark):
        run_out_of(Path(procs))
    return "alive"


task("die")(die)
task("die.late", **LATE)(die)
task("die.again", **LOST_AGAIN)(die)


@task("killed.early")
def killed_early() -> None:
    """Never get to run: see `worker_app.py`."""


@task("unknown.to.children")
def unknown_to_children() -> None:
    """Never get to run either: see `worker_app.py`."""


task("unknown.to.children.late", **LATE)(unknown_to_children)


@task("brief.again", **LOST_AGAIN)
def brief_again(twentieths: int) -> int:
    """Work for a moment, so that a kill finds somebody at it."""
    with trace.get_tracer("user").start_as_current_span("work"):
        time.sleep(0.05 * twentieths)
    return twentieths


# Retries


@task("flaky", bind=True, max_retries=10)
def flaky(self: Any, times: int, told: Sequence[Mapping[str, Any]] = ()) -> list[Any]:
    """Ask for so many retries; every attempt adds what it saw, and the last one gives it all."""
    seen = [*told, tell()]
    if self.request.retries < times:
        raise self.retry(args=(times, seen), countdown=0, exc=ConnectionError("try again"))
    return seen


class Unpicklable(Exception):
    """Can be pickled, but not unpickled: like those of many libraries, it needs more than its arguments say."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


@task("flaky.unpicklable", bind=True, max_retries=1)
def flaky_unpicklable(self: Any, *, handled: bool) -> None:
    error = Unpicklable("try again", 503)
    if not handled:
        raise self.retry(exc=error, countdown=0)
    try:
        raise error
    except Unpicklable as caught:
        raise self.retry(exc=caught, countdown=0) from caught


@task("flaky.later", bind=True, max_retries=1)
def flaky_later(self: Any) -> str:
    if self.request.retries == 0:
        raise self.retry(countdown=1)
    return "later"


@task("flaky.unsendable", bind=True, max_retries=3)
def flaky_unsendable(self: Any, *_: object, routed: bool) -> None:
    """Ask for a retry whose message can't be sent: before it is routed, or after."""
    options = {"args": (object(),)} if routed else {"queue": 7}
    raise self.retry(countdown=0, **options)


@task("flaky.headers", bind=True, max_retries=5)
def flaky_headers(self: Any, told: Sequence[Any] = ()) -> list[Any]:
    """Give what the user's own header was in each of three attempts."""
    seen = [*told, self.request.headers.get("x-own")]
    if self.request.retries < 2:
        raise self.retry(args=(seen,), countdown=0)
    return seen


@task("flaky.auto", bind=True, autoretry_for=(ConnectionError,), retry_backoff=False, default_retry_delay=0, max_retries=1)
def flaky_auto(self: Any, *, always: bool = False) -> int:
    if always or self.request.retries == 0:
        raise ConnectionError("try again")
    return int(self.request.retries)


@task("changes.baggage", bind=True, max_retries=10)
def changes_baggage(self: Any, told: Sequence[Any] = ()) -> list[Any]:
    """Change the baggage in the first attempt and clear it in the second; what each finds is given at the end."""
    seen = [*told, tell()["baggage"]]
    changed = {
        0: lambda: baggage.set_baggage("tenant", "changed"),
        1: lambda: baggage.remove_baggage("tenant"),
    }.get(self.request.retries)
    if changed is None:
        return seen
    token = context.attach(changed())
    try:
        raise self.retry(args=(seen,), countdown=0)
    finally:
        context.detach(token)


@task("part", bind=True, max_retries=3)
def part(self: Any, number: int, fails: Sequence[int] = (), retries: Sequence[int] = ()) -> int:
    """Be the header of a chord."""
    if number in retries and self.request.retries == 0:
        raise self.retry(countdown=0)
    if number in fails:
        raise ValueError(f"part {number}")
    return number


@task("note")
def note(*arguments: Any) -> str:
    """Be an errback or a callback."""
    return "noted"


@task("note.one")
def note_one(task_id: str) -> str:
    """Be an errback of the old kind: it is published, and gets the id of who failed."""
    return task_id


@task("replaces", bind=True)
def replaces(self: Any) -> None:
    """Leave the work, and the task id, to another task."""
    raise self.replace(self.app.tasks["add"].s(2, 3))


# Executors and messages inside


@otelexec.execution("invoice.run", core=True)
def run_invoice(how: str) -> str:
    run = otelexec.current_execution()
    run.progress("in the core", done=1)
    if how == "core fails":
        raise ValueError("core")
    if how == "core is killed":
        # A child that dies before its main process has read that it took the task up gives billiard reason to run it again.
        until(lambda: "in the core" in (attempt_of(run.id).progress or ""))
        os.kill(os.getpid(), signal.SIGKILL)
    return "paid"


@task("core", bind=True)
def core(self: Any, how: str = "") -> str:
    """Call the job; what the task does then changes nothing about a success."""
    if how == "core fails":
        try:
            run_invoice(how)
        except ValueError:
            return "swallowed"
    paid = run_invoice(how)
    if how == "then raises":
        raise KeyError("after the core")
    if how == "then is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return paid


@otelexec.execution("stock.reserve")
def reserve_stock() -> str | None:
    return otelexec.current_execution().id


@task("nested", bind=True)
def nested(self: Any) -> dict[str, Any]:
    """Call a child execution and publish two tasks."""
    child = reserve_stock()
    first = self.app.tasks["who"].delay()
    second = self.app.tasks["who"].delay()
    return tell() | {"child": child, "published": [first.id, second.id]}


@task("applies", bind=True)
def applies(self: Any) -> dict[str, Any]:
    """Call another task where it is, with the headers of one's own message."""
    called: dict[str, Any] = self.app.tasks["who"].apply(headers=dict(self.request.headers)).result
    return called


@task("heeds")
def heeds(mark: str) -> str:
    """Work until somebody wants it cancelled."""
    count(mark)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if otelexec.current_execution().cancel_requested:
            return "heeded"
        time.sleep(0.02)
    return "nobody asked"


@task("interleaved")
def interleaved(number: int) -> dict[str, Any]:
    """Look around before and after others had their turn."""
    before = tell()
    time.sleep(0.02 + 0.01 * (number % 3))
    return {"number": number, "before": before, "after": tell()}
