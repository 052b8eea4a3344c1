"""The context inside a payload: the reserved key, its signature, and payloads from before it existed."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from ipaddress import IPv4Address
from pathlib import PurePath
from types import MappingProxyType
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context.context import Context

from otelexec import runtime, settings, w3c
from otelexec.context import EXECUTION_KEY, current_scope
from otelexec.correlation import Correlation, WebhookCorrelation, correlate
from otelexec.envelope import extract, inject, receive
from otelexec.errors import CarrierError

KEY = "_otelexec"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

any_text = st.text(st.characters(codec=None))
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=12,
)
legacy_names = st.sampled_from(["executionId", "requestId", "correlation", "source", KEY])
envelope_names = st.sampled_from(["v", "traceparent", "tracestate", "baggage", "enqueued_unix_ns", "signature"])
any_payload = st.one_of(
    any_json,
    st.binary(),
    st.builds(object),
    st.dictionaries(legacy_names | any_text, any_json | st.dictionaries(envelope_names | legacy_names, any_json), max_size=5),
)


@pytest.fixture(autouse=True, scope="module")
def _settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        values = settings.load()
        patch.setattr(runtime, "settings", lambda: values)
        patch.setattr(runtime, "before_send", lambda context: None)
        yield


@pytest.fixture
def signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a signing key."""
    values = settings.load(signing_key="secret")
    monkeypatch.setattr(runtime, "settings", lambda: values)


class Running:
    """An execution as far as propagation looks at it."""

    def __init__(self) -> None:
        self.correlation = Correlation.direct()

    @property
    def id(self) -> str:
        return self.correlation.execution_id

    def mark_retry_sent(self) -> None:
        pass

    def mark_retry_refused(self) -> None:
        pass


def over_a_queue(payload: dict[str, Any]) -> Any:
    return json.loads(json.dumps(payload))


class TestInject:
    def test_the_payload_is_copied_and_gets_one_key(self) -> None:
        """The caller's own dict is not changed."""
        payload = {"invoice_id": 7}
        before = time.time_ns()
        message = inject(payload)
        assert payload == {"invoice_id": 7}
        envelope = message.pop(KEY)
        assert message == payload
        assert set(envelope) == {"v", "baggage", "enqueued_unix_ns"}
        assert envelope["v"] == 1
        assert before <= envelope["enqueued_unix_ns"] <= time.time_ns()

    def test_the_envelope_of_an_earlier_send_is_replaced(self) -> None:
        """A payload that is passed on belongs to its new message."""
        with correlate(source="a"):
            first = inject({"x": 1})
        with correlate(source="b") as second:
            again = inject(first)
        with extract(again) as job:
            assert job.correlation == second
            assert job.payload == {"x": 1}

    @pytest.mark.parametrize("payload", [None, 5, "text", b"x", [1], ("a",), object()])
    def test_only_mappings_can_carry_it(self, payload: Any) -> None:
        """One line that says what to give instead."""
        with pytest.raises(CarrierError, match="give inject\\(\\) a mapping"):
            inject(payload)

    def test_any_mapping_will_do(self) -> None:
        """A dict comes out, whatever mapping went in."""
        message = inject(MappingProxyType({"a": 1}))
        assert type(message) is dict
        assert message["a"] == 1

    def test_a_retry_keeps_the_running_executions_id(self) -> None:
        """Everything else sent inside an execution is a child of it."""
        execution = Running()
        token = otel_context.attach(otel_context.set_value(EXECUTION_KEY, execution))
        try:
            retry, child = inject({}, retry=True), inject({})
        finally:
            otel_context.detach(token)
        with extract(retry) as job:
            assert job.correlation.execution_id == execution.id
        with extract(child) as job:
            assert job.correlation.execution_id != execution.id
            assert job.correlation.parent_execution_id == execution.id


class TestExtract:
    def test_what_was_sent_is_what_arrives(self) -> None:
        """Seed behaviour 36: payload, trace and correlation are those of the sender, and the reserved key is gone."""
        span_context = w3c.decode_trace(TRACEPARENT, "a=1")
        assert span_context is not None
        token = otel_context.attach(trace.set_span_in_context(trace.NonRecordingSpan(span_context), Context()))
        try:
            with correlate(source="webhook", webhook_id="wh_1", path="/hooks/ü", attributes={"n": 1}) as sender:
                message = over_a_queue(inject({"invoice_id": 7}))
        finally:
            otel_context.detach(token)
        with extract(message) as job:
            assert job.payload == {"invoice_id": 7}
            assert job.correlation == sender
            assert job.trusted
            current = trace.get_current_span().get_span_context()
            assert (current.trace_id, current.span_id) == (span_context.trace_id, span_context.span_id)
            assert current.is_remote
            assert current.trace_state == {"a": "1"}
            assert current_scope() is job.scope
            assert job.scope.enqueued_unix_ns == message[KEY]["enqueued_unix_ns"]
        assert current_scope() is None
        assert KEY in message

    @given(any_payload, st.booleans(), st.none() | any_text)
    def test_no_payload_of_any_kind_raises(self, payload: Any, trusted: bool, message_id: str | None) -> None:
        """Seed behaviour 41 and must-hold 6: the work runs, under valid ids, and can send on."""
        with extract(payload, trusted=trusted, message_id=message_id) as job:
            for value in (job.correlation.execution_id, job.correlation.request_id):
                assert 1 <= len(value) <= 128
                assert value.isascii()
                assert value.isprintable()
            again = inject({})[KEY]
            assert len(again["baggage"]) <= 8_192
            ours, _ = w3c.decode_baggage(again["baggage"])
            assert ours["otelexec.execution_id"] == job.correlation.execution_id
            assert ours["otelexec.request_id"] == job.correlation.request_id
            json.dumps(dict(job.correlation.fields)).encode()
        assert current_scope() is None

    def test_mappings_that_fail_in_every_question_never_raise(self) -> None:
        """The work gets the payload as it is."""

        class Hostile(dict[str, Any]):
            def get(self, key: str, default: Any = None) -> Any:
                raise RuntimeError(key)

            def items(self) -> Any:
                raise RuntimeError

        payload = Hostile(a=1)
        with extract(payload) as job:
            assert job.payload is payload

    def test_a_payload_without_the_key_is_handed_on_as_the_same_object(self) -> None:
        """Nothing is copied that needs no copy."""
        payload: dict[str, Any] = {"a": [1]}
        with extract(payload) as job:
            assert job.payload is payload

    def test_a_later_version_is_read_as_far_as_it_is_understood(self) -> None:
        """An older worker runs what a newer sender queued."""
        message = {KEY: {"v": 9, "baggage": "otelexec.execution_id=e,otelexec.new=1", "enqueued_unix_ns": "soon", "more": {}}, "a": 1}
        with extract(message) as job:
            assert job.correlation.execution_id == "e"
            assert dict(job.correlation.fields) == {"new": "1"}
            assert job.scope.enqueued_unix_ns is None
            assert job.payload == {"a": 1}

    def test_the_envelope_goes_before_what_the_caller_put_into_the_payload(self) -> None:
        """Seed behaviour 42: the trusted correlation overrides caller-supplied ids."""
        with correlate(source="webhook", webhook_id="w") as sender:
            message = inject({"executionId": "other", "requestId": "other", "correlation": {"webhookId": "other"}})
        with extract(message) as job:
            assert job.correlation == sender


class TestLegacy:
    def test_known_fields_of_a_payload_without_an_envelope_are_adopted(self) -> None:
        """Seed behaviour 39: ids as they are, fields under their new names, the rest as attributes."""
        payload = {
            "executionId": "exec 1",
            "correlation": {
                "executionId": "nested",
                "requestId": "req-1",
                "source": "webhook",
                "webhookId": "wh",
                "provider": "stripe",
                "triggerType": "call",
                "tableId": 7,
                "rows": [1, 2],
                "nothing": None,
            },
        }
        with extract(payload) as job:
            assert isinstance(job.correlation, WebhookCorrelation)
            assert job.correlation.execution_id == "exec 1"
            assert job.correlation.request_id == "req-1"
            assert dict(job.correlation.fields) == {
                "webhook_id": "wh",
                "provider": "stripe",
                "trigger_type": "call",
                "tableId": "7",
                "rows": "[1,2]",
            }
            assert job.payload is payload

    def test_the_request_of_a_legacy_payload_falls_back_to_its_execution(self) -> None:
        """Seed behaviour 39: deterministic, so that a redelivery has the same request."""
        for _ in range(2):
            with extract({"executionId": "e1"}) as job:
                assert (job.correlation.execution_id, job.correlation.request_id) == ("e1", "e1")

    def test_a_message_that_carries_nothing_takes_its_own_id(self) -> None:
        """The task's, the job's or the run's."""
        with extract({"a": 1}, message_id="celery-1") as job:
            assert (job.correlation.execution_id, job.correlation.request_id) == ("celery-1", "celery-1")
        with extract({"requestId": "r"}, message_id="celery-1") as job:
            assert (job.correlation.execution_id, job.correlation.request_id) == ("celery-1", "r")

    def test_equal_payloads_are_different_jobs(self) -> None:
        """Ids never come from a payload's content."""
        with extract({"a": 1}) as first, extract({"a": 1}) as second:
            assert first.correlation.execution_id != second.correlation.execution_id

    @pytest.mark.parametrize("value", [None, "", True, [], {}, {"a": 1}, 1.5])
    def test_what_can_name_nothing_is_no_legacy_id(self, value: Any) -> None:
        """One id for all payloads with an empty field would make one execution of them."""
        with extract({"executionId": value, "requestId": value, "correlation": {"executionId": value}}, message_id="m") as job:
            assert (job.correlation.execution_id, job.correlation.request_id) == ("m", "m")

    def test_untrusted_legacy_ids_are_attributes_only(self) -> None:
        """Whoever can send a payload from outside can't take over an execution."""
        with extract({"executionId": "victim", "requestId": "r", "correlation": {"source": "webhook"}}, trusted=False) as job:
            assert job.correlation.execution_id != "victim"
            assert job.correlation.request_id != "r"
            assert job.correlation.source == "direct"
            assert dict(job.correlation.fields) == {"legacy_execution_id": "victim", "legacy_request_id": "r"}


class TestTrust:
    @given(any_payload, any_text, any_text)
    def test_no_untrusted_payload_takes_over_an_id(self, payload: Any, execution_id: str, request_id: str) -> None:
        """Must-hold 6: in the envelope, in legacy fields, or nested."""
        header, _ = w3c.encode_baggage({"otelexec.execution_id": execution_id, "otelexec.request_id": request_id}, {})
        forged = {
            **(payload if isinstance(payload, dict) else {}),
            KEY: {"v": 1, "baggage": header, "signature": "v1=" + "0" * 64},
            "executionId": execution_id,
            "requestId": request_id,
            "correlation": {"executionId": execution_id, "requestId": request_id},
        }
        with extract(forged, trusted=False) as job:
            assert job.correlation.execution_id not in {execution_id, request_id}
            assert job.correlation.request_id not in {execution_id, request_id}

    def test_an_untrusted_senders_trace_is_linked(self) -> None:
        """It is neither the parent nor lost."""
        with extract({KEY: {"traceparent": TRACEPARENT}}, trusted=False) as job:
            assert [format(link.context.trace_id, "032x") for link in job.scope.links] == [TRACEPARENT[3:35]]
            assert not trace.get_current_span().get_span_context().is_valid

    @pytest.mark.usefixtures("signed")
    @given(st.dictionaries(st.text() | st.integers(), any_json, max_size=5))
    def test_a_signed_payload_is_believed_after_its_way_over_a_queue(self, payload: dict[Any, Any]) -> None:
        """Also where JSON changed number keys and tuples on the way."""
        payload.pop(KEY, None)
        with correlate(source="webhook", attributes={"ä": "+ %"}) as sender:
            message = over_a_queue(inject(payload))
        with extract(message) as job:
            assert job.trusted
            assert job.correlation == sender

    @pytest.mark.usefixtures("signed")
    def test_dates_and_other_objects_are_signed_by_their_text(self) -> None:
        """As a queue in the same process, or one that pickles, hands them on."""
        with extract(copy.deepcopy(inject({"at": datetime(2026, 1, 1, tzinfo=UTC), "pair": (1, 2)}))) as job:
            assert job.trusted

    @pytest.mark.usefixtures("signed")
    @pytest.mark.parametrize(
        "value",
        [date(2026, 1, 1), timedelta(1), UUID(int=7), Decimal("1.10"), Fraction(1, 3), PurePath("a"), b"x", IPv4Address(7)],
    )
    def test_what_has_the_same_text_everywhere_is_signed_by_it(self, value: Any) -> None:
        with extract(copy.deepcopy(inject({"value": value}))) as job:
            assert job.trusted

    @pytest.mark.usefixtures("signed")
    @pytest.mark.parametrize("value", [{"a", "b"}, frozenset("ab"), object()])
    def test_what_has_another_text_in_each_process_is_not_signed(self, value: Any, caplog: pytest.LogCaptureFixture) -> None:
        """The order of a set and the address of an object are the sender's own, so its signature would never be believed."""
        assert "signature" not in inject({"value": value})[KEY]
        assert f"no JSON has no signature, so its ids are not believed: {type(value).__name__}" in caplog.text

    @pytest.mark.usefixtures("signed")
    @pytest.mark.parametrize(
        "change",
        [
            {"amount": 2},
            {"extra": None},
            {KEY: {"baggage": "otelexec.execution_id=victim,otelexec.request_id=r,otelexec.source=x"}},
            {KEY: {"enqueued_unix_ns": 1}},
            {KEY: {"signature": None}},
            {KEY: {"signature": "v1=" + "0" * 64}},
            {KEY: {"signature": "\ud800"}},
        ],
    )
    def test_any_change_of_what_is_signed_makes_it_untrusted(self, change: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
        """Members, enqueue time and payload; one warning, new ids."""
        with correlate(source="x") as sender:
            message = over_a_queue(inject({"amount": 1}))
        message = message | change | {KEY: message[KEY] | change.get(KEY, {})}
        with extract(message, message_id="m") as job:
            assert not job.trusted
            assert job.correlation.execution_id not in {sender.execution_id, "victim", "m"}
        assert [record.levelno for record in caplog.records] == [logging.WARNING]

    @pytest.mark.usefixtures("signed")
    def test_a_legacy_payload_is_not_believed_where_a_key_is_set(self, caplog: pytest.LogCaptureFixture) -> None:
        """Its ids are kept as attributes, so that they can be found."""
        with extract({"executionId": "victim"}) as job:
            assert not job.trusted
            assert job.correlation.execution_id != "victim"
            assert job.correlation.fields["legacy_execution_id"] == "victim"
        assert "is not signed" in caplog.text

    @pytest.mark.usefixtures("signed")
    def test_a_payload_that_json_cannot_hold_still_goes_out(self, caplog: pytest.LogCaptureFixture) -> None:
        """Signing never keeps work back; a warning says that the receiver won't believe it."""
        loop: dict[str, Any] = {}
        loop["self"] = loop
        with correlate(source="x") as sender:
            message = inject(loop)
        assert "no JSON" in caplog.text
        assert "signature" not in message[KEY]
        with extract(message) as job:
            assert not job.trusted
            assert job.correlation.execution_id != sender.execution_id


class TestSteps:
    def test_an_adapter_gets_context_scope_and_payload_without_attaching(self) -> None:
        """For frameworks that begin and end a job in different callbacks."""
        context, scope, rest = receive(inject({"a": 1}))
        assert rest == {"a": 1}
        assert current_scope() is None
        assert current_scope(context) is scope
