"""Unit tests of when what a dead process left ended."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from otelexec import metrics
from otelexec.decoded import decode
from otelexec.reconcile import Reconciler
from otelexec.store.rows import LOST
from otelexec.store.spool import Spool
from otelexec.store.sqlite import SqliteStore
from tests.servers import ROOT

if TYPE_CHECKING:
    from pathlib import Path

DIES = """
import os
import otelexec
from opentelemetry import trace

otelexec.configure(store="sqlite:///{path}", relay=False, reconcile=False)
with otelexec.execution("parent"), trace.get_tracer("user").start_as_current_span("call"):
    with otelexec.execution("child"):
        otelexec.current_execution().progress("half")
        os._exit(9)
"""


def test_all_that_one_dead_process_left_ended_at_its_last_sign_of_life(tmp_path: Path) -> None:
    """A sign of life of a child is one of what is around it, which can't have ended before its child began."""
    path = tmp_path / "store.db"
    assert subprocess.run([sys.executable, "-c", DIES.format(path=path)], cwd=ROOT, check=False).returncode == 9
    with closing(SqliteStore(path)) as store:
        assert Reconciler(store, Spool(store.spool_folder, lambda: store.processes()[0])).run_once().spans == 1
        spans = {span.name: span for record in store.executions() for request in store.held_requests(record) for span in decode(request)}
        attempts = {record.name: record.attempts[0] for record in store.executions()}
    assert spans.keys() == {"parent", "call", "child"}
    (ended,) = {span.end_unix_ns for span in spans.values()} | {attempt.ended_unix_ns for attempt in attempts.values()}
    assert ended is not None
    assert ended > spans["child"].start_unix_ns


def test_what_was_closed_when_the_process_ends_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody finds it open any more who could count it."""
    path = tmp_path / "store.db"
    assert subprocess.run([sys.executable, "-c", DIES.format(path=path)], cwd=ROOT, check=False).returncode == 9
    counted: list[str] = []
    monkeypatch.setattr(metrics, "reconciled", lambda name, *_: counted.append(name))

    def meanwhile() -> None:
        if any(record.state == LOST for record in store.executions()):
            raise TimeoutError("the process ends")

    with closing(SqliteStore(path)) as store:
        with pytest.raises(TimeoutError):
            Reconciler(store, Spool(store.spool_folder, lambda: store.processes()[0]), meanwhile=meanwhile).run_once()
        assert {record.name for record in store.executions() if record.state == LOST} == {*counted} == {"parent", "child"}
