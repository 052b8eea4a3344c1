"""
No-op RQ jobs, enqueued and worked off by a `SimpleWorker` and by one that forks a horse for each: bare, and with the adapter
without and with a store, and by hand. Each side is a real process on one Valkey, and they take turns. Nothing is exported.
"""  # noqa: D205 (one sentence says what is compared)

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tests.benchmarks.measure import Result
from tests.benchmarks.messages_by_hand import RECORDS
from tests.benchmarks.rq_side import SERVER, SIDES
from tests.queue_servers import running_valkey

if TYPE_CHECKING:
    from pathlib import Path

LABELS = {
    "spans": "by hand, spans",
    "records": "by hand, spans and records",
    "none": "without store",
    "durable": "durable",
}
TARGETS: dict[str, tuple[str, dict[str, float | None]]] = {
    "enqueue": ("enqueue a job", {"spans": None, "records": None, "none": 1.15, "durable": 1.30}),
    "simple": ("run a no-op job, SimpleWorker", {"spans": None, "records": None, "none": None, "durable": 1.15}),
    "forking": ("run a no-op job, Worker (fork)", {"spans": None, "records": None, "none": None, "durable": 1.10}),
}


def run(folder: Path, *, short: bool = False) -> list[Result]:
    """
    Measure.

    Args:
        folder: For Valkey and the stores.
        short: Fewer rounds, for a first look.
    """
    numbers = {"enqueue": 100, "simple": 50, "forking": 10}
    rounds = 6 if short else 30
    with ExitStack() as stack:
        place = folder / "valkey"
        place.mkdir()
        url = f"{stack.enter_context(running_valkey(place)).connection_url}/0"
        sides = {name: _start(stack, name, folder, url) for name in SIDES}
        times: dict[tuple[str, str], list[float]] = {(what, name): [] for what in numbers for name in SIDES}
        for turn in range(-1, rounds):
            for what, number in numbers.items():
                for place_in_turn in range(len(SIDES)):
                    name = SIDES[(turn + place_in_turn) % len(SIDES)]
                    times[what, name].append(_round(sides[name], what, number))
    results = []
    for what, (label, targets) in TARGETS.items():
        bare = times[what, "bare"][1:]
        against = f"RQ alone ({1e6 * min(bare) / numbers[what]:.0f} us)"
        for name, target in targets.items():
            ratios = [took / base for took, base in zip(times[what, name][1:], bare, strict=True)]
            results.append(Result(f"{label}: {LABELS[name]}", against, ratios, "x time", target))
    return results


def _start(stack: ExitStack, name: str, folder: Path, url: str) -> subprocess.Popen[str]:
    store = f"sqlite:///{folder}/{name}.db" if name == "durable" else "none"
    own = {
        SERVER: url,
        **({RECORDS: f"{folder}/{name}.db"} if name == "records" else {}),
        "OTELEXEC_STORE": store,
        "OTELEXEC_RELAY": "false",
        "OTELEXEC_RECONCILE": "false",
    }
    log = stack.enter_context((folder / f"{name}.log").open("wb"))
    command = [sys.executable, "-m", "tests.benchmarks.rq_side", name]
    side = subprocess.Popen(command, env=os.environ | own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    stack.callback(side.communicate)
    return side


def _round(side: subprocess.Popen[str], what: str, number: int) -> float:
    if side.stdin is None or side.stdout is None:
        raise AssertionError
    side.stdin.write(f"{what} {number}\n")
    side.stdin.flush()
    return float(side.stdout.readline())
