"""`request_cancel`: in any process on the same store, without a connection to the broker."""

from __future__ import annotations

import importlib.util
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from celery.exceptions import TaskRevokedError

import otelexec
from tests.integrations.celery.conftest import Fresh
from tests.integrations.celery.stage import Stage
from tests.integrations.stage import each_open
from tests.records import until

TERMINATED_SECONDS = 20.0
RESULT_SECONDS = 20.0


def test_a_task_that_is_cancelled_in_the_queue_does_not_run(common: Stage) -> None:
    mark = common.mark()
    with otelexec.correlate(source="test") as correlation:
        result = common.task("sleep").apply_async((0, mark), countdown=1)
    assert otelexec.request_cancel(correlation.execution_id) == "queued"
    seen = common.ended(result.id, "cancelled")
    assert (seen.record.state, seen.attempt.classification) == ("cancelled", None)
    assert common.runs(mark) == 0


def test_a_running_task_sees_it(common: Stage) -> None:
    mark = common.mark()
    with otelexec.correlate(source="test") as correlation:
        result = common.task("heeds").delay(mark)
    common.wait_for_run(mark)
    assert otelexec.request_cancel(correlation.execution_id) == "running"
    assert result.get(timeout=RESULT_SECONDS) == "heeded"
    common.ended(result.id)


def test_a_running_task_that_ends_itself_by_it_is_cancelled(common: Stage) -> None:
    mark = common.mark()
    with otelexec.correlate(source="test") as correlation:
        result = common.task("interrupts").delay("CancelledError", mark)
    common.wait_for_run(mark)
    assert otelexec.request_cancel(correlation.execution_id) == "running"
    seen = common.ended(result.id, "cancelled")
    assert (seen.record.state, seen.attempt.classification) == ("cancelled", None)


@pytest.mark.parametrize("task", ["sleep", "sleep.late", "sleep.again"])
def test_with_terminate_the_worker_stops_it_as_revoke_does(common: Stage, task: str) -> None:
    mark = common.mark()
    with otelexec.correlate(source="test") as correlation:
        result = common.task(task).delay(60, mark)
    common.wait_for_run(mark)
    asked = common.command("cancel", correlation.execution_id, "--terminate")
    assert asked.returncode == 0, asked.stderr
    seen = common.ended(result.id, "cancelled", seconds=TERMINATED_SECONDS)
    assert (seen.record.state, seen.attempt.classification) == ("cancelled", None)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=RESULT_SECONDS)
    assert common.runs(mark) == 1


def test_a_task_that_is_terminated_while_the_store_is_away_is_cancelled(fresh: Fresh) -> None:
    """The main process knows that somebody asked, and the child how it ended: both stand in the spool."""
    stage = fresh()
    worker = stage.worker(
        "away", "prefork", 2, environment={"OTELEXEC_OPEN_TIMEOUT_SECONDS": "0.2", "OTELEXEC_FINALIZE_TIMEOUT_SECONDS": "0.5"}
    )
    mark, after = stage.mark(), stage.mark()
    result = stage.task("sleep").delay(60, mark)
    child = stage.wait_for_run(mark)
    until(lambda: len(list(each_open(stage))) == 1)
    with closing(sqlite3.connect(stage.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        result.revoke(terminate=True)
        until(lambda: not psutil.pid_exists(child))
        stage.task("sleep").delay(0, after)
        stage.wait_for_run(after)  # so that the main process has written more by then
    seen = stage.ended(result.id, "cancelled")
    assert (seen.record.state, seen.attempt.classification, seen.attempt.finalized_by) == ("cancelled", None, "spool")
    assert worker.stop() == 0


def test_a_task_that_has_succeeded_stays_so(common: Stage) -> None:
    with otelexec.correlate(source="test") as correlation:
        result = common.task("add").delay(1, 2)
    result.get(timeout=RESULT_SECONDS)
    assert otelexec.request_cancel(correlation.execution_id, terminate=True) == "succeeded"
    assert common.ended(result.id, "succeeded").record.state == "succeeded"


def test_between_two_attempts_the_next_one_is_not_run(common: Stage) -> None:
    with otelexec.correlate(source="test") as correlation:
        result = common.task("flaky.later").delay()
    common.ended(result.id, "failed")
    assert otelexec.request_cancel(correlation.execution_id) == "retrying"
    seen = common.ended(result.id, "failed", "cancelled")
    assert seen.record.state == "cancelled"


def test_on_threads_which_nobody_can_stop_a_running_task_sees_it(fresh: Fresh) -> None:
    stage = fresh()
    worker = stage.worker("threads", "threads", 2)
    mark = stage.mark()
    with otelexec.correlate(source="test") as correlation:
        result = stage.task("heeds").delay(mark)
    assert stage.wait_for_run(mark) == worker.pid != os.getpid()
    otelexec.request_cancel(correlation.execution_id, terminate=True)
    assert result.get(timeout=RESULT_SECONDS) == "heeded"
    assert worker.stop() == 0
    worker.check_log()
    stage.check_agreement()


@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_a_greenlet_is_stopped(fresh: Fresh, pool: str) -> None:
    found = importlib.util.find_spec(f"celery.concurrency.{pool}")
    assert found is not None
    assert found.origin is not None
    if "def terminate_job" not in Path(found.origin).read_text(encoding="utf-8"):  # importing it would patch this process
        pytest.skip(f"this Celery's {pool} pool can't stop a task")
    stage = fresh()
    worker = stage.worker(pool, pool, 4)
    mark = stage.mark()
    with otelexec.correlate(source="test") as correlation:
        result = stage.task("sleep").delay(60, mark)
    stage.wait_for_run(mark)
    otelexec.request_cancel(correlation.execution_id, terminate=True)
    seen = stage.ended(result.id, "cancelled", seconds=TERMINATED_SECONDS)
    assert (seen.record.state, seen.attempt.classification) == ("cancelled", None)
    assert worker.stop() == 0
    worker.check_log()
    stage.check_agreement()
