"""Pause and resume: one execution over many attempts, with what each leaves for the next."""

# ruff: noqa: PT012, SIM117 (blocks are ended by what is tested)

from __future__ import annotations

import pytest

import otelexec
from tests.records import Records


def step(execution_id: str, *, snapshot: object = None, reason: str | None = None, timeout: float | None = None) -> otelexec.Execution:
    with otelexec.correlate(source="workflow", workflow_id="wf", execution_id=execution_id, request_id="r"):
        with otelexec.execution("flow", timeout=timeout) as run:
            if reason is not None:
                run.pause(reason, snapshot=snapshot)
    return run


def test_a_pause_is_resumable_and_not_terminal(records: Records) -> None:
    """Behaviours 5 and 30: with or without a snapshot the record says that it goes on, and why it waits."""
    step("e", reason="approval", snapshot={"at": 3})
    record, attempt = records.one(), records.attempt()
    assert (record.state, record.ended_unix_ns) == ("paused", None)
    assert (attempt.state, attempt.classification) == ("paused", "approval")
    assert records.span(attempt.span_id).status == "unset"


def test_a_resume_is_a_new_attempt_with_the_snapshot_the_ids_and_a_fresh_deadline(records: Records) -> None:
    """Behaviours 31 and 32."""
    step("e", reason="approval", snapshot={"at": 3}, timeout=60)
    resumed = step("e", timeout=60)
    assert (resumed.id, resumed.attempt, resumed.snapshot) == ("e", 2, {"at": 3})
    record = records.one()
    assert (record.state, record.request_id, record.correlation) == ("succeeded", "r", '{"workflow_id": "wf"}')
    first, second = record.attempts
    assert second.deadline_unix_ns is not None
    assert first.deadline_unix_ns is not None
    assert second.deadline_unix_ns == second.started_unix_ns + 60_000_000_000
    assert second.deadline_unix_ns > first.deadline_unix_ns
    assert first.span_id != second.span_id


def test_repeated_pauses_stay_one_execution(records: Records) -> None:
    """Behaviour 33."""
    for number in range(5):
        run = step("e", reason="again", snapshot=[number])
        assert run.attempt == number + 1
        assert records.one().state == "paused"
    assert step("e").snapshot == [4]
    assert [attempt.state for attempt in records.one().attempts] == ["paused"] * 5 + ["succeeded"]


@pytest.mark.parametrize("snapshot", [object(), float("nan"), "x" * 70_000], ids=["object", "nan", "large"])
def test_a_snapshot_that_can_t_be_stored_fails_the_attempt_with_the_reason(records: Records, snapshot: object) -> None:
    """Behaviour 30: a pause that can't be resumed must not look like one that can."""
    step("e", reason="approval", snapshot=snapshot)
    attempt = records.attempt()
    assert (attempt.state, attempt.classification) == ("failed", "snapshot_not_stored")
    assert attempt.error_message is not None
    assert "snapshot" in attempt.error_message
    assert records.one().state == "failed"


def test_a_body_that_raises_after_a_pause_has_failed(records: Records) -> None:
    with pytest.raises(ValueError, match="x"), otelexec.execution("flow") as run:
        run.pause("approval", snapshot=1)
        raise ValueError("x")
    assert records.one().state == "failed"


def test_the_last_pause_counts(records: Records) -> None:
    with otelexec.correlate(source="x", execution_id="e"), otelexec.execution("flow") as run:
        run.pause("first", snapshot=object())
        run.pause("second", snapshot=2)
    assert (records.attempt().state, records.attempt().classification) == ("paused", "second")
    assert step("e").snapshot == 2


def test_success_takes_the_snapshot_away(records: Records) -> None:
    step("e", reason="approval", snapshot={"secret": 1})
    step("e")
    assert records.one().snapshot is None
    assert step("e").snapshot is None
