"""
What `list`, `show` and `prune` cost in a PostgreSQL store of 10,000,000 executions, with the plans of every statement.

There is no peer to compare with and no time promised; what is promised is that nothing reads a table or an index from end to
end, and that `prune` does not hold up the executions that end meanwhile: their latency is taken in turn with and without it.
"""

from __future__ import annotations

import multiprocessing
import time
from statistics import median, quantiles
from typing import TYPE_CHECKING, Final

import otelexec
from otelexec.store.postgres import PostgresStore
from otelexec.store.pruning import TABLES, deletions
from otelexec.store.rows import CANCELLED, FAILED, PAUSED, RUNNING, SUCCEEDED
from otelexec.store.upkeep import Prune, Pruned
from tests.benchmarks import postgres_plans
from tests.benchmarks.measure import Result
from tests.benchmarks.postgres_by_hand import server_as_installed
from tests.benchmarks.postgres_fill import EPOCH_NS, Rows, execution_id, fill, fill_undelivered, processes_elsewhere
from tests.stores import connected

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.connection import Connection
    from pathlib import Path

ROWS: Final = 10_000_000
SHORT_ROWS: Final = 50_000
PAGE: Final = 50
REPEATS: Final = 20

# One in a hundred failed, one in a thousand cancelled, the last thousand still running, and ten paused, all over the years.
_STATE: Final = f"""CASE WHEN i % (n / 10) = 3 THEN '{PAUSED}' WHEN i > n - 1000 THEN '{RUNNING}'
    WHEN i % 100 = 1 THEN '{FAILED}' WHEN i % 1000 = 2 THEN '{CANCELLED}' ELSE '{SUCCEEDED}' END"""


def _readings(rows: int) -> Mapping[str, Callable[[PostgresStore], object]]:
    known = execution_id(rows // 3)
    return {
        f"list, the newest {PAGE}": lambda store: list(store.executions(limit=PAGE)),
        f"list, {PAGE} from the middle on": lambda store: list(store.executions(limit=PAGE, before=rows // 2)),
        f"list, {PAGE} that succeeded": lambda store: list(store.executions(limit=PAGE, state=SUCCEEDED)),
        f"list, {PAGE} that failed": lambda store: list(store.executions(limit=PAGE, state=FAILED)),
        f"list, {PAGE} that failed, from the middle on": lambda store: list(store.executions(limit=PAGE, before=rows // 2, state=FAILED)),
        f"list, {PAGE} that run": lambda store: list(store.executions(limit=PAGE, state=RUNNING)),
        "list, the ten that are paused": lambda store: list(store.executions(limit=PAGE, state=PAUSED)),
        "show, by id": lambda store: store.execution(known),
        "show, by the beginning of an id": lambda store: store.ids_with_prefix(known[:-1], limit=4),
    }


def _prune(orders: Connection, url: str, before: int) -> None:
    """Delete step by step, in a process of its own, whenever told to; tell how many rows that were."""
    store = PostgresStore(url)

    def step(prune: Prune) -> Pruned:
        [done] = store.commit([prune], durable=False, timeout_seconds=5.0)
        assert isinstance(done, Pruned)
        return done

    steps = deletions(step, before)
    orders.send(next(steps))
    while orders.recv():
        deleted = 0
        while not orders.poll():
            deleted += next(steps, ("", 0))[1]
        orders.recv()
        orders.send(deleted)
    store.close()


def _latencies(work: Callable[[], None], seconds: float) -> list[float]:
    times = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        work()
        times.append(time.perf_counter() - start)
    return times


def _beside_prune(folder: Path, url: str, before: int, *, short: bool) -> list[Result]:
    otelexec.configure(store=url, spool=folder / "spool", relay=False, reconcile=False)

    @otelexec.execution("invoice.run")
    def execute() -> None:
        pass

    context = multiprocessing.get_context("spawn")
    orders, theirs = context.Pipe()
    process = context.Process(target=_prune, args=(theirs, url, before), name="prune")
    process.start()
    middle, tail, rate = [], [], []
    seconds, rounds = (0.6, 3) if short else (5.0, 10)
    try:
        if not orders.poll(60.0):
            raise TimeoutError("the pruning process did not begin")
        orders.recv()
        _latencies(execute, 0.5)
        for _ in range(rounds):
            alone = _latencies(execute, seconds)
            orders.send(True)
            beside = _latencies(execute, seconds)
            orders.send(None)
            rate.append(orders.recv() / seconds)
            middle.append(median(beside) / median(alone))
            tail.append(quantiles(beside, n=100)[-1] / quantiles(alone, n=100)[-1])
        orders.send(False)
        process.join(30.0)
    finally:
        process.kill()
        otelexec.shutdown()
    without = "the same without prune"
    return [
        Result("PostgreSQL: latency of an execution beside prune, median", without, middle, "x time", None),
        Result("PostgreSQL: latency of an execution beside prune, 99th percentile", without, tail, "x time", None),
        Result(f"PostgreSQL: prune in steps of {Prune(0).limit}, beside executions", "-", rate, "rows/s", None),
    ]


def run(folder: Path, *, short: bool = False) -> list[Result]:
    """
    Measure.

    Args:
        folder: For the spool, which stays empty.
        short: Fewer rows, for a first look.
    """
    rows = SHORT_ROWS if short else ROWS
    results = []
    with server_as_installed() as server:
        url = server.new_database()
        store = PostgresStore(url)
        processes_elsewhere(store, [f"living-{each}" for each in range(20)], lease_seconds=30.0)
        with connected(url) as connection:
            fill(connection, Rows(rows, _STATE, "'living-' || i % 20"))
            fill_undelivered(connection, rows // 100, "a.process_id")
            connection.execute("ANALYZE")
        recorder = postgres_plans.Recorder(server, url)
        looking = PostgresStore(url)
        looking.now_unix_ns()
        for what, read in _readings(rows).items():
            with recorder.recorded() as plans:
                read(looking)
            postgres_plans.show(what, plans)
            times = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                read(store)
                times.append((time.perf_counter() - start) * 1e3)
            results.append(Result(f"PostgreSQL: {what}, of {rows:,}", "-", times, "ms", None))
        with recorder.recorded() as plans:
            looking.commit([Prune(EPOCH_NS + rows // 2 * 1_000_000, table) for table in TABLES], durable=False, timeout_seconds=5.0)
        postgres_plans.show("prune, a step through each table", plans)
        recorder.forget()
        looking.close()
        store.close()
        results += _beside_prune(folder, url, EPOCH_NS + rows // 2 * 1_000_000, short=short)
    return results
