"""A parent process accepts for its children, reports their deaths, and passes terminations on."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from opentelemetry import trace
from opentelemetry.context import Context

import otelexec
from otelexec import identity, runtime, supervision
from otelexec.carrier import NOTHING
from otelexec.endings import Ending
from otelexec.options import Options
from otelexec.propagation import incoming
from otelexec.reconcile import Reconciler
from otelexec.store.rows import CANCELLED, REJECTED, TIMED_OUT
from otelexec.store.writes import Heartbeat
from otelexec.supervision import Delivery, Supervisor
from tests.records import Records, until

CHILD = """
import os, signal, sys, time
from opentelemetry import context
from opentelemetry.context import Context
from otelexec import runtime
from otelexec.carrier import NOTHING
from otelexec.drivers import advance
from otelexec.options import Options
from otelexec.lifecycle import lifecycle
from otelexec.propagation import incoming
from otelexec.supervision import run_token

runtime.get().be_supervised()
context.attach(incoming(NOTHING, message_id=sys.argv[1], context=Context())[0])
steps = lifecycle(runtime.get(), Options("job", token=run_token(sys.argv[2], os.getpid()), accepted=True))
advance(runtime.get(), steps)
print("open", flush=True)
if sys.argv[3] == "close":
    advance(runtime.get(), steps)
os.kill(os.getpid(), signal.SIGKILL)
"""


def delivery(message_id: str = "m1", token: str = "t1", **options: object) -> Delivery:
    context, _ = incoming(NOTHING, message_id=message_id, context=Context())
    return Delivery(context, Options("job", kind=trace.SpanKind.CONSUMER, token=token, finalized_by="parent"), **options)  # type: ignore[arg-type]


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    made = Supervisor()
    yield made
    made.stop(10)


def run_child(supervisor: Supervisor, work: Delivery, what: str = "die") -> None:
    """Have a child work on a delivery until it kills itself, and tell the supervisor."""
    arguments = [sys.executable, "-c", CHILD, work.execution(runtime.get()).id, work.options.token or "", what]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as child:
        supervisor.started(child.pid, work)
        work.accept()
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        child.wait(20)
        supervisor.died(child.pid, child.returncode)


def test_a_killed_childs_attempt_is_lost_with_its_signal(records: Records, supervisor: Supervisor) -> None:
    work = delivery()
    run_child(supervisor, work)
    attempt = until(lambda: next((found for found in records.one().attempts if found.state != "running"), None), 15)
    assert attempt is not None
    assert (attempt.state, attempt.classification, attempt.finalized_by) == ("lost", "killed", "parent")
    assert "SIGKILL" in (attempt.error_message or "")
    supervisor.stop(10)
    assert [found.state for found in records.one().attempts] == ["lost"]
    assert records.span(attempt.span_id).attributes["otelexec.outcome"] == "lost"


def test_what_the_child_closed_stays(records: Records, supervisor: Supervisor) -> None:
    work = delivery()
    run_child(supervisor, work, "close")
    supervisor.stop(10)
    assert [(attempt.state, attempt.finalized_by) for attempt in records.one().attempts] == [("succeeded", "executor")]


@pytest.mark.parametrize("accepted", [True, False])
def test_a_child_that_dies_before_it_opens_the_attempt_leaves_one_all_the_same(
    records: Records, supervisor: Supervisor, accepted: bool
) -> None:
    work = delivery()
    with subprocess.Popen([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]) as child:
        supervisor.started(child.pid, work)
        if accepted:
            work.accept()
        child.wait(20)
    supervisor.died(child.pid, child.returncode)
    supervisor.stop(10)
    attempt = records.attempt()
    assert (attempt.state, attempt.classification) == ("lost", "killed")
    assert "SIGKILL" in (attempt.error_message or "")
    assert records.span(attempt.span_id).kind == "consumer"


def test_a_child_that_began_unheard_is_lost_and_the_next_ones_attempt_is_its_own(records: Records, supervisor: Supervisor) -> None:
    """A pool gives a job to another child when the first died before it was heard that it had begun."""
    work = delivery()
    arguments = [sys.executable, "-c", CHILD, "m1", "t1", "die"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as child:
        child.wait(20)
    supervisor.died(child.pid, child.returncode)
    run_child(supervisor, work, "close")
    supervisor.stop(10)
    assert [(attempt.state, attempt.classification) for attempt in records.one().attempts] == [("lost", "killed"), ("succeeded", None)]


def test_the_parent_knows_that_it_was_a_limit(records: Records, supervisor: Supervisor) -> None:
    work = delivery()
    work.ending = Ending(TIMED_OUT, "hard_limit", "TimeLimitExceeded", "stopped at 3 s")
    run_child(supervisor, work)
    supervisor.stop(10)
    attempt = records.attempt()
    assert (attempt.state, attempt.classification, attempt.error_message) == ("timed_out", "hard_limit", "stopped at 3 s")
    assert records.span(attempt.span_id).attributes["otelexec.outcome"] == "timed_out"


def test_what_never_reaches_a_child_has_its_record_and_its_span(records: Records) -> None:
    delivery("m1", "t1").close(Ending(REJECTED, "malformed", "malformed", "no list"))
    delivery("m2", "t2").close(Ending(CANCELLED), asked=True)
    first, second = records.all()
    assert (first.execution_id, first.state, second.state) == ("m1", "rejected", "cancelled")
    assert records.query("SELECT sticky FROM execution ORDER BY seq") == [(0,), (1,)]
    assert records.span(first.attempts[0].span_id).attributes["otelexec.classification"] == "malformed"


def test_a_wish_to_terminate_is_passed_on_once(records: Records, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTELEXEC_CANCEL_POLL_SECONDS", "0.05")
    stopped: list[int] = []
    work = delivery(stop=lambda: stopped.append(1))
    supervisor.started(os.getpid(), work)
    work.accept()
    otelexec.request_cancel("m1", terminate=True)
    until(lambda: stopped, 10)
    supervisor.ended(work)
    supervisor.stop(10)
    assert stopped == [1]
    work.close(Ending(CANCELLED), asked=True)


def test_a_child_that_has_just_begun_is_not_stopped_by_a_wish_that_it_sees_itself(
    records: Records, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses the work, and would be hit in the middle of the next one."""
    monkeypatch.setenv("OTELEXEC_CANCEL_POLL_SECONDS", "0.05")
    stopped: list[float] = []
    work = delivery(stop=lambda: stopped.append(time.monotonic()))
    otelexec.request_cancel("m1", terminate=True)
    supervisor.started(os.getpid(), work)
    begun = time.monotonic()
    until(lambda: stopped, 10)
    assert stopped[0] - begun > 0.9
    supervisor.ended(work)
    work.close(Ending(CANCELLED), asked=True)


def test_a_reconciler_leaves_a_supervised_child_to_its_living_parent(records: Records) -> None:
    work = delivery()
    work.accept()
    own = runtime.get()
    assert own.store is not None
    dead = replace(own.process, process_id="child", pid=2**22 - 1, parent_pid=os.getpid())
    living = replace(dead, parent_start=own.process.pid_start)
    attempt = replace(work.execution(own).attempt_row, takes_over=True, process_id="child")
    own.journal.write(Heartbeat(living))
    own.journal.write(attempt)
    reconciler = Reconciler(own.store, own.journal.spool, own=own.process_id)
    assert not reconciler.run_once()
    assert records.attempt().state == "running"
    # The parent is gone too: nobody is left who could say more.
    with sqlite3.connect(records.path) as connection:
        connection.execute("UPDATE process SET parent_start = 1 WHERE process_id = 'child'")
    connection.close()
    assert reconciler.run_once().attempts == 1
    assert records.attempt().state == "lost"


def test_a_supervised_process_neither_relays_nor_reconciles(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTELEXEC_RELAY", "true")
    own = runtime.get()
    own.be_supervised()
    assert (own.settings.relay, own.settings.reconcile) == (False, False)
    assert (own.process.parent_pid, own.process.parent_start) == identity.parent_of_this_process()
    assert identity.has_living_parent(own.process)


def test_only_the_kernels_latest_kills_explain_a_death(records: Records, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    kills = 5
    monkeypatch.setattr(supervision, "_count_oom_kills", lambda: kills)
    monkeypatch.setattr(supervision, "OOM_SECONDS", 3600.0)

    def classification(message_id: str) -> str | None:
        work = delivery(message_id, f"token-{message_id}")
        run_child(supervisor, work)
        execution_id = work.execution(runtime.get()).id
        until(lambda: all(record.ended_unix_ns is not None for record in records.all()), 15)
        (record,) = (record for record in records.all() if record.execution_id == execution_id)
        return record.attempts[0].classification

    assert classification("m1") == "killed"
    kills = 6
    assert classification("m2") == "oom"
    assert classification("m3") == "killed"  # one kill explains one death
    kills = 7  # of somebody else's, and long ago
    monkeypatch.setattr(supervision, "OOM_SECONDS", 0.0)
    until(lambda: supervisor._oom_kills._before == 7)
    assert classification("m4") == "killed"
