"""What leaves: the PRODUCER span, the `queued` record, and the carrier in both places, whatever call sends the task."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import unquote

import pytest
from celery import chord, group, signals
from celery.beat import Scheduler
from celery.schedules import schedule
from kombu.exceptions import OperationalError
from kombu.messaging import Producer
from opentelemetry import baggage, context, trace

import otelexec
from otelexec import semconv
from otelexec.decoded import DecodedSpan
from otelexec.store.records import ExecutionRecord
from tests.integrations.celery.conftest import Fresh
from tests.integrations.celery.stage import Broker, Stage, keys
from tests.integrations.celery.tasks import make_app
from tests.records import Records
from tests.servers import free_ports

FOREIGN = "tenant"


class Sent:
    """One message as it lies in the queue."""

    def __init__(self, raw: bytes) -> None:
        self.headers: Mapping[str, Any] = json.loads(raw)["headers"]

    @property
    def nested(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.headers["headers"]
        return found

    @property
    def members(self) -> dict[str, str]:
        pairs = (member.partition("=") for member in self.headers["baggage"].split(","))
        return {key.strip(): unquote(value.strip()) for key, _, value in pairs}


class Outgoing:
    """A queue without a worker, and what this process has recorded of what it put there."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.app = stage.app

    def messages(self) -> list[Sent]:
        """Take every message out, the oldest first."""
        broker = keys(self.stage.settings["broker_url"])
        queue = self.stage.settings["task_default_queue"]
        found = broker.lrange(queue, 0, -1)
        broker.delete(queue)
        broker.close()
        return [Sent(raw) for raw in reversed(found)]

    def of(self, message: Sent) -> tuple[ExecutionRecord, DecodedSpan]:
        """Give the record and the span of a message, after comparing all three."""
        task_id, members = message.headers["id"], message.members
        record = self.stage.record(members["otelexec.execution_id"])
        (span,) = [span for span in self.stage.spans() if span.attributes.get(semconv.MESSAGING_MESSAGE_ID) == task_id]
        assert record is not None
        assert (record.name, record.state, record.attempts) == (message.headers["task"], "queued", ())
        assert (record.producer_trace_id, record.producer_span_id) == (span.trace_id, span.span_id)
        assert (span.kind, span.status) == ("producer", "unset")
        assert span.attributes[semconv.EXECUTION_ID] == record.execution_id
        assert message.headers["traceparent"].rpartition("-")[0] == f"00-{span.trace_id}-{span.span_id}"
        assert (members["otelexec.request_id"], members["otelexec.source"]) == (record.request_id, record.source)
        for name in ("traceparent", "baggage"):
            assert message.nested[name] == message.headers[name]
        return record, span


@pytest.fixture
def outgoing(fresh: Fresh) -> Outgoing:
    return Outgoing(fresh())


WAYS: Mapping[str, Callable[[Any], Any]] = {
    "delay": lambda app: app.tasks["add"].delay(1, 2),
    "apply_async": lambda app: app.tasks["add"].apply_async((1, 2)),
    "send_task": lambda app: app.send_task("add", (1, 2)),
    "send_task, unregistered": lambda app: app.send_task("somewhere.else", (1, 2)),
    "signature": lambda app: app.signature("add", (1, 2)).delay(),
    "signature, unregistered": lambda app: app.signature("somewhere.else", (1, 2)).apply_async(),
    "countdown": lambda app: app.tasks["add"].apply_async((1, 2), countdown=30),
    "eta": lambda app: app.tasks["add"].apply_async((1, 2), eta=datetime.now(UTC) + timedelta(seconds=30)),
    "chain": lambda app: (app.tasks["add"].s(1, 2) | app.tasks["add"].s(3)).delay(),
    "starmap": lambda app: app.tasks["add"].starmap([(1, 2), (3, 4)]).delay(),
    "map": lambda app: app.tasks["total"].map([[1], [2]]).delay(),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_sending_leaves_record_span_and_carrier(outgoing: Outgoing, way: str) -> None:
    with otelexec.correlate(source="webhook", webhook_id="wh_1", path="/hooks", provider="shop") as correlation:
        WAYS[way](outgoing.app)
    (message,) = outgoing.messages()
    record, _ = outgoing.of(message)
    assert (record.execution_id, record.request_id) == (correlation.execution_id, correlation.request_id)
    assert record.source == message.members["otelexec.source"] == "webhook"
    assert message.members["otelexec.provider"] == "shop"


def test_a_group_sends_each_as_an_execution_of_its_own(outgoing: Outgoing) -> None:
    with otelexec.correlate(source="test") as correlation:
        group(outgoing.app.tasks["add"].s(1, number) for number in range(3)).apply_async()
    found = [outgoing.of(message)[0] for message in outgoing.messages()]
    assert found[0].execution_id == correlation.execution_id
    assert len({record.execution_id for record in found}) == 3
    assert {record.request_id for record in found} == {correlation.request_id}


def test_chunks(outgoing: Outgoing) -> None:
    outgoing.app.tasks["add"].chunks([(number, 1) for number in range(6)], 2).apply_async()
    assert len([outgoing.of(message) for message in outgoing.messages()]) == 3


def test_a_chord_sends_its_headers(outgoing: Outgoing) -> None:
    chord((outgoing.app.tasks["add"].s(1, number) for number in range(3)), outgoing.app.tasks["total"].s()).apply_async()
    assert [outgoing.of(message)[0].name for message in outgoing.messages()] == ["add"] * 3


def test_outside_any_scope_each_is_a_request_of_its_own(outgoing: Outgoing) -> None:
    for _ in range(2):
        outgoing.app.tasks["add"].delay(1, 2)
    first, second = [outgoing.of(message)[0] for message in outgoing.messages()]
    assert first.execution_id != second.execution_id
    assert first.request_id != second.request_id


def test_the_span_is_a_child_of_the_current_one_and_the_context_is_as_before(outgoing: Outgoing) -> None:
    tracer = trace.get_tracer("user")
    otelexec.configure()
    with tracer.start_as_current_span("request"):
        here = context.get_current()
        outgoing.app.tasks["add"].delay(1, 2)
        assert context.get_current() == here
        parent = trace.get_current_span().get_span_context()
    (message,) = outgoing.messages()
    _, span = outgoing.of(message)
    assert (span.trace_id, span.parent_span_id) == (f"{parent.trace_id:032x}", f"{parent.span_id:016x}")


def test_baggage_of_others_passes_and_stale_headers_do_not(outgoing: Outgoing) -> None:
    stale = {
        "traceparent": f"00-{'a' * 32}-{'b' * 16}-01",
        "tracestate": "old=1",
        "baggage": "otelexec.execution_id=stale,gone=1",
        "x-own": "kept",
    }
    token = context.attach(baggage.set_baggage(FOREIGN, "blue, green"))
    try:
        outgoing.app.tasks["add"].apply_async((1, 2), headers=stale)
    finally:
        context.detach(token)
    (message,) = outgoing.messages()
    outgoing.of(message)
    assert message.members[FOREIGN] == "blue, green"
    assert "gone" not in message.members
    for place in (message.headers, message.nested):
        assert "tracestate" not in place
        assert place["x-own"] == "kept"
    assert stale["traceparent"].startswith("00-aaa"), "the caller's own mapping was changed"


def test_headers_that_another_nested_are_kept(outgoing: Outgoing) -> None:
    theirs = {"headers": {"sentry-trace": "1-2-3", "baggage": "sentry-release=1"}, "sentry-trace": "1-2-3"}
    outgoing.app.tasks["add"].apply_async((1, 2), headers=theirs)
    (message,) = outgoing.messages()
    outgoing.of(message)
    assert message.nested["sentry-trace"] == message.headers["sentry-trace"] == "1-2-3"
    assert theirs["headers"] == {"sentry-trace": "1-2-3", "baggage": "sentry-release=1"}


def test_a_signature_that_is_sent_twice_carries_nothing_from_the_first_time(outgoing: Outgoing) -> None:
    signature = outgoing.app.tasks["add"].s(1, 2)
    with otelexec.correlate(source="test"):
        signature.apply_async()
    signature.apply_async()
    first, second = (outgoing.of(message)[0] for message in outgoing.messages())
    assert first.request_id != second.request_id
    assert "traceparent" not in json.dumps(signature)


# A broker that is away


@pytest.fixture
def away(fresh: Fresh) -> Stage:
    url = f"redis://127.0.0.1:{free_ports(1)[0]}/0"
    return fresh(Broker(url, "cache+memory://"), broker_transport_options={"socket_connect_timeout": 1})


def test_a_refused_message_is_rejected_and_leaves_nothing_behind(away: Stage, fresh: Fresh) -> None:
    before = context.get_current()
    with otelexec.correlate(source="test") as correlation, pytest.raises(OperationalError):
        away.task("add").apply_async((1, 2), retry=False)
    assert context.get_current() == before
    assert not trace.get_current_span().get_span_context().is_valid
    record = away.record(correlation.execution_id)
    assert record is not None
    assert (record.name, record.state, record.error_type) == ("add", "rejected", "kombu.exceptions.OperationalError")
    refused = [span for span in away.spans() if span.attributes.get(semconv.EXECUTION_ID) == correlation.execution_id]
    (producer,) = [span for span in refused if span.kind == "producer"]
    assert (producer.status, producer.attributes[semconv.ERROR_TYPE]) == ("error", record.error_type)

    there = fresh()
    there.task("add").apply_async((1, 2))
    (message,) = Outgoing(there).messages()
    assert producer.trace_id not in message.headers["traceparent"]
    assert correlation.request_id not in message.headers["baggage"]


def test_arguments_that_can_not_be_sent_are_rejected_too(outgoing: Outgoing) -> None:
    with otelexec.correlate(source="test") as correlation, pytest.raises(Exception, match="JSON serializable"):
        outgoing.app.tasks["add"].delay(object(), 2)
    record = outgoing.stage.record(correlation.execution_id)
    assert record is not None
    assert record.state == "rejected"


def test_a_store_that_is_away_does_not_stop_the_message(outgoing: Outgoing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTELEXEC_STORE", "sqlite:////proc/nowhere/store.db")
    started = time.monotonic()
    outgoing.app.tasks["add"].delay(1, 2)
    assert time.monotonic() - started < 10
    (message,) = outgoing.messages()
    assert message.members["otelexec.execution_id"]


# Beat


def test_a_beat_entry_has_a_clean_context_and_says_which_schedule(outgoing: Outgoing) -> None:
    beat = Scheduler(outgoing.app, lazy=True)
    entry = beat.Entry(name="every-minute", task="add", args=(1, 2), schedule=schedule(60.0), app=outgoing.app)
    token = context.attach(baggage.set_baggage("left", "over"))
    try:
        with otelexec.correlate(source="test") as correlation:
            for _ in range(2):
                beat.apply_entry(entry, producer=beat.producer)
    finally:
        context.detach(token)
    first, second = outgoing.messages()
    records = [outgoing.of(message)[0] for message in (first, second)]
    for message, record in zip((first, second), records, strict=True):
        fields = json.loads(record.correlation)
        assert (record.source, fields["schedule_id"]) == ("schedule", "every-minute")
        assert datetime.fromisoformat(fields["scheduled_for"]) <= datetime.now(UTC)
        assert "left" not in message.members
        assert record.request_id != correlation.request_id
    assert records[0].request_id != records[1].request_id
    assert len({outgoing.of(message)[1].trace_id for message in (first, second)}) == 2


def test_receivers_that_come_and_go_leave_no_message_of_another_thread_without_its_carrier(
    instrumented: None, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours is kept the last one, also while somebody else publishes."""
    app = make_app({"broker_url": "memory://", "result_backend": None})
    bare: list[Mapping[str, Any]] = []

    def look(_: object, __: object, *, headers: Mapping[str, Any], **___: Any) -> None:
        if "baggage" not in headers:
            bare.append(headers)

    monkeypatch.setattr(Producer, "publish", look)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    done = threading.Event()

    def publish() -> None:
        while not done.is_set():
            app.tasks["add"].delay(1, 2)

    threads = [threading.Thread(target=publish) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        for _ in range(500):
            with _listening(lambda **_: None):
                time.sleep(0.002)
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
        app.close()
    assert not bare


@contextmanager
def _listening(receiver: Callable[..., None]) -> Iterator[None]:
    signals.before_task_publish.connect(receiver, weak=False)
    try:
        yield
    finally:
        signals.before_task_publish.disconnect(receiver)
