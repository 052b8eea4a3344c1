"""One durable execution after the other, against two commits by hand and no span."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import otelexec
from tests.benchmarks.by_hand import TwoCommits
from tests.benchmarks.measure import Result, time_ratios

if TYPE_CHECKING:
    from pathlib import Path

TARGET = 0.80
BATCH = 20


def run(folder: Path, *, short: bool = False) -> list[Result]:
    """
    Measure.

    Args:
        folder: For the stores of both.
        short: Fewer rounds, for a first look.
    """
    # No relay: the hand-written side sends nothing either, and the relay has a benchmark of its own.
    otelexec.configure(store=f"sqlite:///{folder}/otelexec.db", relay=False, reconcile=False)

    @otelexec.execution("invoice.run")
    def execute() -> None:
        pass

    def ours() -> None:
        for _ in range(BATCH):
            execute()

    with closing(TwoCommits(folder / "by-hand.db")) as hand:

        def theirs() -> None:
            for _ in range(BATCH):
                hand.closed(hand.opened("invoice.run"))

        ratios = time_ratios(theirs, ours, 30 if short else 150)
    otelexec.shutdown()
    return [Result("sequential durable execution", "two FULL commits by hand, no span", ratios, "x time", TARGET)]
