"""What the reconciler does with work that the store refuses by itself."""

from __future__ import annotations

import json
import logging
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from otelexec.reconcile import Reconciler
from otelexec.store.spool import Spool
from otelexec.store.sqlite import SqliteStore
from otelexec.store.upkeep import ForgetNonces
from otelexec.store.writes import Write
from otelexec.testing import rows
from tests.servers import ROOT

DIES = """
import os, otelexec
with otelexec.execution("dies"):
    with otelexec.execution("child"):
        os._exit(9)
"""


@pytest.mark.timeout(30)
def test_an_attempt_that_the_store_refuses_to_close_does_not_keep_the_reconciler_for_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The refused one is logged and left, everything else of the dead process is closed."""
    path = tmp_path / "store.db"
    assert subprocess.run([sys.executable, "-c", DIES], cwd=ROOT, check=False).returncode == 9
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            """CREATE TRIGGER refuse BEFORE UPDATE ON attempt
               WHEN OLD.execution_id = (SELECT execution_id FROM execution WHERE name = 'dies')
               BEGIN SELECT RAISE(ABORT, 'not this one'); END"""
        )
        connection.commit()
    store = SqliteStore(path)
    reconciled = Reconciler(store, Spool(store.spool_folder, lambda: store.processes()[0])).run_once()
    assert reconciled.attempts == 1
    assert {record.name: record.state for record in store.executions()} == {"dies": "running", "child": "lost"}
    assert "not this one" in caplog.text
    store.close()


def test_a_spooled_record_that_the_store_refuses_is_a_line_of_the_log_although_that_has_disabled_the_logger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its segment is deleted, so the line is the last place left."""
    store = SqliteStore(tmp_path / "store.db")
    spool = Spool(store.spool_folder, rows.process)
    spool.append(rows.closing(rows.opening("t", "\ud800")), durable=True)
    monkeypatch.setattr(logging.getLogger("otelexec.reconcile"), "disabled", True)
    assert Reconciler(store, spool).run_once().ingested == 2
    assert not spool.filled
    (line,) = [record.getMessage() for record in caplog.records]
    assert json.loads(line)["record"]["attempt"]["execution"]["execution_id"] == "\ud800"
    store.close()


def test_the_nonces_of_a_long_time_are_forgotten_in_steps(tmp_path: Path) -> None:
    """Nobody has reconciled for days: one statement for all would keep others waiting, and on a server be given up every time."""
    steps: list[object] = []

    class Noting(SqliteStore):
        def commit(self, writes: Sequence[Write], **more: Any) -> list[object]:
            results = super().commit(writes, **more)
            steps.extend(result for write, result in zip(writes, results, strict=True) if isinstance(write, ForgetNonces))
            return results

    with closing(Noting(tmp_path / "store.db")) as store:
        rows.write(store)
        with closing(sqlite3.connect(store.path)) as connection:
            connection.executemany("INSERT INTO written (nonce) VALUES (?)", [(f"{number:012x}",) for number in range(12_000)])
            connection.commit()
            Reconciler(store, Spool(store.spool_folder, lambda: store.processes()[0])).run_once()
            assert connection.execute("SELECT COUNT(*) FROM written").fetchone() == (0,)
    assert steps == [5_000, 5_000, 2_000, 0]
