"""Work that goes on while its store is in trouble, and what must be in the store afterwards."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import otelexec
from otelexec import runtime
from otelexec.store import spool as spool_module
from otelexec.store.writes import Write
from tests.records import Records, until

OPEN, FINALIZE = 0.5, 1.0
SLACK = 1.5
"""How much longer than its timeout a step may take on a busy machine; far below the waits that would show a fault."""


class Boom(Exception):
    pass


@dataclass
class Work:
    """Runs executions and remembers how long each took."""

    seconds: list[float] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def run(self, name: str, error: Exception | None = None) -> None:
        """Run one; what comes out of it must be what the function gave."""
        value = object()

        @otelexec.execution(name)
        def function() -> object:
            if error is not None:
                raise error
            return value

        self.names.append(name)
        started = time.monotonic()
        if error is None:
            assert function() is value
        else:
            with pytest.raises(Boom) as raised:
                function()
            assert raised.value is error
        self.seconds.append(time.monotonic() - started)


def at_home() -> bool:
    return not runtime.get().homeless


def spooled(folder: Path) -> list[Write]:
    """Give what waits in a spool, the oldest first."""
    segments = sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    lines = [line for path in segments for line in path.read_bytes().splitlines()]
    return [spool_module.decode(line.partition(b" ")[2].decode()) for line in lines]


def check_all_in(store: Path | str, names: list[str], failed: set[str]) -> None:
    """Check that everything is in the store, once, in order, record and span alike."""
    until(at_home)
    records = Records(store)
    assert [record.name for record in records.all()] == names
    assert {record.name for record in records.all() if record.state == "failed"} == failed
    assert {record.state for record in records.all()} <= {"succeeded", "failed"}
    assert all(len(record.attempts) == 1 for record in records.all())
    assert Counter(span.name for span in records.spans()) == dict.fromkeys(names, 1)
    records.check_agreement()
    records.close()


def assert_nobody_waited(seconds: Sequence[float]) -> None:
    """Check that executions did not wait for the store; single ones may be slow, since a noisy machine's fsync is."""
    assert sum(seconds) < len(seconds) * OPEN / 2
    assert sorted(seconds)[len(seconds) // 2] < OPEN / 4


def run_in_trouble(work: Work) -> None:
    """Run three executions while the store is down: the first two steps may wait their time, then nobody waits."""
    work.run("first in trouble")
    assert work.seconds[-1] < OPEN + FINALIZE + SLACK
    for number in range(20):
        work.run(f"waits no more {number}", Boom("mine") if number == 7 else None)
    assert_nobody_waited(work.seconds[-20:])
