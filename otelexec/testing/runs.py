"""Runs of the queue in the store with few arguments, for tests of stores."""

from __future__ import annotations

import time
from dataclasses import replace

from otelexec.store import run_queries
from otelexec.store.base import Store
from otelexec.store.rows import RUNNING
from otelexec.store.runs import DueRun, Enqueued, EnqueueRun, RunKey, RunRecord, RunRow
from otelexec.store.writes import OpenAttempt
from otelexec.testing.rows import execution, opening, write

HOUR = 3_600_000_000_000


def run_row(run_id: str = "r", *, task: str = "task", lane: str | None = None, limit: int = 1, attempts: int = 3, delay: int = 0) -> RunRow:
    """Give a run that is due, if it has no delay."""
    return RunRow(run_id, task, "1", "application/json", "{}", "[]", None, lane, limit, attempts, None, delay)


def enqueue(store: Store, row: RunRow, execution_id: str | None = None, *, keys: tuple[RunKey, ...] = ()) -> Enqueued:
    """Ask for a run of an execution that is named as the run, if nothing else is said; a spare one stands by."""
    own = execution_id or f"e-{row.run_id}"
    executions = tuple((execution(each), "{}") for each in (own, f"spare-{row.run_id}"))
    (answer,) = write(store, EnqueueRun(row, executions, keys))
    assert isinstance(answer, Enqueued)
    return answer


def exclusive(token: str, execution_id: str, *, process_id: str = "p") -> OpenAttempt:
    """Give an open that wants to be the only one."""
    return replace(opening(token, execution_id, process_id=process_id), exclusive=True)


def found(store: Store, run_id: str = "r") -> RunRecord:
    """Give a run that must be there."""
    run = store.read(lambda tx: run_queries.find_run(tx, run_id))
    assert run is not None
    return run


def due(store: Store, *tasks: str, lapsed: bool = False) -> list[DueRun]:
    """Give what may be attempted."""
    return store.read(lambda tx: run_queries.due_runs(tx, tasks or ("task",), limit=100, lapsed_too=lapsed))


def until_lapsed(store: Store) -> DueRun:
    """Give the first of what may be attempted, once there is one whose worker's lease has lapsed."""
    for _ in range(1000):
        found = due(store, lapsed=True)
        if any(each.run.state == RUNNING for each in found):
            return found[0]
        time.sleep(0.002)
    raise AssertionError("its lease did not lapse")
