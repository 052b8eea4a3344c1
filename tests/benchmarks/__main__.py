"""
Print the benchmarks, with what they aim at and the machine.

    python -m tests.benchmarks [--short] [--only NAME]

The stores lie in the system's temporary folder; TMPDIR names another one. On a file system in memory an fsync costs
nothing, and the durable figures mean little: the last line says what it costs. A target that is missed is no failure:
this is no test.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tests.benchmarks import (
    call,
    celery_tasks,
    freeze,
    measure,
    postgres_dbos,
    postgres_executions,
    postgres_growth,
    postgres_reconcile,
    processes,
    propagation,
    reconcile,
    relay,
    rq_tasks,
    sequential,
    tasks,
    threads,
)
from tests.benchmarks.measure import Result

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WIDTH = 150
REPEATS = 5


def _repeated(run: Callable[..., list[tuple[str, float]]], against: str, target: float, folder: Path, *, short: bool) -> list[Result]:
    """Run a benchmark that gives the median of its own rounds, some times over."""
    del folder
    measured = [run(short=short) for _ in range(REPEATS)]
    return [Result(label, against, [turn[place][1] for turn in measured], "x time", target) for place, (label, _) in enumerate(measured[0])]


BENCHMARKS: dict[str, Callable[..., list[Result]]] = {
    "sequential": sequential.run,
    "threads": threads.run,
    "tasks": tasks.run,
    "processes": processes.run,
    "call": call.run,
    "propagation": partial(_repeated, propagation.run, "the SDK's global propagator", propagation.TARGET),
    "freeze": partial(_repeated, freeze.run, "encode_spans and serialise", freeze.TARGET),
    "relay": relay.run,
    "reconcile": reconcile.run,
    "postgres": postgres_executions.run,
    "postgres-dbos": postgres_dbos.run,
    "postgres-reconcile": postgres_reconcile.run,
    "postgres-growth": postgres_growth.run,
    "celery": celery_tasks.run,
    "rq": rq_tasks.run,
}


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1_000 else f"{value:.3g}" if value >= 100 else f"{value:.2f}"


def _row(result: Result) -> Sequence[str]:
    low, high = min(result.values), max(result.values)
    spread = f"{_figure(low)} to {_figure(high)}" if len(result.values) > 1 else "one run"
    target = "-" if result.target is None else f"{'>=' if result.at_least else '<='} {_figure(result.target)}"
    return (
        result.work,
        result.against,
        f"{_figure(result.median)} {result.unit}",
        spread,
        target,
        "-" if result.target is None else "yes" if result.reached else "no",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the benchmarks and print the table.

    Args:
        arguments: The command line; None means the process's own.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Print the benchmark figures and their targets.")
    parser.add_argument("--short", action="store_true", help="fewer rounds and fewer rows, for a first look")
    parser.add_argument("--only", choices=sorted(BENCHMARKS), action="append", help="only this one; may be given several times")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    table = Table("work", "against", "median", "min to max", "target", "reached", title="Figures, and what they aim at")
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    with tempfile.TemporaryDirectory(prefix="otelexec-benchmarks-") as name:
        folder = Path(name)
        for chosen in dict.fromkeys(options.only or BENCHMARKS):
            place = folder / chosen
            place.mkdir()
            start = time.perf_counter()
            print(f"{chosen} ...", end="", file=sys.stderr, flush=True)
            for result in BENCHMARKS[chosen](place, short=options.short):
                table.add_row(*_row(result))
            print(f" {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        console.print(table)
        console.print(
            ("Short: few rounds, and fewer rows than the targets of relay and reconcile are meant for. " if options.short else "")
            + measure.machine(folder),
            highlight=False,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
