"""
Reconcile a PostgreSQL store of 1,000,000 attempts of which 1 % belong to processes whose lease has lapsed.

As in `reconcile.py`, the other 99 % are looked at twice: ended and older, and still running in processes that live. The
plans of what the reconciler asks are checked: none may read a table or an index from end to end.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from otelexec import identity
from otelexec.reconcile import Reconciler
from otelexec.store.postgres import PostgresStore
from otelexec.store.rows import RUNNING, SUCCEEDED
from otelexec.store.spool import Spool
from tests.benchmarks import postgres_plans
from tests.benchmarks.measure import Result
from tests.benchmarks.postgres_by_hand import server_as_installed
from tests.benchmarks.postgres_fill import Rows, fill, fill_undelivered, processes_elsewhere, settle_leases
from tests.records import until
from tests.stores import connected

if TYPE_CHECKING:
    from pathlib import Path

    from tests.postgres_servers import Server

TARGET_FIND_MS = 50.0
TARGET_CLOSE_SECONDS = 1.0
DEAD = 20
LIVING = 20
LEASE_SECONDS = 1.0


def _round(server: Server, folder: Path, rows: int, rest: str) -> tuple[float, float]:
    """Give the milliseconds to find the dead, and the seconds to close what they left."""
    url = server.new_database()
    store = PostgresStore(url)
    lapsed_rows = "i % 100 = 0" if rest == RUNNING else "i > n - n / 100"
    processes_elsewhere(
        store, [*(f"dead-{each}" for each in range(DEAD)), *(f"living-{each}" for each in range(LIVING))], lease_seconds=LEASE_SECONDS
    )
    with connected(url) as connection:
        fill(
            connection,
            Rows(
                rows,
                f"CASE WHEN {lapsed_rows} THEN 'running' ELSE '{rest}' END",
                f"CASE WHEN {lapsed_rows} THEN 'dead-' || (i / 100 + i) % {DEAD} ELSE 'living-' || i % {LIVING} END",
            ),
        )
        fill_undelivered(connection, rows // 100, f"'living-' || e.seq % {LIVING}")
        settle_leases(connection)
        connection.execute("ANALYZE")
    try:
        start = time.perf_counter()
        now = store.now_unix_ns()
        lapsed = [process for process in store.processes() if identity.liveness(process, now) == "lapsed"]
        find = (time.perf_counter() - start) * 1e3
        assert len(lapsed) == DEAD, f"found {len(lapsed)} lapsed processes, not {DEAD}"
        seen = postgres_plans.Recorder(server, url)
        asking = PostgresStore(url)
        with seen.recorded() as plans:
            asking.processes()
            asking.open_work([lapsed[0].process_id], limit=500)
        asking.close()
        seen.forget()
        postgres_plans.show(f"reconcile, the rest {rest}", plans)
        # A lease counts anew from the server's start, which a fast machine has not left a whole lease behind yet.
        until(lambda: store.now_unix_ns() - store.up_since_unix_ns() >= LEASE_SECONDS * 1e9)
        spool = Spool(folder / f"{rest}.spool", lambda: lapsed[0])
        start = time.perf_counter()
        done = Reconciler(store, spool).run_once()
        close = time.perf_counter() - start
        assert done.attempts == rows // 100, f"closed {done.attempts} attempts, not {rows // 100}"
    finally:
        store.close()
    server.drop_database(url)
    return find, close


def run(folder: Path, *, short: bool = False) -> list[Result]:
    """
    Measure.

    Args:
        folder: For the spools, which stay empty.
        short: A twentieth of the rows.
    """
    rows = 50_000 if short else 1_000_000
    logger = logging.getLogger("otelexec.reconcile")
    handler = logging.FileHandler(folder / "reconcile.log")  # a line for each lost attempt is part of the work
    logger.addHandler(handler)
    logger.propagate = False
    results = []
    try:
        with server_as_installed() as server:
            for rest in (SUCCEEDED, RUNNING):
                find, close = _round(server, folder, rows, rest)
                work = f"PostgreSQL: reconcile {rows:,} rows, 1 % lapsed, the rest {'running' if rest == RUNNING else 'ended'}"
                results += [
                    Result(f"{work}: find", "-", [find], "ms", TARGET_FIND_MS),
                    Result(f"{work}: close {rows // 100:,}", "-", [close], "s", TARGET_CLOSE_SECONDS),
                ]
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
        handler.close()
    return results
