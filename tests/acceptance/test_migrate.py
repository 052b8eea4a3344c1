"""`otelexec migrate`: a SQLite store moves to PostgreSQL whole, once, whenever it is killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing as closing_file
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from otelexec.store.base import Store
from otelexec.store.postgres import PostgresStore
from otelexec.store.records import ExecutionRecord
from otelexec.store.rows import FAILED, Cancellation
from otelexec.store.sqlite import SqliteStore
from otelexec.store.upkeep import SettleOutbox
from otelexec.store.writes import AddSpans, Heartbeat, RecordQueued, RequestCancel
from otelexec.testing.rows import claim, closed, closing, execution, opened, opening, outbox, process, span, write
from tests.postgres_servers import PASSWORD, Server
from tests.servers import ROOT

SECONDS = 60.0


@pytest.fixture
def database(postgres: Server) -> Iterator[str]:
    url = postgres.new_database()
    yield url
    postgres.drop_database(url)


def migrate(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "otelexec", "migrate", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def migrated(*arguments: str) -> tuple[int, str, str]:
    running = migrate(*arguments)
    out, error = running.communicate(timeout=SECONDS)
    return running.returncode, out, error


def fill(store: Store, executions: int) -> None:
    """Put in some of everything that a store can hold."""
    write(store, Heartbeat(process("p"), ended=True))
    for number in range(executions):
        row = opening(f"t{number}", f"e{number:06d}")
        opened(store, row)
        if number % 7:
            closed(store, closing(row, FAILED if number % 3 else "succeeded"))
    rows = claim(store, "relay", max_rows=4)
    write(store, SettleOutbox("relay", delivered=[rows[0].id], parked=[(rows[1].id, "no"), (rows[2].id, "no")], failed=[rows[3].id]))
    write(store, RecordQueued(execution("queued", "later\0"), span("producer"), "p", 1))
    write(
        store,
        RequestCancel("e000000", Cancellation(5, None)),
        AddSpans(b"late", 1, nonce="n"),
        AddSpans(opened=(span("s"),), process_id="p"),
    )


@contextmanager
def opened_store(url: str) -> Iterator[Store]:
    store: Store = PostgresStore(url) if url.startswith("postgres") else SqliteStore(Path(url.removeprefix("sqlite:///")))
    yield store
    store.close()


def contents(url: str) -> tuple[Sequence[ExecutionRecord], list[bytes], int, int]:
    with opened_store(url) as store:
        records = [replace(record, seq=0, name=record.name.replace("\0", "\ufffd")) for record in store.executions()]
        work = store.open_work(["p"], limit=10_000)
        return records, outbox(store), len(store.statistics().parked), len(work)


def test_everything_moves_in_its_order_and_the_file_is_set_aside(tmp_path: Path, database: str) -> None:
    source = f"sqlite:///{tmp_path / 'old.db'}"
    with opened_store(source) as store:
        fill(store, 50)
    before = contents(source)
    code, out, error = migrated("--from", source, "--store", database)
    assert (code, error) == (0, "")
    assert "Moved 51 executions" in out
    assert PASSWORD not in out
    assert contents(database) == before
    assert not (tmp_path / "old.db").exists()
    (aside,) = tmp_path.glob("old.db.moved-*")
    aside.rename(tmp_path / "old.db")
    code, out, _ = migrated("--from", source, "--store", database)
    assert code == 0
    assert "had been moved before" in out
    assert contents(database) == before


def test_parked_rows_that_moved_go_out_beside_those_of_the_target(tmp_path: Path, database: str) -> None:
    source = f"sqlite:///{tmp_path / 'old.db'}"
    with opened_store(source) as store:
        fill(store, 10)
    with opened_store(database) as target:
        write(target, *(AddSpans(b"%d" % number, 1) for number in range(5)))
        assert migrated("--from", source, "--store", database)[0] == 0
        rows = claim(target, "relay")
        write(target, SettleOutbox("relay", parked=[(row.id, "no") for row in rows]))
        assert len(target.statistics().parked) == len(rows) + 2


def test_a_store_in_use_stays(tmp_path: Path, database: str) -> None:
    code = "import otelexec, sys\nwith otelexec.execution('job'):\n    print('runs', flush=True)\n    sys.stdin.readline()"
    source = f"sqlite:///{tmp_path / 'old.db'}"
    environment = os.environ | {"OTELEXEC_STORE": source}
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        code_, _, error = migrated("--from", source, "--store", database)
        assert code_ == 1
        assert f"{worker.pid} on" in error
        assert "stop them first" in error
        worker.communicate(b"\n", timeout=SECONDS)
    assert migrated("--from", source, "--store", database)[0] == 0


def test_killed_in_the_middle_it_is_run_again(tmp_path: Path, database: str) -> None:
    source = f"sqlite:///{tmp_path / 'old.db'}"
    with opened_store(source) as store:
        fill(store, 1500)
    before = contents(source)
    with opened_store(database) as target:
        write(target, Heartbeat(process("first")))
        kills = 0
        for looks in (1, 5, 25, 60):
            running = migrate("--from", source, "--store", database)
            seen = 0
            # While it copies, its transaction has the file.
            while running.poll() is None and seen < looks:
                seen += _is_locked(tmp_path / "old.db")
            running.send_signal(signal.SIGKILL)
            running.communicate(timeout=SECONDS)
            kills += running.returncode == -signal.SIGKILL
            if not (tmp_path / "old.db").exists():
                break
        assert kills > 0
        if (tmp_path / "old.db").exists():
            assert migrated("--from", source, "--store", database)[0] == 0
    assert contents(database) == before


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with closing_file(sqlite3.connect(path, timeout=0.005, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        except sqlite3.OperationalError:
            return True
    return False
