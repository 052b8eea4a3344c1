"""
No-op Celery tasks, published and run: bare, by hand, with the adapter without and with a store, and with the contrib one.

Each side has a publisher and a solo worker of its own, real processes on one Valkey, and they take turns. A round's tasks
are published while the worker is held back; then it works them off alone, and tells how long that took. Nothing is
exported, and results are ignored, so that Celery's own part is as small as it can be.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from valkey import Valkey

from tests.benchmarks.celery_side import BROKER, CPU, SIDES
from tests.benchmarks.measure import Result
from tests.benchmarks.messages_by_hand import RECORDS
from tests.queue_servers import running_valkey
from tests.servers import stop

if TYPE_CHECKING:
    from pathlib import Path

PATIENCE_SECONDS = 60
RUN_TARGETS = {"spans": None, "records": None, "none": 1.10, "durable": 1.40, "contrib": 1.10}
PUBLISH_TARGETS = {"spans": None, "records": None, "none": 1.15, "durable": 1.30, "contrib": 1.15}
LABELS = {
    "spans": "by hand, spans",
    "records": "by hand, spans and records",
    "none": "without store",
    "durable": "durable",
    "contrib": "opentelemetry-instrumentation-celery, for comparison",
}


@dataclass(frozen=True, slots=True)
class Side:
    """
    One side's two processes.

    Attributes:
        name: Which.
        publisher: Publishes on demand.
        keys: A client of the Valkey between them.
    """

    name: str
    publisher: subprocess.Popen[str]
    keys: Any

    def round(self, tasks: int) -> tuple[float, float]:
        """Publish tasks and run them; gives the seconds that each of the two took."""
        if self.publisher.stdin is None or self.publisher.stdout is None:
            raise AssertionError
        self.publisher.stdin.write(f"{tasks}\n")
        self.publisher.stdin.flush()
        published = float(self.publisher.stdout.readline())
        self.keys.rpush(f"go {self.name}", "")
        answer = self.keys.blpop(f"took {self.name}", timeout=PATIENCE_SECONDS)
        if answer is None:
            raise TimeoutError(f"the worker of {self.name} did not do its tasks")
        return published, float(answer[1])


def run(folder: Path, *, short: bool = False) -> list[Result]:
    """
    Measure.

    Args:
        folder: For Valkey and the stores.
        short: Fewer rounds, for a first look.
    """
    tasks, rounds = (100, 8) if short else (200, 40)
    with ExitStack() as stack:
        place = folder / "valkey"
        place.mkdir()
        url = f"{stack.enter_context(running_valkey(place)).connection_url}/0"
        keys: Any = Valkey.from_url(url)
        stack.callback(keys.close)
        sides = [_start(stack, name, folder, url, keys) for name in SIDES]
        times: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
        for turn in range(-2, rounds):
            for place_in_turn in range(len(sides)):
                side = sides[(turn + place_in_turn) % len(sides)]
                times[side.name].append(side.round(tasks))
    unit = "x CPU time" if os.environ.get(CPU) else "x time"
    results = []
    for which, (what, targets) in enumerate((("publish a task", PUBLISH_TARGETS), ("run a no-op task, solo", RUN_TARGETS))):
        bare = [took[which] for took in times["bare"][2:]]
        for name, target in targets.items():
            ratios = [took[which] / base for took, base in zip(times[name][2:], bare, strict=True)]
            results.append(Result(f"{what}: {LABELS[name]}", f"Celery alone ({1e6 * min(bare) / tasks:.0f} us)", ratios, unit, target))
    return results


def _start(stack: ExitStack, name: str, folder: Path, url: str, keys: Any) -> Side:
    store = f"sqlite:///{folder}/{name}.db" if name == "durable" else "none"
    own = {
        BROKER: url,
        **({RECORDS: f"{folder}/{name}.db"} if name == "records" else {}),
        "OTELEXEC_STORE": store,
        "OTELEXEC_RELAY": "false",
        "OTELEXEC_RECONCILE": "false",
    }
    command = [sys.executable, "-m", "tests.benchmarks.celery_side", name]
    log = stack.enter_context((folder / f"{name}.log").open("wb"))
    worker = subprocess.Popen([*command, "worker"], env=os.environ | own, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    stack.callback(stop, worker)
    publisher = subprocess.Popen(
        [*command, "publisher"], env=os.environ | own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
    )
    stack.callback(publisher.communicate)
    return Side(name, publisher, keys)
