"""
Reconcile a store of 1,000,000 attempts of which 1 % belong to processes whose lease has lapsed.

The other 99 % are looked at twice: once ended and older, as in a store that has run for long before its workers died,
and once still running in processes that live, with the lapsed ones scattered among them, each in a page of its own.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from otelexec import identity, otlp
from otelexec.reconcile import Reconciler
from otelexec.store.rows import RUNNING, SUCCEEDED
from otelexec.store.spool import Spool
from otelexec.store.sqlite import SqliteStore
from otelexec.store.writes import Heartbeat
from tests.benchmarks.measure import Result
from tests.benchmarks.sample import ended_span

if TYPE_CHECKING:
    from pathlib import Path

TARGET_FIND_MS = 50.0
TARGET_CLOSE_SECONDS = 1.0
DEAD = 20
LIVING = 20

_EXECUTIONS = """
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :rows)
INSERT INTO execution (execution_id, name, state, request_id, source, correlation, started_unix_ns, ended_unix_ns, attempts, latest)
SELECT printf('0193%032x', i), 'invoice.run', CASE WHEN {lapsed} THEN 'running' ELSE :state END, printf('0194%032x', i), 'direct', '{{}}',
    1700000000000000000 + i, CASE WHEN NOT ({lapsed}) AND :state <> 'running' THEN 1700000001000000000 + i END, 1, 1 FROM n"""

# {lapsed} tells which belong to one of the dead; the others belong to one of the living.
_ATTEMPTS = """
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :rows)
INSERT INTO attempt (execution_id, attempt, token, process_id, state, duplicate, trace_id, span_id, span_start,
    started_unix_ns, ended_unix_ns)
SELECT printf('0193%032x', i), 1, printf('%032x', i),
    CASE WHEN {lapsed} THEN 'dead-' || ((i / 100 + i) % :dead) ELSE 'living-' || (i % :living) END,
    CASE WHEN {lapsed} THEN 'running' ELSE :state END, 0, printf('%032x', i), printf('%016x', i),
    CASE WHEN {lapsed} OR :state = 'running' THEN :start END,
    1700000000000000000 + i, CASE WHEN NOT ({lapsed}) AND :state <> 'running' THEN 1700000001000000000 + i END FROM n"""


def _fill(path: Path, rows: int, state: str) -> SqliteStore:
    store = SqliteStore(path)
    span = ended_span()
    here = identity.this_process(
        "", lease_seconds=30.0, resource=otlp.encode_resource(span.resource), scope=otlp.encode_scope(span.instrumentation_scope)
    )
    # Of another host, so that only the lease tells.
    names = [*(f"dead-{number}" for number in range(DEAD)), *(f"living-{number}" for number in range(LIVING))]
    there = [replace(here, process_id=name, host="elsewhere", boot_id="another boot") for name in names]
    store.commit([Heartbeat(process) for process in there], durable=False, timeout_seconds=5.0)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        values = {"rows": rows, "state": state, "living": LIVING, "dead": DEAD, "start": otlp.encode_start(span)}
        connection.execute("BEGIN")
        lapsed = "i % 100 = 0" if state == RUNNING else "i > :rows - :rows / 100"
        connection.execute(_EXECUTIONS.format(lapsed=lapsed), values)
        connection.execute(_ATTEMPTS.format(lapsed=lapsed), values)
        connection.execute("UPDATE process SET heartbeat_unix_ns = CASE WHEN process_id LIKE 'dead-%' THEN 1 ELSE ? END", (2**62,))
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return store


def _round(folder: Path, rows: int, state: str) -> tuple[float, float]:
    """Give the milliseconds to find the dead, and the seconds to close what they left."""
    store = _fill(folder / f"{state}.db", rows, state)
    try:
        store.processes()  # opens the connection
        start = time.perf_counter()
        now = store.now_unix_ns()
        lapsed = [process for process in store.processes() if identity.liveness(process, now) == "lapsed"]
        find = (time.perf_counter() - start) * 1e3
        if len(lapsed) != DEAD:
            msg = f"found {len(lapsed)} lapsed processes, not {DEAD}"
            raise RuntimeError(msg)
        spool = Spool(folder / f"{state}.spool", lambda: lapsed[0])
        start = time.perf_counter()
        done = Reconciler(store, spool).run_once()
        close = time.perf_counter() - start
        if done.attempts != rows // 100:
            msg = f"closed {done.attempts} attempts, not {rows // 100}"
            raise RuntimeError(msg)
    finally:
        store.close()
    return find, close


def run(folder: Path, *, short: bool = False) -> list[Result]:
    """
    Measure.

    Args:
        folder: For the stores.
        short: A tenth of the rows.
    """
    rows = 100_000 if short else 1_000_000
    logger = logging.getLogger("otelexec.reconcile")
    handler = logging.FileHandler(folder / "reconcile.log")  # a line for each lost attempt is part of the work
    logger.addHandler(handler)
    logger.propagate = False
    results = []
    try:
        for state, rest in ((SUCCEEDED, "ended"), (RUNNING, "running")):
            find, close = _round(folder, rows, state)
            work = f"reconcile {rows:,} rows, 1 % lapsed, the rest {rest}"
            results += [
                Result(f"{work}: find", "-", [find], "ms", TARGET_FIND_MS),
                Result(f"{work}: close {rows // 100:,}", "-", [close], "s", TARGET_CLOSE_SECONDS),
            ]
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
        handler.close()
    return results
