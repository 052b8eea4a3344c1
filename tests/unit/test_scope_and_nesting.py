"""Which execution a call is: scopes hand out their id once, calls inside an execution are children."""

# ruff: noqa: PT012 (blocks are ended by what is tested)

from __future__ import annotations

import contextvars
import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import otelexec
from otelexec.store.records import ExecutionRecord
from tests.records import Records


@otelexec.execution("job")
def job() -> otelexec.Execution:
    current = otelexec.current_execution()
    assert isinstance(current, otelexec.Execution)
    return current


def test_the_first_execution_takes_the_scope_s_id_and_further_ones_mint(records: Records) -> None:
    with otelexec.correlate(source="webhook", webhook_id="wh_1", path="/p", provider="stripe") as correlation:
        first, second = job(), job()
    assert first.id == correlation.execution_id
    assert second.id != first.id
    assert second.correlation.request_id == first.correlation.request_id == correlation.request_id
    one, two = records.all()
    fields = {"webhook_id": "wh_1", "path": "/p", "provider": "stripe"}
    assert json.loads(one.correlation) == json.loads(two.correlation) == fields
    assert (one.source, one.parent_execution_id, two.parent_execution_id) == ("webhook", None, None)


@pytest.mark.parametrize(
    "scope",
    [lambda: otelexec.correlate(source="webhook", webhook_id="w"), lambda: otelexec.extract({}), lambda: otelexec.extract_headers({})],
)
def test_a_scope_may_be_left_in_another_context_than_it_was_entered_in(
    records: Records, caplog: pytest.LogCaptureFixture, scope: Callable[[], AbstractContextManager[object]]
) -> None:
    """As a dependency of FastAPI's is, which is entered in one thread and left in another."""
    opened = scope()
    contextvars.copy_context().run(opened.__enter__)
    contextvars.copy_context().run(opened.__exit__, None, None, None)
    assert not caplog.records


def test_inject_uses_the_scope_s_id_up(records: Records) -> None:
    with otelexec.correlate(source="x") as correlation:
        first = otelexec.inject({})
        second = otelexec.inject({})
        here = job()
    ids = []
    for payload in (first, second):
        with otelexec.extract(payload):
            ids.append(job().id)
    assert ids[0] == correlation.execution_id
    assert len({*ids, here.id}) == 3
    assert {record.request_id for record in records.all()} == {correlation.request_id}


def test_sent_inside_an_execution_is_always_a_new_child(records: Records) -> None:
    with otelexec.correlate(source="x"), otelexec.execution("sender") as sender:
        payload = otelexec.inject({})
    with otelexec.extract(payload):
        child = job()
    assert child.id != sender.id
    record = records.named("job")
    assert (record.parent_execution_id, record.request_id) == (sender.id, sender.correlation.request_id)


def test_inject_retry_keeps_the_running_id_and_makes_a_failure_retrying(records: Records) -> None:
    """Behaviour 45: a retry is the same execution, one attempt further."""
    payload: dict[str, object] = {}
    with otelexec.correlate(source="x", execution_id="e"), pytest.raises(ValueError, match="x"), otelexec.execution("job"):
        payload = otelexec.inject({}, retry=True)
        raise ValueError("x")
    assert (records.one().state, records.one().ended_unix_ns) == ("retrying", None)
    with otelexec.extract(payload):
        again = job()
    assert (again.id, again.attempt) == ("e", 2)
    assert (records.one().state, [attempt.state for attempt in records.one().attempts]) == ("succeeded", ["failed", "succeeded"])


def test_a_redelivery_in_a_new_scope_is_the_next_attempt(records: Records) -> None:
    payload = None
    with otelexec.correlate(source="x"):
        payload = otelexec.inject({})
    for _ in range(2):
        with pytest.raises(ValueError, match="x"), otelexec.extract(payload), otelexec.execution("job"):
            raise ValueError("x")
    assert [attempt.attempt for attempt in records.one().attempts] == [1, 2]
    assert len({attempt.trace_id for attempt in records.one().attempts}) == 2  # nothing was open where it was sent


def test_a_redelivery_after_success_is_called_and_marked_duplicate(records: Records) -> None:
    """Behaviours 24 and 26: an executor is never skipped silently, and the execution's state does not change."""
    with otelexec.correlate(source="x", execution_id="e"):
        job()
    ended = records.one().ended_unix_ns
    with otelexec.correlate(source="x", execution_id="e"):
        assert job()._execution.duplicate
    with pytest.raises(ValueError, match="x"), otelexec.correlate(source="x", execution_id="e"), otelexec.execution("job"):
        raise ValueError("x")
    record = records.one()
    assert (record.state, record.ended_unix_ns) == ("succeeded", ended)
    assert [(attempt.attempt, attempt.state, attempt.duplicate) for attempt in record.attempts] == [
        (1, "succeeded", False),
        (2, "succeeded", True),
        (3, "failed", True),
    ]
    assert records.span(record.attempts[1].span_id).attributes["otelexec.duplicate"] is True


def test_an_attempt_that_is_overtaken_does_not_move_the_state(records: Records) -> None:
    """A close never moves the execution while a newer attempt exists; success from any attempt wins."""
    done: list[ExecutionRecord] = []

    def newer() -> None:
        with pytest.raises(ValueError, match="x"), otelexec.correlate(source="x", execution_id="e"), otelexec.execution("job"):
            raise ValueError("x")
        done.append(records.one())

    with pytest.raises(KeyError), otelexec.correlate(source="x", execution_id="e"), otelexec.execution("job"):
        thread = threading.Thread(target=newer)
        thread.start()
        thread.join(10)
        raise KeyError("late")
    assert [(attempt.attempt, attempt.state) for attempt in done[0].attempts] == [(1, "running"), (2, "failed")]
    assert done[0].state == "failed"
    assert records.one().state == "failed"
    assert [attempt.error_type for attempt in records.one().attempts] == ["KeyError", "ValueError"]


def test_nested_calls_are_children_with_the_same_request_and_trace(records: Records) -> None:
    with otelexec.correlate(source="schedule", schedule_id="s"), otelexec.execution("outer") as outer:
        with otelexec.execution("middle") as middle:
            job()
        assert otelexec.current_execution() is outer
    found = {record.name: record for record in records.all()}
    assert found["middle"].parent_execution_id == outer.id
    assert found["job"].parent_execution_id == middle.id
    assert len({record.request_id for record in found.values()}) == 1
    assert len({record.execution_id for record in found.values()}) == 3
    assert {record.correlation for record in found.values()} == {'{"schedule_id": "s"}'}
    assert len({record.attempts[0].trace_id for record in found.values()}) == 1
    assert records.span_named("job").parent_span_id == found["middle"].attempts[0].span_id
    assert records.span_named("middle").parent_span_id == found["outer"].attempts[0].span_id


def test_a_scope_inside_an_execution_changes_request_and_fields_only(records: Records) -> None:
    with otelexec.execution("outer") as outer, otelexec.extract({"executionId": "theirs", "requestId": "r"}):
        inner = job()
    assert inner.id not in (outer.id, "theirs")
    assert (inner.correlation.request_id, inner.correlation.parent_execution_id) == ("r", outer.id)


def test_a_reject_outside_is_a_terminal_correlated_record_with_a_span(records: Records) -> None:
    """Behaviours 34 and 35: the ids are there before the work, and so is the record of its refusal."""
    with otelexec.correlate(source="webhook", webhook_id="wh_1") as correlation:
        assert otelexec.reject("rate_limited") == correlation.execution_id
        after = job()
    assert after.id != correlation.execution_id
    record = records.named("rejected")
    (attempt,) = record.attempts
    assert (record.state, attempt.state, attempt.error_type, attempt.finalized_by) == ("rejected", "rejected", "rate_limited", "reject")
    assert record.ended_unix_ns is not None
    assert json.loads(record.correlation) == {"webhook_id": "wh_1"}
    span = records.span(attempt.span_id)
    assert (span.status, span.attributes["error.type"]) == ("error", "rate_limited")


def test_a_reject_inside_ends_the_attempt_as_rejected(records: Records) -> None:
    with otelexec.execution("job") as run:
        assert otelexec.reject("over_quota") == run.id
    assert (records.attempt().state, records.attempt().error_type) == ("rejected", "over_quota")
    assert records.one().name == "job"


def test_correlation_is_equal_on_payload_record_and_span_from_start_to_end(records: Records) -> None:
    """Behaviours 36, 37 and 38: each source with its own fields, and what the user added."""
    with otelexec.correlate(source="webhook", webhook_id="w", path="/p", provider="s", trigger_type="push", attributes={"tenant": "t"}):
        payload = otelexec.inject({"a": 1})
    with otelexec.extract(payload) as message:
        with otelexec.execution("job") as run:
            during = records.one()
            members = dict(run.correlation.members())
        assert message.payload == {"a": 1}
    after = records.one()
    assert during.correlation == after.correlation
    expected = {"webhook_id": "w", "path": "/p", "provider": "s", "trigger_type": "push", "tenant": "t"}
    assert json.loads(after.correlation) == expected
    span = records.span(after.attempts[0].span_id)
    assert {name: span.attributes[name] for name in members} == members
    assert {"otelexec." + name: value for name, value in expected.items()}.items() <= members.items()


def test_the_carried_context_is_the_parent_and_a_link_by_option(records: Records) -> None:
    """Behaviour 43."""
    tracer = trace.get_tracer("web")
    with otelexec.execution("request"), tracer.start_as_current_span("send") as sending:
        payload = otelexec.inject({})
    sent = sending.get_span_context()
    with otelexec.extract(payload):
        job()
    with otelexec.extract(payload), otelexec.execution("linked", link_carried=True):
        pass
    spans = {span.name: span for span in records.spans()}
    assert (spans["job"].parent_span_id, spans["job"].trace_id) == (f"{sent.span_id:016x}", f"{sent.trace_id:032x}")
    linked = spans["linked"]
    assert (linked.parent_span_id, [link.span_id for link in linked.links]) == (None, [f"{sent.span_id:016x}"])
    assert linked.trace_id != spans["job"].trace_id


def test_an_untrusted_carrier_s_trace_is_linked_and_its_ids_are_new(records: Records) -> None:
    headers: dict[str, str] = {}
    with otelexec.correlate(source="x", execution_id="theirs"), otelexec.execution("caller"):
        otelexec.inject_headers(headers)
    with otelexec.extract_headers(headers, trusted=False):
        run = job()
    span = records.span_named("job")
    assert run.id != "theirs"
    assert records.named("job").parent_execution_id is None
    assert span.parent_span_id is None
    assert [link.trace_id for link in span.links] == [records.span_named("caller").trace_id]


@pytest.mark.parametrize("trusted", [True, False])
def test_a_server_s_own_span_of_the_same_headers_stays_the_parent(records: Records, *, trusted: bool) -> None:
    """As the instrumentation of a web framework makes one before any code of the application runs."""
    headers = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    otelexec.configure()
    came = TraceContextTextMapPropagator().extract(headers)
    serving = trace.get_tracer("web").start_as_current_span("GET /", context=came, kind=trace.SpanKind.SERVER)
    with serving as server, otelexec.extract_headers(headers, trusted=trusted):
        job()
    span = records.span_named("job")
    assert (span.trace_id, span.parent_span_id) == ("a" * 32, f"{server.get_span_context().span_id:016x}")
    assert span.links == ()


def test_a_span_of_this_process_stays_the_parent_of_what_an_untrusted_caller_asks_for(records: Records) -> None:
    headers = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    otelexec.configure()
    with trace.get_tracer("web").start_as_current_span("handle") as handle:
        with otelexec.extract_headers(headers, trusted=False):
            job()
        with otelexec.extract_headers(headers), otelexec.execution("trusted"):
            pass
    span, trusted = records.span_named("job"), records.span_named("trusted")
    assert (span.parent_span_id, [link.span_id for link in span.links]) == (f"{handle.get_span_context().span_id:016x}", ["b" * 16])
    assert (trusted.parent_span_id, trusted.links) == ("b" * 16, ())


def test_successive_jobs_share_nothing(records: Records) -> None:
    """Behaviour 44."""
    with otelexec.extract({"executionId": "a", "requestId": "r", "correlation": {"source": "x", "tenant": "t"}}):
        job()
    with otelexec.extract({}):
        job()
    first, second = records.all()
    assert (first.execution_id, first.request_id, json.loads(first.correlation)) == ("a", "r", {"tenant": "t"})
    assert (second.source, json.loads(second.correlation)) == ("direct", {})
    assert second.request_id != "r"
    assert first.attempts[0].trace_id != second.attempts[0].trace_id


def test_a_trusted_id_overrides_what_the_caller_s_payload_says(records: Records) -> None:
    """Behaviour 42: our own envelope goes before the payload's legacy ids."""
    with otelexec.correlate(source="x", execution_id="ours", request_id="r"):
        payload = otelexec.inject({"executionId": "theirs", "requestId": "theirs"})
    with otelexec.extract(payload):
        assert (job().id, records.one().request_id) == ("ours", "r")
