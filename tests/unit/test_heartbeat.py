"""The background thread, when something in it fails that nobody expected, or takes long."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial

import pytest

import otelexec
from otelexec import runtime
from otelexec.errors import StoreUnavailable
from otelexec.heartbeat import REST_SECONDS, HeartbeatThread
from otelexec.store.rows import Cancellation
from otelexec.store.spool import Spool
from otelexec.store.sqlite import SqliteStore
from otelexec.store.writes import RequestCancel, Write
from tests.records import Records, until


def test_a_defect_in_every_round_is_said_once_and_does_not_keep_a_core_busy(
    records: Records, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rounds: list[float] = []
    failing = True

    def look(*_: object, **__: object) -> None:
        rounds.append(time.monotonic())
        if failing:
            raise RuntimeError("nobody expected this")

    monkeypatch.setattr(HeartbeatThread, "_look_after_executions", look)
    otelexec.execution("job")(lambda: None)()
    heartbeat = runtime.get().heartbeat
    heartbeat.nudge()
    until(lambda: len(rounds) >= 3, 30)
    assert rounds[2] - rounds[0] >= 2 * REST_SECONDS
    assert _errors(caplog) == 1
    failing = False
    until(lambda: len(rounds) >= 6, 30)
    failing = True
    until(lambda: _errors(caplog) == 2, 30)
    heartbeat.stop(30)


def test_a_store_that_can_t_be_read_is_asked_no_more_often_than_else(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[float] = []

    def unreadable(*_: object) -> None:
        rounds.append(time.monotonic())
        raise StoreUnavailable("down")

    monkeypatch.setattr(SqliteStore, "cancellations", unreadable)
    otelexec.configure(heartbeat_seconds=1, cancel_poll_seconds=60, relay=False, reconcile=False)
    with otelexec.execution("job"):
        until(lambda: len(rounds) >= 3, 30)
    assert rounds[2] - rounds[1] > 0.9


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What an outage of hours has left, which takes minutes to take in: here until the event that this gives is set."""
    over = threading.Event()

    def ingest(_: Spool, commit: Callable[[Sequence[Write]], object], *__: object) -> int:
        while not over.wait(0.01):
            commit([])
        return 0

    monkeypatch.setattr(Spool, "ingest", ingest)
    yield over
    over.set()


@pytest.mark.parametrize("spooling", [True, False])
def test_neither_signs_of_life_nor_cancellations_wait_for_an_ingestion(records: Records, endless: threading.Event, spooling: bool) -> None:
    """Other hosts would call a process lost that says nothing for a lease."""
    otelexec.configure(
        heartbeat_seconds=0.05, cancel_poll_seconds=0.05, relay=False, reconcile=not spooling, reconcile_interval_seconds=0.05
    )
    with otelexec.execution("job") as run, closing(SqliteStore(records.path)) as other:
        own = runtime.get()
        own.journal.spooling = spooling
        own.heartbeat.nudge()

        def alive_after(unix_ns: int) -> bool:
            return other.processes()[0].heartbeat_unix_ns > unix_ns

        for _ in range(3):
            until(partial(alive_after, other.processes()[0].heartbeat_unix_ns), 30)
        other.commit([RequestCancel(run.id, Cancellation(time.time_ns(), terminate=None))], durable=False, timeout_seconds=5)
        until(lambda: run.cancel_requested, 30)
        endless.set()


def test_an_ingestion_keeps_no_process_from_its_end(records: Records, endless: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    otelexec.configure(exit_timeout_seconds=0.2, relay=False, reconcile=False)
    otelexec.execution("job")(lambda: None)()
    own = runtime.get()
    own.journal.spooling = True
    own.heartbeat.nudge()
    ending = threading.Thread(target=otelexec.shutdown)
    ending.start()
    ending.join(20)
    assert not ending.is_alive()
    assert not caplog.records


def _errors(caplog: pytest.LogCaptureFixture) -> int:
    return len([record for record in caplog.records if record.levelno == logging.ERROR and "heartbeat.failed" in record.message])
