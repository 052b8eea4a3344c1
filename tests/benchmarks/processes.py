"""
Durable executions in eight processes on one file, against the same by hand: a connection each, two commits.

`python -m tests.benchmarks.processes SIDE FILE` is one of the processes: it prints `ready`, and after each line of its input
does its share and prints `done`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import otelexec
from tests.benchmarks.by_hand import TwoCommits
from tests.benchmarks.measure import Result, rate_ratios

PROCESSES = 8
EACH = 40
THINK_SECONDS = 0.001
"""Between two executions: jobs do something."""


def run(folder: Path, *, short: bool = False) -> list[Result]:
    """
    Measure.

    Args:
        folder: For the stores of both.
        short: Fewer rounds, for a first look.
    """
    TwoCommits(folder / "by-hand.db").close()
    with ExitStack() as stack:
        by_hand, ours = (_Workers(stack, side, folder / f"{side}.db") for side in ("by-hand", "otelexec"))
        ratios = rate_ratios(by_hand.work, ours.work, 10 if short else 40)
    against = "by hand, a connection and two FULL commits each"
    return [Result(f"{PROCESSES} processes on one file, durable", against, ratios, "x rate", None, at_least=True)]


class _Workers:
    def __init__(self, stack: ExitStack, side: str, path: Path) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.processes", side, str(path)]
        self._processes = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(PROCESSES)
        ]
        self._wait_for("ready")

    def work(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("work\n")
            process.stdin.flush()
        self._wait_for("done")

    def _wait_for(self, word: str) -> None:
        for process in self._processes:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == word


def main() -> None:
    """Be one of the processes."""
    side, name = sys.argv[1:]
    path = Path(name)
    if side == "otelexec":
        otelexec.configure(store=f"sqlite:///{path}", relay=False, reconcile=False)

        @otelexec.execution("invoice.run")
        def work() -> None:
            pass

    else:
        hand = TwoCommits(path)

        def work() -> None:
            hand.closed(hand.opened("invoice.run"))

    work()
    print("ready", flush=True)
    for _ in sys.stdin:
        for _ in range(EACH):
            work()
            time.sleep(THINK_SECONDS)
        print("done", flush=True)


if __name__ == "__main__":
    main()
