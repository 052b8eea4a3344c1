"""Work that goes on while its store is in trouble, and what must be in the store afterwards."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import otelexec
from otelexec import cli, runtime
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
    return not runtime.get().journal.homeless


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


SILENCE = 1.0
"""How long the store waits for an answer at the least, whatever its caller's timeout."""

HOME_SECONDS = 20.0


def configured(url: str, *, reachable: bool = True) -> Work:
    """
    Make the runtime for a store, with a heartbeat that finds out soon that it is back.

    Args:
        url: The store's.
        reachable: Whether to wait for a first connection, and for the schema, however slow the machine is.
    """
    otelexec.configure(
        store=url, open_timeout_seconds=OPEN, finalize_timeout_seconds=FINALIZE, cancel_poll_seconds=0.05, heartbeat_seconds=0.1
    )
    if reachable:
        store = runtime.get().store
        assert store is not None
        store.commit([], durable=True, timeout_seconds=HOME_SECONDS)
    return Work()


def home() -> None:
    until(at_home, HOME_SECONDS)


def said(capsys: pytest.CaptureFixture[str], url: str, *arguments: str) -> tuple[int, str]:
    """Run a command and give its exit status and all that it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTELEXEC_STORE", url)
        code = cli.main(list(arguments))
    out, errors = capsys.readouterr()
    assert "Traceback" not in errors
    return code, out + errors


ONE_EXECUTION = """
import sys, time
import otelexec
patience = 20 if sys.argv[2] == "patient" else 1
otelexec.configure(store=sys.argv[1], reconcile=False, relay=sys.argv[2] == "relay", open_timeout_seconds=patience)
with otelexec.execution("job"):
    pass
print("ran", flush=True)
"""
"""A program: one execution in the store of its first argument; `relay` and `patient` in the second."""
