"""
Durable executions against DBOS workflows on the same server: one after the other, and 32 at a time.

DBOS is the nearest durable peer: it records a workflow before it runs and when it has ended, and writes no span. It is no
dependency of anything here:

    pip install --constraint constraints.txt dbos
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import otelexec
from tests.benchmarks.measure import Result, rate_ratios
from tests.benchmarks.postgres_by_hand import server_as_installed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TARGET_SEQUENTIAL = 2.5
TARGET_THREADS = 12.0
BATCH = 20
THREADS = 32
EACH = 4


def run(folder: Path, *, short: bool = False) -> list[Result]:
    """
    Measure; gives nothing where DBOS is not installed.

    Args:
        folder: For the spool, which stays empty.
        short: Fewer rounds, for a first look.
    """
    if find_spec("dbos") is None:
        print(" left out: pip install --constraint constraints.txt dbos ...", end="", file=sys.stderr)
        return []
    # By name, so that whoever checks types needs it as little as the project does.
    dbos: Any = import_module("dbos").DBOS
    with server_as_installed() as server, ThreadPoolExecutor(THREADS) as pool:
        otelexec.configure(store=server.new_database(), spool=folder / "spool", relay=False, reconcile=False)
        dbos(
            config={
                "name": "invoices",
                "system_database_url": server.new_database(),
                "sys_db_pool_size": THREADS,  # so that no workflow waits for a connection
                "log_level": "ERROR",
                "console_log_level": "ERROR",
            }
        )

        @dbos.workflow()  # type: ignore[untyped-decorator, unused-ignore]
        def workflow() -> None:
            pass

        @otelexec.execution("invoice.run")
        def execute() -> None:
            pass

        dbos.launch()
        try:
            sequential = rate_ratios(lambda: _times(workflow), lambda: _times(execute), 4 if short else 60)
            threads = rate_ratios(lambda: _everywhere(pool, workflow), lambda: _everywhere(pool, execute), 3 if short else 40)
        finally:
            dbos.destroy()
            otelexec.shutdown()
    return [
        Result("PostgreSQL: sequential durable execution", "a DBOS workflow", sequential, "x rate", TARGET_SEQUENTIAL, at_least=True),
        Result(
            f"PostgreSQL: {THREADS} threads, durable",
            f"DBOS workflows, {THREADS} threads",
            threads,
            "x rate",
            TARGET_THREADS,
            at_least=True,
        ),
    ]


def _times(work: Callable[[], None]) -> None:
    for _ in range(BATCH):
        work()


def _everywhere(pool: ThreadPoolExecutor, work: Callable[[], None]) -> None:
    def repeat(_: int) -> None:
        for _ in range(EACH):
            work()

    list(pool.map(repeat, range(THREADS))).clear()
