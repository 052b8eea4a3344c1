"""
`otelexec reconcile --once` and `otelexec relay --drain`, each killed at its n-th line or SQL statement, and run again.

`python -m tests.acceptance.repairing` makes one store that killed processes of every kind left behind, spool included,
and lets the command start from a copy of it for each kill.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from otelexec import cli
from otelexec.cli import reconciling, relaying  # noqa: F401 (imported here once, and not in every child that is killed)
from otelexec.decoded import decode
from otelexec.store import group_commit
from tests import stores
from tests.acceptance.agreement import disagreements, settle
from tests.acceptance.collector import Collected, collecting
from tests.acceptance.killing import Point, Points, Sweep, answer_of, forked, numbered, sample, within
from tests.acceptance.scenarios import SCENARIOS, Ledger
from tests.stores import Place, Places

COMMANDS: Final = {"reconcile": ["reconcile", "--once"], "relay": ["relay", "--drain", "--timeout", "20"]}
REAL_EVERY: Final = 6
"""After every so many kills the real commands finish the work; in between the functions behind them do, which is faster."""

LEFT_BY: Final = ("nested", "children", "messages", "tasks")
"""Scenarios of which one process ended well and one was killed: more rows would only repeat the same lines."""


class Repair:
    """
    Kill one command at many points.

    Args:
        command: Its name in `COMMANDS`.
        places: Where its stores are made.
        collected: The endpoint.
    """

    def __init__(self, command: str, places: Places, collected: Collected) -> None:
        self.command = command
        self.places = places
        self.collected = collected
        self.killed = self.missed = self.spans = self.attempts = self.repeated = 0
        self.failures: list[str] = []
        self._template = places.new("template")
        self._copy: Place | None = None
        self._answers = places.folder / "answer.json"

    def leave_behind(self) -> None:
        """Let processes of every kind be killed in the middle of their work, and others end well."""
        chooser = random.Random(1)
        for name in LEFT_BY:
            sweep, ledger = Sweep(name, self.places), self._template.ledger
            self._template.use()
            passed = answer_of(lambda: sweep.run(ledger, f"{name}-", None), self._answers)  # noqa: B023 (called at once)
            point = chooser.choice(numbered(passed)[len(passed) // 3 :])
            forked(lambda: sweep.run(ledger, f"{name}-killed-", point))  # noqa: B023 (called at once)
        forked(self._spool_and_die)

    def _spool_and_die(self) -> None:
        """End an execution in the spool and begin another one there, while somebody else has the store locked."""
        group_commit.SLICE_SECONDS = 0.02
        os.environ.update(OTELEXEC_OPEN_TIMEOUT_SECONDS="0.02", OTELEXEC_FINALIZE_TIMEOUT_SECONDS="0.02")
        with stores.locked(self._template.url):
            ledger = Ledger.at(self._template.ledger, "homeless-")
            SCENARIOS["nested"](ledger)
            SCENARIOS["children"](ledger.part("c-"))
            os.kill(os.getpid(), signal.SIGKILL)

    def _run(self, command: str, kill: Point | None = None, *, traced: bool = False) -> list[str]:
        self._place.use()
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = self.collected.endpoint
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
        points = Points(kill)
        if traced:
            points.install()
        code = cli.main(COMMANDS[command])
        points.remove()
        if code:
            msg = f"{command} ended with {code}"
            raise RuntimeError(msg)
        return points.passed

    @property
    def _place(self) -> Place:
        assert self._copy is not None
        return self._copy

    def _start_anew(self) -> None:
        if self._copy is not None:
            self.places.remove(self._copy)
        self._copy = self.places.copy(self._template, "copy")
        self.collected.news()

    def dry_run(self) -> list[Point]:
        """Give every point that the command passes."""
        self._start_anew()
        if self.command == "relay":
            forked(lambda: self._run("reconcile"))
        points = numbered(answer_of(lambda: self._run(self.command, traced=True), self._answers))
        self._finish_and_verify("dry run", {})
        return points

    def sweep(self, points: Sequence[Point]) -> None:
        """Kill at each point, run both commands again in either order, and verify."""
        for number, point in enumerate(points):
            self._start_anew()
            if self.command == "relay" and number % 2:
                forked(lambda: self._run("reconcile"))
            status = forked(lambda: self._run(self.command, point, traced=True))  # noqa: B023 (called at once)
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                self.killed += 1
            elif status == 0:
                self.missed += 1
            else:
                self.failures.append(f"{self.command} at {point}: it ended with status {status}")
            claimed = Counter(answer_of(self._claimed, self._answers))
            self._finish_and_verify(str(point), claimed, number=number)

    def _claimed(self) -> list[str]:
        rows = stores.rows(self._place.url, "SELECT request FROM outbox JOIN claim USING (id)")
        return [span.span_id for (request,) in rows for span in decode(request)]

    def _finish_and_verify(self, where: str, claimed: Mapping[str, int], *, number: int = 0) -> None:
        real = number % REAL_EVERY == 0
        if real:
            for command in ("reconcile", "relay") if number % 2 else ("relay", "reconcile", "relay"):
                if forked(lambda: self._run(command)):  # noqa: B023 (called at once)
                    self.failures.append(f"{where}: {command} failed afterwards")
        accepted = self.collected.news()
        place = self._place

        def check() -> dict[str, Any]:
            delivered = accepted if real else accepted + settle(place, drain_first=bool(number % 2))
            found = disagreements(place, delivered, repeats=claimed)
            again = len(delivered) - len({span.span_id for span in delivered})
            return {"failures": found.failures, "attempts": found.attempts, "spans": len(delivered), "repeated": again}

        answer = answer_of(check, self._answers)
        self.failures += [f"{self.command} at {where}: {failure}" for failure in answer["failures"]]
        self.attempts += answer["attempts"]
        self.spans += answer["spans"]
        self.repeated += answer["repeated"]


def main() -> int:
    """Sweep a command's points and print what was seen as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance.repairing")
    parser.add_argument("folder", type=Path)
    parser.add_argument("command", choices=sorted(COMMANDS))
    parser.add_argument("--extra", type=int, default=0, help="points beside one for each distinct line and statement")
    parser.add_argument("--every", type=int, default=1, help="which of the distinct lines: every so many-th")
    parser.add_argument("--statements", action="store_true", help="every passage of every statement as well")
    parser.add_argument("--within", default="", help="only lines of these files, for example reconcile,store/sql")
    parser.add_argument("--server", help="a PostgreSQL server's URL with a role that may make databases; without it, SQLite files")
    chosen = parser.parse_args()
    gc.freeze()
    started = time.monotonic()
    with collecting(chosen.folder / "collected") as collected:
        repair = Repair(chosen.command, Places(chosen.folder, chosen.server), collected)
        repair.leave_behind()
        points = within(repair.dry_run(), chosen.within)
        wanted = set(sample({"": points}, chosen.extra, chosen.every)[""])
        if chosen.statements:
            wanted.update(point for point in points if ".py:" not in point[0])
        repair.sweep([point for point in points if point in wanted])
    counts = ("killed", "missed", "attempts", "spans", "repeated", "failures")
    report = {"points": len(points), "statements": sum(".py:" not in key for key, _ in points)}
    report |= {count: getattr(repair, count) for count in counts}
    sys.stdout.write(json.dumps(report | {"seconds": round(time.monotonic() - started, 1)}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
