"""
Durable executions on PostgreSQL against the same by hand: one after the other, in 32 threads, in 256 async tasks.

By hand there is no span. Both write to databases of their own on one server, over loopback.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import otelexec
from tests.benchmarks.measure import Result, rate_ratios, time_ratios
from tests.benchmarks.postgres_by_hand import TwoCommits, server_as_installed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TARGET_SEQUENTIAL = 0.95
TARGET_THREADS = 3.0
TARGET_TASKS = 3.0
BATCH = 20
THREADS = 32
EACH = 4
TASKS = 256

SEQUENTIAL = "two commits by hand, no span"
CONNECTIONS = f"the same by hand, {THREADS} connections"


def run(folder: Path, *, short: bool = False) -> list[Result]:
    """
    Measure.

    Args:
        folder: For the spool, which stays empty.
        short: Fewer rounds, for a first look.
    """
    with server_as_installed() as server, ExitStack() as stack:
        # No relay: the hand-written side sends nothing either.
        otelexec.configure(store=server.new_database(), spool=folder / "spool", relay=False, reconcile=False)
        stack.callback(otelexec.shutdown)
        by_hand = server.new_database()
        hands = [stack.enter_context(closing(TwoCommits(by_hand))) for _ in range(THREADS)]
        pool = stack.enter_context(ThreadPoolExecutor(THREADS))
        runner = stack.enter_context(asyncio.Runner())

        @otelexec.execution("invoice.run")
        def execute() -> None:
            pass

        @otelexec.execution("invoice.run")
        async def execute_async() -> None:
            pass

        async def all_at_once() -> None:
            await asyncio.gather(*(execute_async() for _ in range(TASKS)))

        def everywhere(work: Callable[[int], None], each: int) -> Callable[[], None]:
            """Give the work of `THREADS` threads, each knowing its number."""

            def repeat(number: int) -> None:
                for _ in range(each):
                    work(number)

            return lambda: list(pool.map(repeat, range(THREADS))).clear()

        sequential = time_ratios(lambda: _times(BATCH, hands[0].execute), lambda: _times(BATCH, execute), 10 if short else 150)
        connections = everywhere(lambda number: hands[number].execute(), EACH)
        threads = rate_ratios(connections, everywhere(lambda _: execute(), EACH), 4 if short else 60)
        tasks = rate_ratios(lambda: _times(TASKS, hands[0].execute), lambda: runner.run(all_at_once()), 2 if short else 40)
        connections = everywhere(lambda number: hands[number].execute(), TASKS // THREADS)
        beside = rate_ratios(connections, lambda: runner.run(all_at_once()), 2 if short else 40)
    return [
        Result("PostgreSQL: sequential durable execution", SEQUENTIAL, sequential, "x time", TARGET_SEQUENTIAL),
        Result(f"PostgreSQL: {THREADS} threads, durable", CONNECTIONS, threads, "x rate", TARGET_THREADS, at_least=True),
        Result(f"PostgreSQL: {TASKS} async tasks, durable", f"{SEQUENTIAL}, in turn", tasks, "x rate", TARGET_TASKS, at_least=True),
        Result(f"PostgreSQL: {TASKS} async tasks, durable", CONNECTIONS, beside, "x rate", None, at_least=True),
    ]


def _times(count: int, work: Callable[[], None]) -> None:
    for _ in range(count):
        work()
