"""Concurrent finalizers of one attempt: one wins, the others are told who, and the span says what the row says."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import otelexec
from otelexec import runtime
from otelexec.endings import Ending
from otelexec.freeze import freeze
from otelexec.running import RunningExecution
from otelexec.store import spool
from otelexec.store.writes import CloseAttempt, Closed
from tests.records import Records, until

_DELUDED = """
import sys
from pathlib import Path
from otelexec import identity
from otelexec.reconcile import Reconciler
from otelexec.store.spool import Spool
from otelexec.store.sqlite import SqliteStore

identity.liveness = lambda process, now: "dead"
store = SqliteStore(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
done = Reconciler(store, Spool(store.spool_folder, lambda: None)).run_once()
print(done.attempts, flush=True)
"""
"""A reconciler that takes every process for dead: what a paused machine or a lapsed lease makes of one that lives."""

_RACER = """
import json, sys
from pathlib import Path
from otelexec.store import spool
from otelexec.store.sqlite import SqliteStore

store = SqliteStore(Path(sys.argv[1]))
closes = [spool.decode(line) for line in Path(sys.argv[2]).read_text().splitlines()]
print("ready", flush=True)
for number, close in enumerate(closes):
    if number < 2:
        sys.stdin.readline()
    (answer,) = store.commit([close], durable=False, timeout_seconds=20)
    print(json.dumps([answer.won, answer.state, answer.finalized_by, answer.number]), flush=True)
"""


class Boom(Exception):
    pass


class Helper:
    """A process that waits until it is told to go, and then does one thing."""

    def __init__(self, script: str, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def line(self) -> str:
        """Give the next thing that it printed."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def lines(self) -> list[str]:
        """Give what it printed, once it has ended."""
        out, _ = self._process.communicate(timeout=60)
        assert self._process.returncode == 0
        return out.splitlines()


def think_dead(path: Path) -> None:
    """Let a reconciler close everything that this living process has open."""
    helper = Helper(_DELUDED, path)
    helper.go()
    assert int(helper.lines()[0]) == 1


@pytest.fixture
def path(tmp_path: Path, isolated: None) -> Path:
    otelexec.configure(open_timeout_seconds=0.3, finalize_timeout_seconds=0.8, cancel_poll_seconds=0.05)
    return tmp_path / "store.db"


def a_close(execution: RunningExecution, state: str, who: str) -> CloseAttempt:
    """Give a close of this attempt as another finalizer would make it, with a span that says the same."""
    frozen = freeze(execution, Ending(state), time.time_ns())
    frozen = replace(frozen, outcome=replace(frozen.outcome, finalized_by=who))
    return CloseAttempt(execution.attempt_row, execution.number, frozen, f"nonce of {who}")


@contextlib.contextmanager
def opened(count: int) -> Iterator[list[RunningExecution]]:
    """Open attempts whose own code ends only after the race, and then loses."""
    with contextlib.ExitStack() as stack:
        executions = [stack.enter_context(otelexec.execution(f"job {number}"))._execution for number in range(count)]
        assert [execution.number for execution in executions] == [1] * count
        yield executions


def check_winners(path: Path, answers: Sequence[Sequence[tuple[bool, str, str, int]]]) -> list[str]:
    """Check per attempt that at most one of these finalizers won, and that each was told who did."""
    reader = Records(path)
    winners: list[str] = []
    for number, record in enumerate(reader.all()):
        (attempt,) = record.attempts
        assert attempt.finalized_by is not None
        mine = [told[number] for told in answers]
        assert {told[1:] for told in mine} == {(attempt.state, attempt.finalized_by, 1)}
        assert sum(told[0] for told in mine) == (0 if attempt.finalized_by in ("reconciler", "executor") else 1)
        winners.append(attempt.finalized_by)
    assert Counter(span.span_id for span in reader.spans() if "otelexec.observed_of" not in span.attributes) == dict.fromkeys(
        (record.attempts[0].span_id for record in reader.all()), 1
    )
    reader.check_agreement()
    reader.close()
    return winners


def test_of_several_threads_one_wins_and_the_others_are_told_who(path: Path) -> None:
    states = ("failed", "timed_out", "rejected", "cancelled", "paused", "succeeded")
    told: list[list[tuple[bool, str, str, int]]] = [[] for _ in states]
    with opened(15) as executions:
        closes = [[a_close(execution, state, f"thread {place}") for execution in executions] for place, state in enumerate(states)]
        gate = threading.Barrier(len(states))

        def race(place: int) -> None:
            gate.wait()
            for close in closes[place]:
                answer = runtime.get().journal.group.commit(close, timeout_seconds=20)
                assert isinstance(answer, Closed)
                told[place].append((answer.won, answer.state, answer.finalized_by, answer.number))

        threads = [threading.Thread(target=race, args=(place,)) for place in range(len(states))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    winners = check_winners(path, told)
    assert len(winners) == 15


def test_of_processes_and_a_reconciler_one_wins_and_the_others_are_told_who(path: Path, tmp_path: Path) -> None:
    count = 40
    with opened(count) as executions:
        reconciler = Helper(_DELUDED, path)
        racers: list[Helper] = []
        starts = (0, 13, 26)
        for place, state in enumerate(("failed", "timed_out", "succeeded")):
            lines = tmp_path / f"closes {place}"
            order = executions[starts[place] :] + executions[: starts[place]]
            lines.write_text("\n".join(spool.encode(a_close(execution, state, f"process {place}")) for execution in order))
            racers.append(Helper(_RACER, path, lines))
        for racer in racers:
            racer.go()
        told = [[tuple(json.loads(racer.line()))] for racer in racers]  # each has won one
        for helper in (*racers, reconciler):
            helper.go()
        for place, racer in enumerate(racers):
            answers = told[place] + [tuple(json.loads(line)) for line in racer.lines()]
            told[place] = answers[count - starts[place] :] + answers[: count - starts[place]]
        reconciler.lines()
    winners = check_winners(path, told)
    assert {"process 0", "process 1", "process 2"} <= set(winners)


def test_the_attempts_own_process_is_told_that_it_lost(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = tmp_path / "close"
    with otelexec.execution("job") as execution:
        lines.write_text(spool.encode(a_close(execution._execution, "failed", "parent")))
        helper = Helper(_RACER, path, lines)
        helper.go()
        assert json.loads(helper.lines()[0]) == [True, "failed", "parent", 1]
    assert "otelexec.finalize.lost_race" in caplog.text
    assert f"execution {execution.id} attempt 1 is failed already, recorded by parent; this attempt ended succeeded" in caplog.text
    reader = Records(path)
    assert reader.attempt().state == "failed"
    assert [span.attributes["otelexec.outcome"] for span in reader.spans()] == ["failed"]
    reader.check_agreement()
    reader.close()


@pytest.mark.parametrize("way", ["store", "spool"])
@pytest.mark.parametrize("error", [None, Boom("mine")])
def test_what_a_lost_attempt_observed_is_recorded_beside_with_a_span_of_its_own(
    path: Path, way: str, error: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)

    @otelexec.execution("job")
    def job() -> str:
        think_dead(path)
        if way == "spool":
            blocker.execute("BEGIN EXCLUSIVE")
        if error is not None:
            raise error
        return "mine"

    with otelexec.execution("makes the file"):
        pass
    blocker = sqlite3.connect(path, isolation_level=None)
    if error is None:
        assert job() == "mine"
    else:
        with pytest.raises(Boom) as raised:
            job()
        assert raised.value is error
    if way == "spool":
        assert runtime.get().journal.homeless
        blocker.execute("ROLLBACK")
    blocker.close()
    until(lambda: not runtime.get().journal.homeless)
    reader = Records(path)
    record = reader.named("job")
    (attempt,) = record.attempts
    assert (record.state, attempt.state, attempt.finalized_by) == ("lost", "lost", "reconciler")
    assert attempt.observed is not None
    observed = json.loads(attempt.observed)
    assert observed["state"] == ("succeeded" if error is None else "failed")
    assert observed["error_message"] == (None if error is None else "mine")
    first, second = (span for span in reader.spans() if span.name == "job")
    assert (first.span_id, first.attributes["otelexec.outcome"]) == (attempt.span_id, "lost")
    assert (second.span_id, second.trace_id) == (observed["span_id"], first.trace_id)
    assert second.span_id != first.span_id
    assert second.attributes["otelexec.outcome"] == observed["state"]
    assert second.attributes["otelexec.observed_of"] == first.span_id
    assert [(link.trace_id, link.span_id) for link in second.links] == [(first.trace_id, first.span_id)]
    assert second.end_unix_ns == observed["ended_unix_ns"]
    reader.check_agreement()
    reader.close()


def test_what_was_spooled_before_the_process_died_is_no_loss(path: Path) -> None:
    """The reconciler reads the spool before it closes anything, so an observed outcome is never called lost."""
    script = """
import os, sqlite3, signal
import otelexec
from otelexec import runtime

otelexec.configure(open_timeout_seconds=0.2, finalize_timeout_seconds=0.2, cancel_poll_seconds=30)
with otelexec.execution("makes the file"):
    pass
blocker = sqlite3.connect(runtime.get().store.path, isolation_level=None)
with otelexec.execution("job"):
    blocker.execute("BEGIN EXCLUSIVE")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == -9
    done = subprocess.run([sys.executable, "-m", "otelexec", "reconcile", "--once"], check=False, timeout=60, capture_output=True)
    assert done.returncode == 0
    reader = Records(path)
    assert (reader.named("job").state, reader.named("job").attempts[0].finalized_by) == ("succeeded", "spool")
    assert Counter(span.name for span in reader.spans()) == {"makes the file": 1, "job": 1}
    reader.check_agreement()
    reader.close()
