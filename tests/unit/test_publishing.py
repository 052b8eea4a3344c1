"""What the sending side records before a message leaves, and when it is refused."""

# ruff: noqa: PT012, SIM117 (the block is what is refused)

from __future__ import annotations

import asyncio
import json
from collections.abc import Generator

import pytest
from opentelemetry import trace

import otelexec
from otelexec.store.records import ExecutionRecord
from tests.records import Records


def queued(records: Records) -> ExecutionRecord:
    return records.named("invoice.run")


def test_a_message_is_recorded_as_queued_before_it_leaves(records: Records) -> None:
    """Behaviour 34: the id is there, and in the store, before the backend hears of the message."""
    with otelexec.correlate(source="webhook", webhook_id="w") as correlation:
        with otelexec.publish("invoice.run", destination="invoices", system="celery", message_id="m1") as message:
            assert message.id == correlation.execution_id
            record = queued(records)
            assert (record.state, record.execution_id) == ("queued", message.id)
            assert record.producer_span_id is not None
            assert records.query("SELECT COUNT(*) FROM open_span") == [(1,)]
            payload = otelexec.inject({"n": 7})
            message.set_message_id("m2")
    span = records.span_named("send invoices")  # its end goes with the next commit, or within half a second
    assert records.query("SELECT COUNT(*) FROM open_span") == [(0,)]
    assert (span.kind, span.span_id, span.trace_id) == ("producer", queued(records).producer_span_id, queued(records).producer_trace_id)
    assert span.attributes["messaging.system"] == "celery"
    assert span.attributes["messaging.destination.name"] == "invoices"
    assert span.attributes["messaging.message.id"] == "m2"
    with otelexec.extract(payload), otelexec.execution("invoice.run") as run:
        assert run.id == message.id
    record = queued(records)
    assert (record.state, json.loads(record.correlation)) == ("succeeded", {"webhook_id": "w", "messaging.message.id": "m2"})
    assert records.span(record.attempts[0].span_id).parent_span_id == span.span_id


def test_what_an_untrusted_caller_has_sent_or_run_is_linked_to_its_trace(records: Records) -> None:
    """As a public endpoint does, which says beside that where the request came in."""
    caller = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    with otelexec.extract_headers(caller, trusted=False):
        with otelexec.publish("invoice.run", destination="bare"):
            pass
        with otelexec.correlate(source="webhook", webhook_id="w"):
            with otelexec.publish("invoice.run", destination="correlated"):
                pass
            with otelexec.execution("job"):
                with otelexec.publish("invoice.run", destination="of the job"):
                    pass
    linked = {
        name: [link.span_id for link in records.span_named(name).links]
        for name in ("send bare", "send correlated", "job", "send of the job")
    }
    assert linked == {"send bare": ["b" * 16], "send correlated": ["b" * 16], "job": ["b" * 16], "send of the job": []}


def test_the_id_of_a_message_is_on_the_record_of_its_own_execution_alone(records: Records) -> None:
    with otelexec.extract_headers({}, message_id="m1"):
        with otelexec.execution("first"), otelexec.execution("child"):
            pass
        with otelexec.execution("second"):
            pass
    named = {name: json.loads(records.named(name).correlation) for name in ("first", "child", "second")}
    assert named == {"first": {"messaging.message.id": "m1"}, "child": {}, "second": {}}


def test_a_core_keeps_the_id_of_the_message_whose_execution_it_takes_over(records: Records) -> None:
    with otelexec.extract_headers({}, message_id="m1"), otelexec.execution("task"), otelexec.correlate(source="schedule", schedule_id="s"):
        with otelexec.execution("job", core=True):
            pass
    assert json.loads(records.one().correlation) == {"schedule_id": "s", "messaging.message.id": "m1"}


def test_a_refusal_closes_the_record_as_rejected_and_comes_out(records: Records) -> None:
    """Behaviour 47: what the backend said stands on the record."""
    error = ConnectionError("no broker")
    with pytest.raises(ConnectionError) as caught, otelexec.correlate(source="x"), otelexec.publish("invoice.run"):
        raise error
    assert caught.value is error
    record = queued(records)
    assert (record.state, record.error_type, record.error_message) == ("rejected", "ConnectionError", "no broker")
    span = records.span_named("send")
    assert (span.status, span.attributes["error.type"]) == ("error", "ConnectionError")
    assert record.ended_unix_ns == span.end_unix_ns


def test_an_unknown_acceptance_leaves_it_queued(records: Records) -> None:
    """Behaviour 48: nobody knows, so nobody may say that it never runs."""
    with pytest.raises(TimeoutError), otelexec.publish("invoice.run") as message:
        message.acceptance_unknown()
        raise TimeoutError
    assert queued(records).state == "queued"


def test_queued_never_overwrites_a_later_state(records: Records) -> None:
    with otelexec.correlate(source="x", execution_id="e"), otelexec.execution("invoice.run"):
        pass
    with otelexec.correlate(source="x", execution_id="e"), otelexec.publish("invoice.run"):
        assert queued(records).state == "succeeded"
    assert queued(records).state == "succeeded"
    assert queued(records).queued_unix_ns is not None


def test_a_worker_that_is_faster_than_the_publisher_wins(records: Records) -> None:
    """A refusal that is reported after the message ran after all changes nothing."""
    with pytest.raises(ConnectionError), otelexec.publish("invoice.run"):
        payload = otelexec.inject({})
        with otelexec.extract(payload), otelexec.execution("invoice.run"):
            pass
        raise ConnectionError
    assert queued(records).state == "succeeded"


def test_sent_inside_an_execution_it_is_a_child_with_its_own_id(records: Records) -> None:
    with otelexec.execution("sender") as sender:
        with otelexec.publish("invoice.run") as first:
            pass
        with otelexec.publish("invoice.run", retry=True) as again:
            assert again.id == sender.id
    record = queued(records)
    assert (record.execution_id, record.parent_execution_id, record.request_id) == (first.id, sender.id, sender.correlation.request_id)
    spans = [span for span in records.spans() if span.kind == "producer"]
    assert {span.parent_span_id for span in spans} == {records.named("sender").attempts[0].span_id}


async def test_an_async_block_works_alike(records: Records) -> None:
    async with otelexec.publish("invoice.run", destination="q") as message:
        await asyncio.sleep(0)
        payload = otelexec.inject({})
    assert not otelexec.current_execution()
    with otelexec.extract(payload) as found:
        assert found.correlation.execution_id == message.id
    assert queued(records).state == "queued"


def test_two_messages_of_one_scope_are_two_executions_of_one_request(records: Records) -> None:
    with otelexec.correlate(source="x") as correlation:
        ids = []
        for _ in range(2):
            with otelexec.publish("invoice.run") as message:
                ids.append(message.id)
    assert ids[0] == correlation.execution_id
    assert ids[1] != ids[0]
    assert {record.request_id for record in records.all()} == {correlation.request_id}


def test_spans_whose_id_has_left_are_in_the_store_and_are_written_once(records: Records) -> None:
    """Whoever dies now leaves no receiver with a parent that never comes."""
    tracer = trace.get_tracer("app")
    with otelexec.execution("sender"), tracer.start_as_current_span("a"), tracer.start_as_current_span("b"):
        otelexec.inject({})
        assert records.query("SELECT COUNT(*) FROM open_span") == [(2,)]
        otelexec.inject({})
        assert records.query("SELECT COUNT(*) FROM open_span") == [(2,)]
    assert records.query("SELECT COUNT(*) FROM open_span") == [(0,)]
    assert [span.name for span in records.spans()].count("a") == 1


def test_without_a_store_a_message_is_sent_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTELEXEC_STORE", "none")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    with otelexec.publish("invoice.run") as message:
        payload = otelexec.inject({})
    with otelexec.extract(payload) as found:
        assert found.correlation.execution_id == message.id


def test_a_block_that_is_dropped_ends_its_span(records: Records) -> None:
    """A generator that is closed, or collected, while it is in the block."""

    def send() -> Generator[None, None, None]:
        with otelexec.publish("invoice.run", destination="q"):
            yield

    sending = send()
    next(sending)
    sending.close()
    assert records.span_named("send q").span_id == queued(records).producer_span_id
    assert records.query("SELECT COUNT(*) FROM open_span") == [(0,)]
    assert queued(records).state == "queued"
