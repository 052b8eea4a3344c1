"""OTLP bytes -> spans as a receiver reads them, and a request in halves: never on the hot path."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.sdk.resources import SERVICE_NAME

from otelexec.otlp import wrap

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_FIXED_SIZES: Final = {1: 8, 5: 4}  # bytes of a field's value by wire type
_SERVICE_NAME: Final = SERVICE_NAME.encode()


@dataclass(frozen=True, slots=True)
class DecodedEvent:
    """
    A span event.

    Attributes:
        name: Its name.
        unix_ns: When it happened, in ns since the epoch.
        attributes: As Python values.
    """

    name: str
    unix_ns: int
    attributes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DecodedLink:
    """
    A link to another span.

    Attributes:
        trace_id: Lowercase hex.
        span_id: Lowercase hex.
        attributes: As Python values.
    """

    trace_id: str
    span_id: str
    attributes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DecodedSpan:
    """
    A span as a receiver reads it.

    Attributes:
        trace_id: Lowercase hex.
        span_id: Lowercase hex.
        parent_span_id: Lowercase hex; None for a root.
        name: Its name.
        kind: internal, server, client, producer, consumer or unspecified.
        start_unix_ns: Start in ns since the epoch.
        end_unix_ns: End in ns since the epoch.
        status: unset, ok or error.
        status_message: Empty unless status is error.
        attributes: As Python values; arrays are lists.
        resource: The resource's attributes.
        events: In order of time.
        links: In the order in which they were added.
        trace_state: The `tracestate` header's text, empty without one.
        scope: Name of the instrumentation scope.
        encoded: The bytes of the Span message as they came.
    """

    trace_id: str
    span_id: str
    parent_span_id: str | None
    name: str
    kind: str
    start_unix_ns: int
    end_unix_ns: int
    status: str
    status_message: str
    attributes: dict[str, Any]
    resource: dict[str, Any]
    events: tuple[DecodedEvent, ...]
    links: tuple[DecodedLink, ...]
    trace_state: str
    scope: str
    encoded: bytes = field(repr=False)


def decode(request: bytes) -> list[DecodedSpan]:
    """
    Read every span of an ExportTraceServiceRequest, or of several put one after the other.

    Raises:
        ValueError: The bytes are no such request.
    """
    # Imported here: the hot path needs no protobuf, and its import takes longer than ours.
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    try:
        message = ExportTraceServiceRequest.FromString(request)
    except Exception as error:
        raise ValueError(f"not an OTLP trace request: {error}") from None
    encoded = _span_messages(request)
    return [
        _decoded(span, _values(group.resource.attributes), scoped.scope.name, next(encoded))
        for group in message.resource_spans
        for scoped in group.scope_spans
        for span in scoped.spans
    ]


def halves(request: bytes) -> tuple[tuple[bytes, int], ...]:
    """
    Divide the spans of a request between two, without changing a byte of any.

    Args:
        request: A request, or several put one after the other.

    Returns:
        Two requests, each with the number of its spans; none where there is but one span, or nothing that can be read.
    """
    try:
        spans = [
            (_without(group, 0x12), _without(scoped, 0x12), span)
            for group in _fields(request, 0x0A)
            for scoped in _fields(group, 0x12)
            for span in _fields(scoped, 0x12)
        ]
    except IndexError:
        return ()
    middle = len(spans) // 2
    return tuple((_joined(half), len(half)) for half in (spans[:middle], spans[middle:])) if middle else ()


def _joined(spans: Iterable[tuple[bytes, bytes, bytes]]) -> bytes:
    """Make a request of spans, each with the other fields of its ResourceSpans and of its ScopeSpans."""
    groups: dict[bytes, dict[bytes, list[bytes]]] = {}
    for resource, scope, span in spans:
        groups.setdefault(resource, {}).setdefault(scope, []).append(span)
    return b"".join(wrap(resource, scopes) for resource, scopes in groups.items())


@lru_cache(maxsize=1024)
def service_name(resource: bytes) -> str | None:
    """
    Give the `service.name` of a resource as the record of a process has it, without the protobuf that `list` would import for it.

    Args:
        resource: What `otlp.encode_resource` gave; anything else has no name.
    """
    try:
        for body in _fields(resource, 0x0A):  # resource (1)
            for pair in _fields(body, 0x0A):  # attributes (1)
                if _SERVICE_NAME in _fields(pair, 0x0A):  # key (1)
                    return next(
                        text.decode("utf-8") for value in _fields(pair, 0x12) for text in _fields(value, 0x0A)
                    )  # value (2), string (1)
    except (IndexError, StopIteration, ValueError):
        pass
    return None


def _decoded(span: Any, resource: dict[str, Any], scope: str, encoded: bytes) -> DecodedSpan:
    return DecodedSpan(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_span_id=span.parent_span_id.hex() or None,
        name=span.name,
        kind=_enum_name(span, "kind", span.kind),
        start_unix_ns=span.start_time_unix_nano,
        end_unix_ns=span.end_time_unix_nano,
        status=_enum_name(span.status, "code", span.status.code),
        status_message=span.status.message,
        attributes=_values(span.attributes),
        resource=resource,
        events=tuple(DecodedEvent(event.name, event.time_unix_nano, _values(event.attributes)) for event in span.events),
        links=tuple(DecodedLink(link.trace_id.hex(), link.span_id.hex(), _values(link.attributes)) for link in span.links),
        trace_state=span.trace_state,
        scope=scope,
        encoded=encoded,
    )


def _enum_name(message: Any, name: str, number: int) -> str:
    """Give an enum value's own word: SPAN_KIND_SERVER is `server`, STATUS_CODE_OK is `ok`."""
    known = message.DESCRIPTOR.fields_by_name[name].enum_type.values_by_number.get(number)
    return known.name.rpartition("_")[2].lower() if known else str(number)


def _values(pairs: Iterable[Any]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return _values(value.kvlist_value.values)
    return getattr(value, kind) if kind else None


def _span_messages(request: bytes) -> Iterator[bytes]:
    """Give the bytes of each span of a valid request, in order: resource_spans (1), scope_spans (2), spans (2)."""
    for group in _fields(request, 0x0A):
        for scoped in _fields(group, 0x12):
            yield from _fields(scoped, 0x12)


def _fields(message: bytes, wanted: int) -> Iterator[bytes]:
    """Give the bodies of a valid message's length-delimited fields with this tag, and skip all others."""
    for tag, _, body, end in _walk(message):
        if tag == wanted:
            yield message[body:end]


def _without(message: bytes, left_out: int) -> bytes:
    """Give a valid message without its fields with this tag."""
    return b"".join(message[start:end] for tag, start, _, end in _walk(message) if tag != left_out)


def _walk(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Give tag, start, start of the value and end of each field of a valid message."""
    at = 0
    while at < len(message):
        start = at
        tag, body = _read_varint(message, at)
        if tag & 7 == 0:
            _, at = _read_varint(message, body)
        elif tag & 7 in _FIXED_SIZES:
            at = body + _FIXED_SIZES[tag & 7]
        else:
            size, body = _read_varint(message, body)
            at = body + size
        yield tag, start, body, at


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004 (the last byte of a varint)
            return value, at
        shift += 7
