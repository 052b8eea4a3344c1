"""The background thread, when something in it fails that nobody expected."""

from __future__ import annotations

import logging
import time

import pytest

import otelexec
from otelexec import runtime
from otelexec.errors import StoreUnavailable
from otelexec.heartbeat import REST_SECONDS, HeartbeatThread
from otelexec.store.sqlite import SqliteStore
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


def _errors(caplog: pytest.LogCaptureFixture) -> int:
    return len([record for record in caplog.records if record.levelno == logging.ERROR and "heartbeat.failed" in record.message])
