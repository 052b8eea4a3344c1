"""
SIGKILL at a chosen point: a process that is killed at its n-th line or at its n-th SQL statement.

`python -m tests.acceptance.killing` is a parent that has imported everything and forks one child per kill, before
anything is configured, so that each child has a runtime of its own. A dry run records every line of the traced files and
every statement in the order in which they come; each later child gets one of those points and kills itself there.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import signal
import sqlite3
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

import otelexec
from otelexec.store import group_commit
from otelexec.store import sqlite as sqlite_store
from tests import stores
from tests.acceptance.agreement import disagreements, settle
from tests.acceptance.scenarios import SCENARIOS, Ledger
from tests.stores import Place, Places

PACKAGE: Final = Path(otelexec.__file__).parent
NAMES: Final = (
    *("lifecycle", "drivers", "finalize", "effects", "execution", "blocks", "publishing", "runtime", "journal", "spans"),
    *("reconcile", "relay", "delivery", "transport", "cli/relaying", "cli/reconciling"),
    *("store/group_commit", "store/spool", "store/sqlite", "store/sql"),
    *("store/attempt_statements", "store/span_statements", "store/outbox_statements"),
    *sorted(f"store/{path.stem}" for path in (PACKAGE / "store").glob("postgres*.py")),
)
TRACED: Final = {str(PACKAGE / f"{name}.py"): name for name in NAMES}
BATCH: Final = 40
"""Kills that share one store file."""

SLOW: Final = "spooled"
"""It waits for a locked store, so it is killed at what no scenario before it passes, if a choice has to be made."""

CHILD_SECONDS: Final = 30
"""A child that takes longer hangs: its alarm ends it, and the sweep reports it."""

Point = tuple[str, int]
"""A line (`file:number`) or a statement (its text up to the first value), and which of its occurrences."""


ANSWERED: Final = " (answered)"


def _statement(query: Any) -> str:
    """Give a statement's text without what differs from one time to the next: how many rows of parameters it has."""
    text = query.decode() if isinstance(query, bytes) else str(query)
    return re.sub(r"(\([^()]*%s[^()]*\)),( ?\1,?)+", r"\1...", re.sub(r"\s+", " ", text).strip())


class Points:
    """
    Counts the points that this process passes, and kills it at one of them.

    Args:
        kill: Where; None records only.
    """

    def __init__(self, kill: Point | None) -> None:
        self.kill = kill
        self.passed: list[str] = []
        self._counts: Counter[str] = Counter()

    def install(self) -> None:
        """Trace every thread and every connection to the store from here on."""
        if stores.is_postgres(os.environ["OTELEXEC_STORE"]):
            self._trace_postgres()
        else:
            self._trace_sqlite()
        threading.settrace(self._called)
        sys.settrace(self._called)

    def _trace_sqlite(self) -> None:
        # What a killed process wrote is in the kernel all the same, and without fsync a sweep takes half the time.
        sqlite_store._sync = lambda _: None
        connect: Callable[..., sqlite3.Connection] = sqlite3.connect

        def traced_connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            connection = connect(*args, **kwargs)
            connection.set_trace_callback(lambda text: self.hit(re.split(r"['0-9]", text, maxsplit=1)[0]))
            return connection

        sqlite3.connect = traced_connect  # type: ignore[assignment]

    def _trace_postgres(self) -> None:
        """Pass a point before each statement and one when it is answered; BEGIN, COMMIT and ROLLBACK are statements too."""
        import psycopg

        execute, command = psycopg.Cursor.execute, psycopg.Connection._exec_command

        def traced_execute(cursor: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
            key = _statement(query)
            self.hit(key)
            result = execute(cursor, query, *args, **kwargs)
            self.hit(key + ANSWERED)
            return result

        def traced_command(connection: Any, query: Any, *args: Any) -> Generator[Any, Any, Any]:
            key = _statement(query)
            self.hit(key)
            result = yield from command(connection, query, *args)
            self.hit(key + ANSWERED)
            return result

        psycopg.Cursor.execute = traced_execute  # type: ignore[assignment, method-assign]
        psycopg.Connection._exec_command = traced_command  # type: ignore[assignment, method-assign]

    def remove(self) -> None:
        """Trace no more, in this thread."""
        sys.settrace(None)

    def hit(self, key: str) -> None:
        """Pass a point."""
        if self.kill is None:
            self.passed.append(key)
            return
        self._counts[key] += 1
        if key == self.kill[0] and self._counts[key] == self.kill[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename in TRACED else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.hit(f"{TRACED[frame.f_code.co_filename]}.py:{frame.f_lineno}")
        return self._line


def numbered(passed: Iterable[str]) -> list[Point]:
    """Give every point that was passed with its occurrence."""
    counts: Counter[str] = Counter()
    points = []
    for key in passed:
        counts[key] += 1
        points.append((key, counts[key]))
    return points


def sample(points: Mapping[str, Sequence[Point]], extra: int, every: int = 1) -> dict[str, list[Point]]:
    """
    Choose points by scenario: the distinct statements and lines once, at a random one of their occurrences, and more.

    Args:
        points: What the scenarios pass.
        extra: How many more of each scenario.
        every: Which of the distinct lines: every so many-th.
    """
    chooser = random.Random(0)  # the same sample in each run
    places: dict[str, list[tuple[str, Point]]] = {}
    for scenario, passed in points.items():
        for point in passed if scenario != SLOW else [point for point in passed if point[0] not in places]:
            places.setdefault(point[0], []).append((scenario, point))
    lines = [key for key in places if ".py:" in key]
    left_out = set(lines) - set(lines[::every])
    chosen = {chooser.choice(same) for key, same in places.items() if key not in left_out}
    for scenario, passed in points.items():
        chosen.update((scenario, point) for point in chooser.sample(passed, min(extra, len(passed))))
    return {scenario: [point for point in passed if (scenario, point) in chosen] for scenario, passed in points.items()}


def within(points: Iterable[Point], files: str) -> list[Point]:
    """Give the statements, and the lines of those files whose names, comma-separated, are given; all if none is."""
    names = tuple(f"{name}.py:" for name in files.split(",") if name)
    return [point for point in points if not names or ".py:" not in point[0] or point[0].startswith(names)]


def forked(body: Callable[[], object], *, seconds: int = CHILD_SECONDS) -> int:
    """Run a body in a forked child and give its wait status; an exception ends it with 1, on stderr."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(seconds)
            body()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def answer_of(body: Callable[[], Any], path: Path, *, seconds: int = CHILD_SECONDS) -> Any:
    """Run a body in a forked child and give what it returned, as JSON."""
    status = forked(lambda: path.write_text(json.dumps(body()), encoding="utf-8"), seconds=seconds)
    if status:
        msg = f"the child of {path.name} ended with status {status}"
        raise RuntimeError(msg)
    return json.loads(path.read_text(encoding="utf-8"))


class Sweep:
    """
    Kill one scenario at many points.

    Args:
        scenario: Its name.
        places: Where its stores are made.
        fresh: Whether each kill gets a store that does not exist yet, so that its making is swept too; then another process
            works with what the killed one made.
    """

    def __init__(self, scenario: str, places: Places, *, fresh: bool = False) -> None:
        self.scenario = scenario
        self.places = places
        self.fresh = fresh
        self.killed = self.missed = self.spans = self.attempts = 0
        self.failures: list[str] = []
        self._stores = 0

    def _use(self) -> Place:
        place = self.places.new(f"{self.scenario}-{self._stores}")
        self._stores += 1
        place.use()
        if not self.fresh:
            forked(lambda: stores.make(place.url))
        return place

    def run(self, ledger: Path, name: str, kill: Point | None) -> list[str]:
        """Run the scenario in this process, to the end or to its kill, and give the points that it passed."""
        points = Points(kill)
        points.install()
        group_commit.SLICE_SECONDS = 0.02  # how long an attempt at the least waits where a scenario locks the store
        SCENARIOS[self.scenario](Ledger.at(ledger, name))
        otelexec.shutdown()
        points.remove()
        return points.passed

    def dry_run(self) -> list[Point]:
        """Give every point that the scenario passes."""
        place = self._use()
        if not self.fresh:
            forked(lambda: self.run(place.ledger, "w", None))
        passed = answer_of(lambda: self.run(place.ledger, "d", None), self.places.folder / f"{self.scenario}.json")
        self.verify(place, drain_first=False)
        return numbered(passed)

    def sweep(self, points: Sequence[Point]) -> None:
        """Kill at each point; verify after each batch."""
        size = 1 if self.fresh else BATCH
        for start in range(0, len(points), size):
            place = self._use()
            if not self.fresh:
                forked(lambda: self.run(place.ledger, "w", None))  # noqa: B023 (called at once)
            for number, point in enumerate(points[start : start + size]):
                status = forked(lambda: self.run(place.ledger, f"k{number}", point))  # noqa: B023 (called at once)
                if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                    self.killed += 1
                elif status == 0:
                    self.missed += 1
                else:
                    self.failures.append(f"{self.scenario} at {point}: the child ended with status {status}")
            if self.fresh:
                forked(lambda: self.run(place.ledger, "w", None))  # noqa: B023 (called at once)
            self.verify(place, drain_first=bool(self._stores % 2), near=points[start : start + size])

    def verify(self, place: Place, *, drain_first: bool, near: Sequence[Point] = ()) -> None:
        """Reconcile and drain in a child, and hold the records, the spans and the ledger against each other."""

        def check() -> dict[str, Any]:
            delivered = settle(place, drain_first=drain_first)
            found = disagreements(place, delivered)
            return {"failures": found.failures, "spans": len(delivered), "attempts": found.attempts}

        try:
            answer = answer_of(check, place.ledger.with_suffix(".json"))
        except RuntimeError as error:
            self.failures.append(f"{place.name}: {error}")
            return
        self.spans += answer["spans"]
        self.attempts += answer["attempts"]
        for failure in answer["failures"]:
            where = re.search(r"\bk(\d+)", failure)
            point = near[int(where.group(1))] if where and int(where.group(1)) < len(near) else ""
            self.failures.append(f"{place.name} {point}: {failure}")
        if not answer["failures"]:
            self.places.remove(place)


def main() -> int:
    """Sweep a share of the points of some scenarios and print what was seen as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance.killing")
    parser.add_argument("folder", type=Path)
    parser.add_argument("scenarios", nargs="+", choices=sorted(SCENARIOS))
    parser.add_argument("--share", default="0/1", help="i/n: every n-th point from the i-th on")
    parser.add_argument("--extra", type=int, default=0, help="points of each scenario beside one for each distinct line; -1 takes all")
    parser.add_argument("--every", type=int, default=1, help="which of the distinct lines: every so many-th")
    parser.add_argument("--fresh", action="store_true", help="each kill in a store that does not exist yet")
    parser.add_argument("--within", default="", help="only lines of these files, for example lifecycle,store/sql")
    parser.add_argument("--server", help="a PostgreSQL server's URL with a role that may make databases; without it, SQLite files")
    chosen = parser.parse_args()
    places = Places(chosen.folder, chosen.server)
    gc.freeze()  # else each child's first collection copies the whole heap
    started = time.monotonic()
    sweeps = {name: Sweep(name, places, fresh=chosen.fresh) for name in chosen.scenarios}
    points = {name: within(sweep.dry_run(), chosen.within) for name, sweep in sweeps.items()}
    wanted = points if chosen.extra < 0 else sample(points, chosen.extra, chosen.every)
    share, shares = map(int, chosen.share.split("/"))
    seconds = {}
    for name, sweep in sweeps.items():
        begun = time.monotonic()
        sweep.sweep(wanted[name][share::shares])
        seconds[name] = round(time.monotonic() - begun, 1)
    keys = {key for passed in points.values() for key, _ in passed}
    report = {
        "points": {name: len(passed) for name, passed in points.items()},
        "lines": sum(".py:" in key for key in keys),
        "statements": sum(".py:" not in key for key in keys),
        **{count: sum(getattr(sweep, count) for sweep in sweeps.values()) for count in ("killed", "missed", "attempts", "spans")},
        "seconds": seconds | {"all": round(time.monotonic() - started, 1)},
        "failures": [failure for sweep in sweeps.values() for failure in sweep.failures],
    }
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
