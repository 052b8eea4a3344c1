"""The context in headers and in the environment: strict on the way out, never an exception on the way in."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import baggage, trace
from opentelemetry import context as otel_context
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from otelexec import propagation, runtime, settings, w3c
from otelexec.carrier import read_headers
from otelexec.context import EXECUTION_KEY, current_scope
from otelexec.correlation import Correlation, Scope, correlate
from otelexec.errors import CarrierError, SettingsError
from otelexec.propagation import extract_env, extract_headers, inject_env, inject_headers

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OTHER_TRACEPARENT = "00-11111111111111111111111111111111-2222222222222222-01"
MEMBER = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+[ \t]*=[ \t]*(?:[\x21\x23\x24\x26-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]|%[0-9A-Fa-f]{2})*(?:;[^,]*)?"
GRAMMAR = re.compile(rf"{MEMBER}(?:,{MEMBER})*")

any_text = st.text(st.characters(codec=None))
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=12,
)
our_headers = st.sampled_from(["traceparent", "tracestate", "baggage", "otelexec-signature", "Baggage", "TRACEPARENT"])
any_carrier = st.one_of(
    any_json,
    st.binary(),
    st.dictionaries(our_headers, st.one_of(any_json, st.binary(), any_text)),
    st.lists(st.tuples(our_headers | our_headers.map(str.encode), st.one_of(any_json, st.binary()))),
    st.builds(object),
)


@pytest.fixture(autouse=True, scope="module")
def _settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        values = settings.load()
        patch.setattr(runtime, "settings", lambda: values)
        patch.setattr(runtime, "before_send", lambda context: None)
        yield


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set the signing keys of this process."""

    def use(value: str) -> None:
        values = settings.load(signing_key=value)
        monkeypatch.setattr(runtime, "settings", lambda: values)

    return use


class Running:
    """An execution as far as propagation looks at it."""

    def __init__(self) -> None:
        self.correlation = Correlation.direct()
        self.retries = 0

    @property
    def id(self) -> str:
        return self.correlation.execution_id

    def mark_retry_sent(self) -> None:
        self.retries += 1

    def mark_retry_refused(self) -> None:
        self.retries -= 1


@pytest.fixture
def execution() -> Iterator[Running]:
    current = Running()
    token = otel_context.attach(otel_context.set_value(EXECUTION_KEY, current))
    yield current
    otel_context.detach(token)


def sent(**options: Any) -> dict[str, str]:
    headers: dict[str, str] = {}
    inject_headers(headers, **options)
    return headers


def members(headers: Mapping[str, str]) -> dict[str, str]:
    """Read a header by nothing but the specification."""
    pairs = (one.partition("=") for one in headers["baggage"].split(","))
    return {unquote(name): unquote(value.partition(";")[0]) for name, _, value in pairs}


def remote(traceparent: str = TRACEPARENT) -> Context:
    span_context = w3c.decode_trace(traceparent, None)
    assert span_context is not None
    return trace.set_span_in_context(trace.NonRecordingSpan(span_context), Context())


def current_trace() -> str:
    return format(trace.get_current_span().get_span_context().trace_id, "032x")


class TestOut:
    def test_trace_and_members_reach_the_python_sdk(self) -> None:
        """What `inject_headers` writes is an ordinary W3C context."""
        token = otel_context.attach(remote())
        try:
            with correlate(source="webhook", path="/a b", provider="ünï") as correlation:
                headers = sent()
        finally:
            otel_context.detach(token)
        context = W3CBaggagePropagator().extract(headers, TraceContextTextMapPropagator().extract(headers, Context()))
        assert baggage.get_all(context) == correlation.members()
        assert headers["traceparent"] == TRACEPARENT

    def test_what_was_left_of_an_earlier_send_is_removed_first(self) -> None:
        """A retry must not carry a stale parent or stale baggage, in any spelling of the names."""
        headers = {
            "TraceParent": "stale",
            "tracestate": "stale=1",
            "BAGGAGE": "otelexec.execution_id=stale",
            "Otelexec-Signature": "s",
            "x": "y",
        }
        inject_headers(headers)
        assert set(headers) == {"baggage", "x"}
        assert "stale" not in headers["baggage"]

    def test_the_environment_has_upper_case_names(self) -> None:
        """TRACEPARENT, TRACESTATE and BAGGAGE, as OpenTelemetry names them."""
        context = trace.set_span_in_context(
            trace.NonRecordingSpan(w3c.decode_trace(TRACEPARENT, "a=1") or trace.INVALID_SPAN_CONTEXT), Context()
        )
        token = otel_context.attach(context)
        try:
            environ = {"PATH": "/bin", "BAGGAGE": "stale=1", "OTELEXEC_SIGNATURE": "stale", "baggage": "not ours"}
            correlation = inject_env(environ)
        finally:
            otel_context.detach(token)
        assert environ["TRACEPARENT"] == TRACEPARENT
        assert environ["TRACESTATE"] == "a=1"
        assert "OTELEXEC_SIGNATURE" not in environ
        assert environ["baggage"] == "not ours"
        with extract_env(environ) as scope:
            assert scope.correlation == correlation
            assert current_trace() == TRACEPARENT[3:35]

    def test_the_environment_of_the_process_is_the_default_and_stands_in_no_signature(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRACEPARENT", TRACEPARENT)
        with extract_env():
            assert current_trace() == TRACEPARENT[3:35]
        assert inspect.signature(extract_env).parameters["environ"].default is None

    @pytest.mark.parametrize("carrier", [None, 5, "text", b"bytes", [("a", "b")], object(), MappingProxyType({})])
    def test_what_cannot_carry_the_context_is_refused_in_one_line(self, carrier: Any) -> None:
        """The mistake is the caller's, and the scope's id is not used up by it."""
        with correlate(source="x") as correlation:
            for inject in (inject_headers, inject_env):
                with pytest.raises(CarrierError, match="can't carry the context"):
                    inject(carrier)
            assert members(sent())["otelexec.execution_id"] == correlation.execution_id

    def test_the_scopes_own_id_goes_with_the_first_message_only(self) -> None:
        """Scope: every further message is an execution of its own in the same request."""
        with correlate(source="webhook", webhook_id="w") as correlation:
            first, second = members(sent()), members(sent())
        assert first["otelexec.execution_id"] == correlation.execution_id
        assert second["otelexec.execution_id"] != correlation.execution_id
        assert first["otelexec.request_id"] == second["otelexec.request_id"] == correlation.request_id
        assert second["otelexec.webhook_id"] == "w"

    def test_without_a_scope_each_message_is_an_execution_of_its_own(self) -> None:
        """Minted ids, source `direct`."""
        first, second = members(sent()), members(sent())
        assert first["otelexec.source"] == "direct"
        assert first["otelexec.execution_id"] != second["otelexec.execution_id"]
        assert first["otelexec.request_id"] != second["otelexec.request_id"]

    def test_a_message_sent_in_an_execution_is_its_child(self, execution: Running) -> None:
        """A new id, the same request, the execution as the parent."""
        message = members(sent())
        assert message["otelexec.execution_id"] != execution.id
        assert message["otelexec.parent_execution_id"] == execution.id
        assert message["otelexec.request_id"] == execution.correlation.request_id
        assert execution.retries == 0

    def test_a_retry_keeps_the_executions_id(self, execution: Running) -> None:
        """Seed behaviour 45: and the execution is told, so that its failure ends as `retrying`."""
        assert members(sent(retry=True))["otelexec.execution_id"] == execution.id
        assert execution.retries == 1

    def test_a_retry_sent_around_the_execution_keeps_the_scopes_id(self) -> None:
        """Whoever catches the failure outside asks for the same work again."""
        with correlate(source="x") as correlation:
            scope = current_scope()
            assert scope is not None
            scope.take()
            assert members(sent(retry=True))["otelexec.execution_id"] == correlation.execution_id

    def test_a_scope_opened_in_an_execution_lends_its_request_and_fields(self, execution: Running) -> None:
        """The parent is the execution all the same, and its id is not the scope's."""
        with correlate(source="webhook", webhook_id="w", request_id="r") as correlation:
            message = members(sent())
        assert message["otelexec.request_id"] == "r"
        assert message["otelexec.webhook_id"] == "w"
        assert message["otelexec.parent_execution_id"] == execution.id
        assert message["otelexec.execution_id"] not in {execution.id, correlation.execution_id}

    def test_dropped_members_are_named_in_one_warning_without_their_values(self, caplog: pytest.LogCaptureFixture) -> None:
        """Seed behaviour 46: excess is reported; what is in it is nobody's business."""
        token = otel_context.attach(baggage.set_baggage("big", "secret" * 2_000, context=Context()))
        try:
            with correlate(source="x", attributes={"huge": "private" * 2_000}), caplog.at_level(logging.WARNING):
                headers = sent()
        finally:
            otel_context.detach(token)
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        assert "otelexec.baggage.dropped" in record.getMessage()
        assert "'otelexec.huge', 'big'" in record.getMessage()
        assert "secret" not in record.getMessage()
        assert set(members(headers)) == {"otelexec.execution_id", "otelexec.request_id", "otelexec.source"}

    def test_open_spans_are_announced_before_their_ids_leave(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """And a store that fails there does not keep the message back."""
        headers: dict[str, str] = {}
        seen: list[dict[str, str]] = []

        def before_send(context: Context) -> None:
            seen.append(dict(headers))
            raise OSError("disk full")

        monkeypatch.setattr(runtime, "before_send", before_send)
        inject_headers(headers)
        assert seen == [{}]
        assert "baggage" in headers
        assert "disk full" in caplog.text


class TestIn:
    @given(any_carrier, st.booleans(), st.none() | any_text)
    def test_no_carrier_of_any_kind_raises(self, carrier: object, trusted: bool, message_id: str | None) -> None:
        """Must-hold 6: whatever the object is, the work runs, under valid ids."""
        for extract in (extract_headers, extract_env):
            with extract(carrier, trusted=trusted, message_id=message_id) as scope:
                assert 1 <= len(scope.correlation.execution_id) <= 128
                inner = sent()
                assert len(inner["baggage"]) <= 8_192
                assert GRAMMAR.fullmatch(inner["baggage"])
                assert members(inner)["otelexec.execution_id"] == scope.correlation.execution_id
            assert current_scope() is None
            assert baggage.get_all() == {}

    @pytest.mark.parametrize("kind", ["items raise", "hostile attributes", "class", "generator", "odd pairs"])
    def test_hostile_objects_never_raise(self, kind: str) -> None:
        """Objects that fail in every question that is asked of them."""

        class Hostile:
            def __getattr__(self, name: str) -> Any:
                raise RuntimeError(name)

        class Items:
            def items(self) -> Iterator[Any]:
                yield "baggage", "otelexec.execution_id=e1"
                raise RuntimeError

        carriers: dict[str, Any] = {
            "items raise": Items(),
            "hostile attributes": Hostile(),
            "class": dict,
            "generator": (pair for pair in [("baggage", "k=v")]),
            "odd pairs": [None, 1, "ab", ("baggage",), (1, 2, 3), ({}, []), ("baggage", {}), ("baggage", "otelexec.execution_id=e1")],
        }
        with extract_headers(carriers[kind]) as scope:
            assert scope.correlation.execution_id
            assert (scope.correlation.execution_id == "e1") == (kind in {"items raise", "odd pairs"})

    @pytest.mark.parametrize(
        "headers",
        [
            {"Traceparent": TRACEPARENT, "BAGGAGE": "otelexec.execution_id=e,k=v"},
            [("traceparent", TRACEPARENT), ("baggage", "otelexec.execution_id=e"), ("baggage", "k=v")],
            [(b"TRACEPARENT", TRACEPARENT.encode()), (b"Baggage", b"otelexec.execution_id=e,k=v")],
            {"traceparent": [TRACEPARENT], "baggage": ["otelexec.execution_id=e", b"k=v"]},
            SimpleNamespace(items=lambda: [("traceparent", TRACEPARENT), ("baggage", "otelexec.execution_id=e, k=v")]),
        ],
    )
    def test_headers_are_found_in_any_shape_and_case(self, headers: object) -> None:
        """Mappings, pairs, multi-dicts; text or bytes; one header or several."""
        with extract_headers(headers) as scope:
            assert scope.correlation.execution_id == "e"
            assert current_trace() == TRACEPARENT[3:35]
            assert baggage.get_baggage("k") == "v"

    def test_the_receiver_continues_the_trace_the_request_and_the_fields(self) -> None:
        """Seed behaviours 36 and 43: payload, span parent and record start from the same correlation."""
        token = otel_context.attach(remote())
        try:
            with correlate(source="schedule", schedule_id="s", attributes={"customer": "ä"}) as sender:
                headers = sent()
        finally:
            otel_context.detach(token)
        with extract_headers(headers) as scope:
            assert scope.correlation == sender
            assert scope.trusted
            assert scope.take() is scope.correlation
            assert current_trace() == TRACEPARENT[3:35]
            assert "otelexec.execution_id" not in baggage.get_all()
            assert baggage.get_baggage("otelexec.request_id") == sender.request_id

    def test_nothing_is_left_for_the_next_job(self) -> None:
        """Seed behaviour 44: neither ids nor foreign baggage nor the trace of one job is seen by the next."""
        with extract_headers({"traceparent": TRACEPARENT, "baggage": "otelexec.execution_id=e1,otelexec.x=1,tenant=a"}):
            pass
        with extract_headers({}) as scope:
            assert scope.correlation.source == "direct"
            assert baggage.get_baggage("tenant") is None
            assert not trace.get_current_span().get_span_context().is_valid

    def test_a_leaked_context_of_the_previous_job_is_replaced_by_the_messages(self) -> None:
        """Even where something forgot to detach: members of ours go, and so does foreign baggage when the message has a context."""
        stale = Context()
        for name in ("otelexec.request_id", "otelexec.webhook_id", "tenant"):
            stale = baggage.set_baggage(name, "stale", context=stale)
        token = otel_context.attach(stale)
        try:
            with extract_headers({"baggage": "otelexec.execution_id=e,region=eu"}) as scope:
                assert set(baggage.get_all()) == {"otelexec.request_id", "otelexec.source", "region"}
                assert scope.correlation.request_id == "e"
            with extract_headers({}):
                assert baggage.get_baggage("otelexec.webhook_id") is None
                assert baggage.get_baggage("tenant") == "stale"  # nothing came to replace what the process set itself
        finally:
            otel_context.detach(token)

    def test_a_carrier_without_a_trace_leaves_the_current_span_alone(self) -> None:
        """As every propagator of OpenTelemetry does."""
        token = otel_context.attach(remote())
        try:
            with extract_headers({"baggage": "k=v"}):
                assert current_trace() == TRACEPARENT[3:35]
        finally:
            otel_context.detach(token)

    def test_a_message_without_ids_takes_its_own(self) -> None:
        """Seed behaviour 39: the same for each delivery, and the request follows it."""
        with extract_headers({"x": "y"}, message_id="job-1") as first, extract_headers(None, message_id="job-1") as second:
            assert first.correlation.execution_id == second.correlation.execution_id == "job-1"
            assert first.correlation.request_id == "job-1"
        with extract_headers({"baggage": "otelexec.execution_id=e"}, message_id="job-1") as scope:
            assert scope.correlation.execution_id == "e"
            assert scope.message_id == "job-1"

    def test_inside_an_execution_only_request_and_fields_change(self, execution: Running) -> None:
        """Nesting: its span stays current, the trace from elsewhere is linked."""
        own_trace = otel_context.attach(trace.set_span_in_context(trace.get_current_span(remote())))
        try:
            with extract_headers(
                {"traceparent": OTHER_TRACEPARENT, "baggage": "otelexec.execution_id=e,otelexec.request_id=r,k=v"}
            ) as scope:
                assert current_trace() == TRACEPARENT[3:35]
                assert scope.execution is execution
                assert [format(link.context.trace_id, "032x") for link in scope.links] == [OTHER_TRACEPARENT[3:35]]
                assert baggage.get_baggage("otelexec.parent_execution_id") == execution.id
                message = members(sent())
        finally:
            otel_context.detach(own_trace)
        assert message["otelexec.request_id"] == "r"
        assert message["otelexec.parent_execution_id"] == execution.id
        assert message["k"] == "v"

    def test_a_message_that_says_nothing_changes_nothing_inside_an_execution(self, execution: Running) -> None:
        """No new request appears in the middle of one."""
        with extract_headers({}) as scope:
            assert scope.correlation.request_id == execution.correlation.request_id

    def test_settings_that_cannot_be_read_never_stop_the_work(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """And nothing is believed then: a signing key may be among them."""

        def broken() -> None:
            raise SettingsError("OTELEXEC_LEASE_SECONDS: wrong")

        monkeypatch.setattr(runtime, "settings", broken)
        with extract_headers({"baggage": "otelexec.execution_id=e"}) as scope:
            assert scope.correlation.execution_id != "e"
            assert not scope.trusted
        assert "OTELEXEC_LEASE_SECONDS" in caplog.text


class TestTrust:
    def test_an_untrusted_caller_names_nothing_and_is_linked(self) -> None:
        """Its members of ours are gone, the ids are new, its trace is a link, and its own baggage stays."""
        headers = {"traceparent": TRACEPARENT, "baggage": "otelexec.execution_id=victim,otelexec.request_id=r,otelexec.x=1,tenant=a"}
        with extract_headers(headers, trusted=False, message_id="victim") as scope:
            assert not scope.trusted
            assert scope.correlation.execution_id != "victim"
            assert scope.correlation.request_id != "r"
            assert dict(scope.correlation.fields) == {}
            assert [format(link.context.trace_id, "032x") for link in scope.links] == [TRACEPARENT[3:35]]
            assert trace.get_current_span() is trace.INVALID_SPAN
            assert baggage.get_baggage("tenant") == "a"
            assert members(sent())["tenant"] == "a"

    @given(st.dictionaries(any_text, any_text, max_size=5), any_text, any_text)
    def test_no_untrusted_header_takes_over_an_id(self, extra: dict[str, str], execution_id: str, request_id: str) -> None:
        """Must-hold 6, for any members."""
        header, _ = w3c.encode_baggage({"otelexec.execution_id": execution_id, "otelexec.request_id": request_id}, extra)
        with extract_headers({"baggage": header}, trusted=False, message_id=execution_id) as scope:
            assert scope.correlation.execution_id != execution_id
            assert scope.correlation.request_id != request_id

    @pytest.mark.parametrize("blank", ["\xa0", "\x85", "+"])
    def test_nor_does_one_that_comes_out_at_the_next_reader(self, blank: str) -> None:
        """Servers give header bytes as Latin-1, which has blanks beyond ASCII; what passes an edge is trusted behind it."""
        with extract_headers({"baggage": f"{blank}otelexec.execution_id=victim,tenant=a"}, trusted=False):
            passed_on = sent()
        assert "victim" not in passed_on["baggage"]
        assert members(passed_on)["tenant"] == "a"

    def test_a_signed_header_is_believed_and_a_changed_one_is_not(self, keys: Any, caplog: pytest.LogCaptureFixture) -> None:
        """With a key set; one warning says why."""
        keys("secret")
        headers = sent()
        with extract_headers(headers) as scope:
            assert scope.trusted
            assert scope.correlation.execution_id == members(headers)["otelexec.execution_id"]
        assert not caplog.records
        for change in ({"baggage": headers["baggage"] + ",otelexec.extra=1"}, {"otelexec-signature": "v1=é"}, {"baggage": ""}):
            caplog.clear()
            with extract_headers(headers | change) as scope:
                assert not scope.trusted
                assert scope.correlation.execution_id != members(headers)["otelexec.execution_id"]
            assert [record.levelno for record in caplog.records] == [logging.WARNING]

    def test_an_unsigned_header_is_not_believed_where_a_key_is_set(self, keys: Any, caplog: pytest.LogCaptureFixture) -> None:
        """Nor is the message's own id, which its sender may have chosen."""
        headers = sent()
        keys("secret")
        with extract_headers(headers, message_id="victim") as scope:
            assert not scope.trusted
            assert scope.correlation.execution_id not in {members(headers)["otelexec.execution_id"], "victim"}
        assert "is not signed" in caplog.text

    def test_foreign_baggage_may_change_on_the_way(self, keys: Any) -> None:
        """The signature covers our members; proxies add theirs."""
        keys("secret")
        headers = sent()
        headers["baggage"] = "proxy=1," + headers["baggage"]
        with extract_headers(headers) as scope:
            assert scope.trusted

    def test_a_signature_bound_to_a_message_serves_no_other(self, keys: Any) -> None:
        """A captured header can't be put on another message; one made before the message had an id still counts."""
        keys("secret")
        bound, free = sent(message_id="m1"), sent()
        for headers, message_id, believed in ((bound, "m1", True), (bound, "m2", False), (bound, None, False), (free, "m1", True)):
            with extract_headers(headers, message_id=message_id) as scope:
                assert scope.trusted is believed

    def test_keys_can_be_rotated(self, keys: Any) -> None:
        """The first signs, all verify."""
        keys("old")
        signed = sent()
        keys("new, old")
        renewed = sent()
        with extract_headers(signed) as scope:
            assert scope.trusted
        keys("new")
        with extract_headers(renewed) as scope:
            assert scope.trusted
        with extract_headers(signed) as scope:
            assert not scope.trusted

    def test_the_environment_is_signed_too(self, keys: Any) -> None:
        """OTELEXEC_SIGNATURE."""
        keys("secret")
        environ: dict[str, str] = {}
        inject_env(environ)
        with extract_env(environ) as scope:
            assert scope.trusted
        del environ["OTELEXEC_SIGNATURE"]
        with extract_env(environ) as scope:
            assert not scope.trusted


class TestSteps:
    def test_an_adapter_can_do_it_in_steps(self) -> None:
        """Ids first, then the queued record, then the headers; on the other side a context to attach."""
        with correlate(source="x") as correlation:
            context = otel_context.get_current()
            message = propagation.outgoing(context)
            carried = propagation.entries(context, message, message_id="m")
        assert message is correlation
        meta = json.loads(json.dumps(carried))
        base, scope = propagation.incoming(read_headers(meta), message_id="m", context=Context())
        assert isinstance(scope, Scope)
        assert scope.correlation == message
        assert current_scope() is None
        assert current_scope(base) is scope
