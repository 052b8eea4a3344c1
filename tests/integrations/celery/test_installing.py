"""Getting it in and out: the entry point, what is missing, versions that do not fit, and a Celery that is as it was."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import celery.app.amqp
import celery.app.base
import celery.app.task
import celery.app.trace
import celery.backends.base
import celery.beat
import celery.canvas
import celery.concurrency.base
import celery.concurrency.prefork
import celery.worker.consumer.consumer
import celery.worker.request
import celery.worker.strategy
import pytest
from billiard.einfo import ExceptionInfo
from billiard.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded
from billiard.reduction import ForkingPickler
from celery import signals
from otelexec_celery import CeleryInstrumentor, carrier, consume, worker

import otelexec
from otelexec import runtime as _runtime
from otelexec.errors import StoreBusy
from tests.integrations.celery.conftest import Fresh
from tests.integrations.celery.tasks import INSTRUMENT, make_app
from tests.records import Records

RESULT_SECONDS = 20.0
ROOT = Path(__file__).resolve().parents[3]
MODULES = [
    celery.app.amqp,
    celery.app.base,
    celery.app.task,
    celery.app.trace,
    celery.backends.base,
    celery.beat,
    celery.canvas,
    celery.concurrency.base,
    celery.concurrency.prefork,
    celery.worker.consumer.consumer,
    celery.worker.request,
    celery.worker.strategy,
]


def functions_of(module: ModuleType) -> dict[str, Any]:
    """Give every function of a module and of its classes, and every attribute that might hold a wrapped one."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        found[f"{module.__name__}.{name}"] = value
        if isinstance(value, type) and value.__module__.startswith("celery."):
            found |= {f"{value.__module__}.{value.__qualname__}.{key}": held for key, held in vars(value).items() if key[:2] != "__"}
    return found


def state_of_celery() -> tuple[dict[str, int], dict[str, int]]:
    held = {name: id(value) for module in MODULES for name, value in functions_of(module).items()}
    receivers = {name: len(getattr(signals, name).receivers) for name in signals.__all__}
    return held, receivers


def test_uninstrument_leaves_celery_as_it_was() -> None:
    before = state_of_celery()
    for _ in range(2):
        CeleryInstrumentor().instrument()
        during = state_of_celery()
        assert during != before
        CeleryInstrumentor().uninstrument()
        assert state_of_celery() == before
    assert any(isinstance(value, FunctionType) for value in functions_of(celery.app.trace).values())


def test_instrumenting_twice_is_once() -> None:
    before = state_of_celery()
    CeleryInstrumentor().instrument()
    during = state_of_celery()
    CeleryInstrumentor().instrument()
    assert state_of_celery() == during
    CeleryInstrumentor().uninstrument()
    assert state_of_celery() == before


@pytest.mark.parametrize(("task", "state"), [("total", "succeeded"), ("fail", "failed")])
def test_what_began_before_uninstrument_and_runs_after_it_is_closed(instrumented: None, records: Records, task: str, state: str) -> None:
    """In the moment between the acknowledgement and the task, in a pool without processes."""
    app = make_app({"broker_url": "memory://"})
    request = {"id": "t-1", carrier.DELIVERY: "d" * 32}
    assert consume.open_early(app.tasks[task], "t-1", request) is not None
    CeleryInstrumentor().uninstrument()
    consume.call_trace(celery.app.trace.trace_task_ret, task, "t-1", request, ([[1, 2]], {}, {}), None, None, app=app)
    assert records.one().state == state
    app.close()


def test_what_strikes_while_a_message_is_acknowledged_closes_what_was_opened_for_it(instrumented: None, records: Records) -> None:
    """A green pool's limit, while the acknowledgement waits for the broker: the task's tracer never comes."""
    app = make_app({"broker_url": "memory://"})
    message = SimpleNamespace(request_dict={"id": "t-1", carrier.DELIVERY: "d" * 32}, task=app.tasks["total"], id="t-1")

    def acknowledge(*_: Any) -> None:
        raise TimeLimitExceeded(1)

    with pytest.raises(TimeLimitExceeded):
        worker.wrap_on_accepted(acknowledge)(message, os.getpid(), 0.0)
    assert (records.one().state, records.attempt().error_type) == ("failed", "billiard.exceptions.TimeLimitExceeded")
    app.close()


def test_a_limit_that_strikes_while_an_attempt_is_closed_leaves_none_open(
    instrumented: None, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chord's header notes its span before it closes, and may wait for the store meanwhile."""
    app = make_app({"broker_url": "memory://"})
    task = app.tasks["total"]
    run = consume.Run(task, "t-1", {"id": "t-1", "chord": {"options": {"task_id": "body"}}})

    def contribute(*_: Any) -> None:
        raise SoftTimeLimitExceeded

    monkeypatch.setattr(consume.Run, "_contribute", contribute)
    around = run.begin()
    with pytest.raises(SoftTimeLimitExceeded):
        run.succeed(around)
    assert (records.one().state, records.attempt().classification) == ("timed_out", "soft_limit")
    assert not run.is_open
    app.close()


def sent_for(tracer: Any) -> int:
    """Give how many bytes a child's pool would send of what a tracer lets out."""
    try:
        tracer("t-1", (1,), {}, {"id": "t-1"})
    except SystemExit:
        return len(ForkingPickler.dumps(ExceptionInfo()))
    raise AssertionError


def test_what_a_child_sends_of_an_exit_leaves_room_in_the_pipe(instrumented: None, records: Records) -> None:
    """
    Billiard pickles each frame with the positions of its function's every instruction; Celery's own take most of a pipe of 64 KiB.

    A worker that shuts down may read none of it any more, and then waits for ever for a child whose pipe is full.
    """
    app = make_app({"broker_url": "memory://"})
    task = app.tasks["leave"]
    build: Any = celery.app.trace.build_tracer
    own = sent_for(build.__wrapped__(task.name, task, app=app))
    assert sent_for(build(task.name, task, app=app)) - own < 8 * 1024
    assert records.one().state == "failed"
    app.close()


def test_the_links_of_a_chords_body_are_not_asked_for_where_the_store_is_away(
    instrumented: None, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question in the spool has nobody to answer it, and was taken for damage when the store was back."""
    runtime = _runtime.get()

    def commit(*_: Any, **__: Any) -> None:
        raise StoreBusy("locked")

    monkeypatch.setattr(runtime.journal.group, "commit", commit)
    assert consume._links({carrier.JOINS: "body"}, runtime) == ()
    assert not runtime.journal.spool.filled


def test_the_entry_point_is_there() -> None:
    (found,) = [point for point in importlib.metadata.entry_points(group="opentelemetry_instrumentor") if point.name == "otelexec_celery"]
    assert found.load().__name__ == "CeleryInstrumentor"
    assert "celery" in importlib.metadata.metadata("otelexec").get_all("Provides-Extra", [])


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_without_celery_the_error_says_what_to_install() -> None:
    done = python("import sys; sys.modules['celery'] = None; import otelexec_celery; otelexec_celery.CeleryInstrumentor().instrument()")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: ")
    assert "pip install 'otelexec[celery]'" in last


@pytest.mark.parametrize("version", ["5.3.6", "4.4.7", "6.0.0"])
def test_a_celery_that_does_not_fit_is_left_alone_with_an_error(version: str) -> None:
    """The auto-loader skips the check of the base class, so it is made once more inside."""
    done = python(
        "import importlib.metadata as m, logging; logging.basicConfig()\n"
        "version = m.version\n"
        f"m.version = lambda name: {version!r} if name.lower() == 'celery' else version(name)\n"
        "distribution = m.distribution\n"
        "import celery; before = celery.Celery.send_task\n"
        f"celery.__version__ = {version!r}\n"
        "from otelexec_celery import CeleryInstrumentor\n"
        "try:\n    CeleryInstrumentor().instrument(skip_dep_check=True)\n"
        "except Exception as error:\n    print('raised', error)\n"
        "print('unchanged', celery.Celery.send_task is before)\n"
    )
    assert done.returncode == 0, done.stderr
    assert "unchanged True" in done.stdout
    assert version in done.stdout + done.stderr
    assert "5.4" in done.stdout + done.stderr


def test_a_main_process_that_is_instrumented_too_late_speaks_for_no_child(fresh: Fresh) -> None:
    stage = fresh()
    worker = stage.worker("late", environment={INSTRUMENT: None}, app="tests.integrations.celery.late_app")
    with otelexec.correlate(source="test") as correlation:
        result = stage.task("add").delay(1, 2)
    assert result.get(timeout=RESULT_SECONDS) == 3
    assert worker.stop() == 0
    worker.check_log()
    record = stage.record(correlation.execution_id)
    assert record is not None
    assert (record.state, record.attempts) == ("queued", ())
