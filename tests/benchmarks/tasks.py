"""Durable executions in 256 async tasks, against as many by hand one after the other."""

from __future__ import annotations

import asyncio
from contextlib import closing
from typing import TYPE_CHECKING

import otelexec
from tests.benchmarks.by_hand import TwoCommits
from tests.benchmarks.measure import Result, rate_ratios

if TYPE_CHECKING:
    from pathlib import Path

TARGET = 4.0
TASKS = 256


def run(folder: Path, *, short: bool = False) -> list[Result]:
    """
    Measure.

    Args:
        folder: For the stores of both.
        short: Fewer rounds, for a first look.
    """
    otelexec.configure(store=f"sqlite:///{folder}/otelexec.db", relay=False, reconcile=False)

    @otelexec.execution("invoice.run")
    async def execute() -> None:
        pass

    async def all_at_once() -> None:
        await asyncio.gather(*(execute() for _ in range(TASKS)))

    with closing(TwoCommits(folder / "by-hand.db")) as hand, asyncio.Runner() as runner:

        def theirs() -> None:
            for _ in range(TASKS):
                hand.closed(hand.opened("invoice.run"))

        ratios = rate_ratios(theirs, lambda: runner.run(all_at_once()), 10 if short else 40)
    otelexec.shutdown()
    return [
        Result(f"{TASKS} async tasks, durable", "two FULL commits by hand, one after the other", ratios, "x rate", TARGET, at_least=True)
    ]
