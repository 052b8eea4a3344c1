"""Our OTLP bytes against the SDK's own encoder, and what may be done with them without decoding."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceState

from otelexec import otlp
from otelexec.decoded import decode, service_name

CONTEXT = SpanContext(0x0AF7651916CD43DD8448EB211C80319C, 0x00F067AA0BA902B7, is_remote=False)
RESOURCE = Resource({"service.name": "billing"}, "https://opentelemetry.io/schemas/1.44.0")
SCOPE = InstrumentationScope("otelexec", "0.1.0")


def plain_span(**changes: Any) -> ReadableSpan:
    """Make a finished span without a tracer, so that any field can be set."""
    fields = {"context": CONTEXT, "resource": RESOURCE, "instrumentation_scope": SCOPE, "start_time": 1_000, "end_time": 2_000}
    return ReadableSpan(**{"name": "invoice.run", **fields, **changes})


def our_request(span: ReadableSpan, **changes: Any) -> bytes:
    groups = {otlp.encode_scope(span.instrumentation_scope): [otlp.encode_span(span, **changes)]}
    return otlp.wrap(otlp.encode_resource(span.resource), groups)


def canonical(request: bytes) -> bytes:
    """Parse and serialise again: equal exactly when the messages are equal, NaN included."""
    return bytes(ExportTraceServiceRequest.FromString(request).SerializeToString(deterministic=True))


def sdk_request(*spans: ReadableSpan) -> bytes:
    return bytes(encode_spans(spans).SerializeToString(deterministic=True))


# What OpenTelemetry 1.27, the oldest supported, does not encode yet.
_PROBE = encode_spans([plain_span(attributes={"a": [None]}, instrumentation_scope=InstrumentationScope("x", attributes={"a": 1}))])
SDK_TAKES_NONE = bool(_PROBE.resource_spans[0].scope_spans[0].spans[0].attributes)
SDK_TAKES_WHOLE_SCOPE = bool(_PROBE.resource_spans[0].scope_spans[0].scope.attributes)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=200) | st.text("a", min_size=100, max_size=20_000)
scalars = st.one_of(
    texts,
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-300, 300),
    st.floats(),
    st.binary(max_size=200),
    *([st.none()] if SDK_TAKES_NONE else []),
)
nested = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.tuples(inner) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
# The older SDK's own cleaning puts None, which it can't encode, in the place of an inner list.
values = nested if SDK_TAKES_NONE else scalars | st.lists(texts, max_size=4)
attributes = st.none() | st.dictionaries(texts, values, max_size=6)
nanoseconds = st.integers(0, 2**64 - 1)
trace_states = st.sampled_from([None, TraceState(), TraceState([("a", "1")]), TraceState([("b@c", "x=y"), ("d", "!")])])
contexts = st.builds(SpanContext, st.integers(0, 2**128 - 1), st.integers(0, 2**64 - 1), st.booleans(), trace_state=trace_states)
statuses = st.builds(Status, st.sampled_from([StatusCode.UNSET, StatusCode.OK])) | st.builds(
    Status, st.just(StatusCode.ERROR), st.none() | texts
)
schema_urls = st.none() | st.just("https://example.org/schema")
scopes = st.none() | (
    st.builds(InstrumentationScope, texts, st.none() | texts, schema_urls, st.none() | st.dictionaries(texts, texts, max_size=2))
    if SDK_TAKES_WHOLE_SCOPE
    else st.builds(InstrumentationScope, texts, st.none() | texts)
)
spans = st.builds(
    ReadableSpan,
    name=texts,
    context=contexts,
    parent=st.none() | contexts,
    resource=st.builds(Resource, st.dictionaries(texts, st.text("ab") | st.integers(0, 500), max_size=4), schema_urls),
    attributes=attributes,
    events=st.lists(st.builds(Event, texts, attributes, nanoseconds), max_size=3),
    links=st.lists(st.builds(Link, contexts, attributes), max_size=3),
    kind=st.sampled_from(SpanKind),
    status=statuses,
    start_time=st.none() | nanoseconds,
    end_time=st.none() | nanoseconds,
    instrumentation_scope=scopes,
)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """Keep the SDK's warnings about cleaned attributes out of a thousand examples."""
    logging.getLogger("opentelemetry.attributes").setLevel(logging.CRITICAL)


@given(spans)
def test_any_span_reads_as_the_sdk_encodes_it(span: ReadableSpan) -> None:
    """For every field and value that the SDK can encode, both requests parse to equal messages."""
    assert canonical(our_request(span)) == sdk_request(span)


@given(st.dictionaries(texts, values, max_size=6), st.integers(0, 4))
def test_a_recorded_span_with_dropped_parts_reads_as_the_sdk_encodes_it(given_attributes: dict[str, Any], limit: int) -> None:
    """Counts of dropped attributes, events and links, also inside events and links, arrive as the SDK counts them."""
    limits = SpanLimits(max_attributes=limit, max_events=1, max_links=1, max_event_attributes=1, max_link_attributes=1)
    tracer = TracerProvider(resource=RESOURCE, span_limits=limits, shutdown_on_exit=False).get_tracer("tests")
    span = tracer.start_span("run", links=[Link(CONTEXT, given_attributes), Link(CONTEXT)], attributes=given_attributes)
    span.add_event("one", given_attributes)
    span.add_event("two", given_attributes)
    span.end()
    assert isinstance(span, ReadableSpan)
    assert canonical(our_request(span)) == sdk_request(span)


@given(spans, nanoseconds, st.dictionaries(texts, values, max_size=4), st.integers(0, 2), texts)
def test_a_start_completed_later_reads_as_the_whole_span(
    span: ReadableSpan, end: int, added: dict[str, Any], code: int, message: str
) -> None:
    """Start bytes with the end appended parse to the span that one encoding would have given."""
    begun = span.attributes or {}
    added = {key: value for key, value in added.items() if key not in begun}
    completed = otlp.complete_start(
        otlp.encode_start(span), end_unix_ns=end, attributes=added, status_code=code, status_message=message, events=span.events
    )
    at_once = otlp.encode_span(span, end_unix_ns=end, extra_attributes=added, status=(code, message))
    parsed = [SpanMessage.FromString(encoded) for encoded in (completed, at_once)]
    for each in parsed:
        assert each.end_time_unix_nano == end
        assert (each.status.code, each.status.message) == (code, message)
    assert parsed[0].SerializeToString() == parsed[1].SerializeToString()


@given(st.lists(spans, max_size=4))
def test_requests_one_after_the_other_are_one_request(several: list[ReadableSpan]) -> None:
    """Concatenated requests parse as one request with every span in order, each with its own resource and scope."""
    joined = decode(b"".join(our_request(span) for span in several))
    apart = [decoded for span in several for decoded in decode(our_request(span))]
    assert repr(joined) == repr(apart)
    assert [span.encoded for span in joined] == [otlp.encode_span(span) for span in several]


@given(st.lists(st.tuples(st.sampled_from([SCOPE, InstrumentationScope("other"), None]), texts), max_size=6))
def test_one_request_holds_spans_of_several_scopes(named: list[tuple[InstrumentationScope | None, str]]) -> None:
    """Spans grouped by scope arrive as the SDK groups them."""
    several = [plain_span(name=name, instrumentation_scope=scope) for scope, name in named]
    groups: dict[bytes, list[bytes]] = {}
    for span in several:
        groups.setdefault(otlp.encode_scope(span.instrumentation_scope), []).append(otlp.encode_span(span))
    if several:
        assert canonical(otlp.wrap(otlp.encode_resource(RESOURCE), groups)) == sdk_request(*several)


@given(st.text(st.characters()), st.text(st.characters(), min_size=1), st.text(st.characters()))
def test_lone_surrogates_are_kept_readable_everywhere(name: str, key: str, text: str) -> None:
    """Text that UTF-8 can't hold never raises and never drops anything: the surrogate is spelled out."""
    span = plain_span(
        name=name,
        attributes={key: text, "list": [text, {text: text}]},
        events=[Event(name, {key: text}, 1)],
        links=[Link(CONTEXT, {key: text})],
        status=Status(StatusCode.ERROR, text),
    )
    [read] = decode(our_request(span))
    expected = text.encode("utf-8", "backslashreplace").decode()
    assert read.name == name.encode("utf-8", "backslashreplace").decode()
    assert read.attributes["list"] == [expected, {expected: expected}]
    assert read.status_message == expected
    assert list(read.events[0].attributes.values()) == [expected]
    assert list(read.links[0].attributes.values()) == [expected]


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, [1, 2**70], {"deep": 2**64}, object(), {1, 2}, 1j])
def test_a_value_that_otlp_has_no_room_for_is_left_out_as_the_sdk_does(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Integers beyond 64 bits and foreign types cost their attribute, with a warning, and nothing else."""
    span = plain_span(attributes={"before": 1, "bad": value, "after": "x"})
    encoded = our_request(span)
    assert "'bad'" in caplog.text
    assert canonical(encoded) == sdk_request(span)
    assert decode(encoded)[0].attributes == {"before": 1, "after": "x"}


def test_nesting_that_receivers_refuse_costs_only_its_attribute(caplog: pytest.LogCaptureFixture) -> None:
    """A value nested beyond protobuf's limit would make the whole request unreadable, so it is left out."""
    value: Any = 1
    for _ in range(200):
        value = [value]
    assert decode(our_request(plain_span(attributes={"deep": value, "kept": "x"})))[0].attributes == {"kept": "x"}
    assert "nested deeper" in caplog.text
    allowed: Any = {"a": 1}
    for _ in range(23):
        allowed = {"a": allowed}
    assert decode(our_request(plain_span(attributes={"deep": allowed})))[0].attributes == {"deep": allowed}


@pytest.mark.parametrize(("given_ns", "read"), [(-5, 0), (2**64 + 5, 2**64 - 1), (7.9, 7)])
def test_a_time_out_of_range_is_clamped(given_ns: Any, read: int) -> None:
    """A clock gone wild never costs the span."""
    span = decode(our_request(plain_span(start_time=given_ns, end_time=given_ns)))[0]
    assert (span.start_unix_ns, span.end_unix_ns) == (read, read)


def test_overrides_replace_what_the_span_says() -> None:
    """Another span id, end, status, attribute and link: what an outcome observed after `lost` needs."""
    span = plain_span(attributes={"otelexec.outcome": "lost", "kept": True}, links=[Link(CONTEXT)])
    [read] = decode(
        our_request(
            span,
            span_id=0xABC,
            end_unix_ns=9_000,
            status=(2, "boom"),
            extra_attributes={"otelexec.outcome": "failed", "more": 1.5},
            extra_links=[Link(SpanContext(5, 6, is_remote=True), {"why": "observed"})],
        )
    )
    assert read.span_id == "0000000000000abc"
    assert (read.start_unix_ns, read.end_unix_ns) == (1_000, 9_000)
    assert (read.status, read.status_message) == ("error", "boom")
    assert read.attributes == {"otelexec.outcome": "failed", "kept": True, "more": 1.5}
    assert [(link.span_id, link.attributes) for link in read.links] == [
        ("00f067aa0ba902b7", {}),
        ("0000000000000006", {"why": "observed"}),
    ]


def test_a_decoded_span_shows_every_field() -> None:
    """What `decode` gives to people and tests: hex ids, words for kind and status, Python values."""
    span = plain_span(
        parent=SpanContext(CONTEXT.trace_id, 0xFF, is_remote=True),
        kind=SpanKind.CONSUMER,
        attributes={"a": ["x", 1], "b": b"\x00", "c": {"d": 2.5}},
        events=[Event("exception", {"exception.type": "ValueError"}, 1_500)],
        status=Status(StatusCode.ERROR, "boom"),
    )
    [read] = decode(our_request(span))
    assert (read.trace_id, read.span_id) == ("0af7651916cd43dd8448eb211c80319c", "00f067aa0ba902b7")
    assert read.parent_span_id == "00000000000000ff"
    assert (read.name, read.kind, read.scope) == ("invoice.run", "consumer", "otelexec")
    assert (read.status, read.status_message) == ("error", "boom")
    assert read.attributes == {"a": ["x", 1], "b": b"\x00", "c": {"d": 2.5}}
    assert read.resource == {"service.name": "billing"}
    assert [(event.name, event.unix_ns, event.attributes) for event in read.events] == [
        ("exception", 1_500, {"exception.type": "ValueError"})
    ]
    assert decode(our_request(plain_span()))[0].parent_span_id is None


@pytest.mark.parametrize("junk", [b"\x0a\xff", b"not protobuf", b"\xff" * 20])
def test_bytes_that_are_no_request_are_a_value_error(junk: bytes) -> None:
    """Whoever reads a request from outside has one error to catch."""
    with pytest.raises(ValueError, match="not an OTLP trace request"):
        decode(junk)


@given(name=st.text(), others=st.dictionaries(st.text(), st.text() | st.integers(0, 2**40)))
def test_the_service_is_found_in_an_encoded_resource(name: str, others: dict[str, Any]) -> None:
    others.pop("service.name", None)
    encoded = otlp.encode_resource(Resource({**others, "service.name": name, "service.version": "1"}, schema_url="https://x"))
    assert service_name(encoded) == name
    assert service_name(otlp.encode_resource(Resource(others))) is None


@given(st.binary())
def test_what_is_no_resource_names_no_service(damaged: bytes) -> None:
    assert service_name(damaged) is None
    assert service_name(b"\x0a\x7f" + damaged) is None


def test_resource_and_scope_are_encoded_once_per_object() -> None:
    """The cache goes by identity, gives the same bytes object again, and stays right when it overflows."""
    resource, scope = Resource({"service.name": "a"}), InstrumentationScope("s")
    assert otlp.encode_resource(resource) is otlp.encode_resource(resource)
    assert otlp.encode_scope(scope) is otlp.encode_scope(scope)
    for number in range(1_000):
        made = Resource({"service.name": str(number)})
        span = decode(otlp.wrap(otlp.encode_resource(made), {b"\x0a\x00": [otlp.encode_span(plain_span())]}))[0]
        assert span.resource == {"service.name": str(number)}


def test_attribute_keys_without_end_stay_within_bounds() -> None:
    """A program that makes up keys fills no memory and still gets every attribute."""
    for start in range(0, 10_000, 100):
        made = {f"key-{number}": number for number in range(start, start + 100)}
        assert decode(our_request(plain_span(attributes=made)))[0].attributes == made
    assert len(otlp._prefixes) <= 2_048


def test_an_event_of_any_class_will_do() -> None:
    """A reconciler may hand over events that are no SDK objects: name, timestamp and attributes are all it takes."""
    event: Any = SimpleNamespace(name="progress", timestamp=5, attributes=None)
    ended = otlp.complete_start(
        otlp.encode_start(plain_span()), end_unix_ns=10, attributes={}, status_code=2, status_message="lost", events=[event]
    )
    [read] = decode(otlp.wrap(otlp.encode_resource(RESOURCE), {otlp.encode_scope(SCOPE): [ended]}))
    assert [(each.name, each.unix_ns) for each in read.events] == [("progress", 5)]
    assert (read.status, read.status_message) == ("error", "lost")
