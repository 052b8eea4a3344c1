r"""
Spans as OTLP bytes: the one place where the cost of encoding is worth hand-written protobuf.

The SDK builds protobuf objects and serialises them, which costs several times as much as the span itself. This module
joins the bytes directly; property tests hold it to the SDK's `encode_spans`, message by message. It differs where the
SDK would lose something: text with lone surrogates is kept with the surrogate spelled out (`\ud800`), where the SDK
drops the attribute, or raises if it is the span's name; and times and counts out of range are clamped. Nothing here
raises because of a span's content.

Two properties of the protobuf wire format carry much of the design (protobuf.dev, "Encoding", section "Last One Wins"):
the concatenation of two messages of one type is their merge, and repeated fields append. So the bytes that are known
when a span starts can be completed later by another process without being parsed, and requests that wait in the outbox
become one request by being put one after the other.

Field numbers: opentelemetry/proto/trace/v1/trace.proto, common.proto, resource.proto (all stable).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from struct import Struct
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.trace import SpanKind, StatusCode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import Link, SpanContext

_logger = logging.getLogger(__name__)


_MAX_U32: Final = 2**32 - 1
_MAX_U64: Final = 2**64 - 1
_MAX_U128: Final = 2**128 - 1
_SHORT: Final = 128  # lengths below it take one byte as a varint

# Receivers refuse messages nested deeper than 100 (protobuf's default), and each level of a value takes three of them
# at most. One attribute must not make a span undeliverable.
_MAX_DEPTH: Final = 24
# Attribute keys are few in any sane program; the bound is for one that makes them up.
_MAX_KEYS: Final = 2_048
_MAX_OBJECTS: Final = 256

# The heads of length-delimited fields with a short length, by the field's tag.
_HEADS: Final = {tag: tuple(bytes((tag, size)) for size in range(_SHORT)) for tag in (0x0A, 0x1A, 0x22, 0x4A)}
# Length of an AnyValue that holds a short string, its tag, and the string's length.
_STRING_HEADS: Final = tuple(bytes((size + 2, 0x0A, size)) for size in range(_SHORT - 2))
_SMALL_INTS: Final = tuple(bytes((2, 0x18, value)) for value in range(_SHORT))
_TRUE: Final = b"\x02\x10\x01"
_FALSE: Final = b"\x02\x10\x00"

_pack_double: Final = Struct("<cd").pack
_pack_fixed64: Final = Struct("<cQ").pack
_KINDS: Final = {
    SpanKind.INTERNAL: b"\x30\x01",
    SpanKind.SERVER: b"\x30\x02",
    SpanKind.CLIENT: b"\x30\x03",
    SpanKind.PRODUCER: b"\x30\x04",
    SpanKind.CONSUMER: b"\x30\x05",
}
# SpanFlags: CONTEXT_HAS_IS_REMOTE, alone and with CONTEXT_IS_REMOTE. The SDK leaves out the W3C bits, and so do we.
_FLAGS_LOCAL: Final = b"\x00\x01\x00\x00"
_FLAGS_REMOTE: Final = b"\x00\x03\x00\x00"

_prefixes: dict[str, bytes] = {}
# By identity, because hashing a Resource serialises it to JSON. The object is held so that its id stays its own.
_resources: dict[int, tuple[Any, bytes]] = {}
_scopes: dict[int, tuple[Any, bytes]] = {}


def encode_resource(resource: Resource) -> bytes:
    """Give the fields `resource` and `schema_url` of a ResourceSpans message; encoded once per object."""
    known = _resources.get(id(resource))
    if known is None:
        body: list[bytes] = []
        _put_attributes(body, _HEADS[0x0A], resource.attributes)
        known = (resource, _delimited(b"\x0a", b"".join(body)) + _text_field(b"\x1a", resource.schema_url))
        _remember(_resources, known)
    return known[1]


def encode_scope(scope: InstrumentationScope | None) -> bytes:
    """Give the fields `scope` and `schema_url` of a ScopeSpans message; encoded once per object. None: an empty scope."""
    if scope is None:
        return b"\x0a\x00"
    known = _scopes.get(id(scope))
    if known is None:
        body = [_text_field(b"\x0a", scope.name), _text_field(b"\x12", scope.version)]
        # The SDK's exporter of 1.27 leaves attributes and schema URL out; receivers of that time take them.
        _put_attributes(body, _HEADS[0x1A], getattr(scope, "attributes", None) or {})
        known = (scope, _delimited(b"\x0a", b"".join(body)) + _text_field(b"\x1a", scope.schema_url))
        _remember(_scopes, known)
    return known[1]


def encode_start(span: ReadableSpan, extra_attributes: Mapping[str, Any] | None = None) -> bytes:
    """
    Encode what is known of a span when it starts, for `complete_start` in whichever process ends it.

    Args:
        span: A recording SDK span, usually still open: its ids, parent, name, kind, start time, links and the
            attributes it has now.
        extra_attributes: As for `encode_span`.

    Returns:
        Fields of a Span message, not length-delimited.
    """
    parts: list[bytes] = []
    _put_start(parts, span, None)
    attributes = attributes_of(span)
    _put_attributes(parts, _HEADS[0x4A], {**attributes, **extra_attributes} if extra_attributes else attributes)
    _put_links(parts, span.links)
    _put_counts(parts, ((b"\x50", span.dropped_attributes), (b"\x70", span.dropped_links)))
    return b"".join(parts)


def complete_start(
    start: bytes,
    *,
    end_unix_ns: int,
    attributes: Mapping[str, Any],
    status_code: int,
    status_message: str = "",
    events: Iterable[Event] = (),
) -> bytes:
    """
    End a span of which only the start is known, without decoding it.

    Args:
        start: What `encode_start` gave.
        end_unix_ns: End time in ns since the epoch.
        attributes: Added to those known at start. They append, so a key that was set at start must not come again.
        status_code: 0 unset, 1 ok, 2 error.
        status_message: Only for an error.
        events: In the order in which they happened.

    Returns:
        A complete Span message, as `encode_span` gives it.
    """
    parts = [start, _pack_fixed64(b"\x41", _u64(end_unix_ns))]
    _put_attributes(parts, _HEADS[0x4A], attributes)
    _put_events(parts, events)
    parts.append(_status(status_code, status_message))
    return b"".join(parts)


def encode_span(
    span: ReadableSpan,
    *,
    span_id: int | None = None,
    end_unix_ns: int | None = None,
    status: tuple[int, str] | None = None,
    extra_attributes: Mapping[str, Any] | None = None,
    extra_links: Sequence[Link] = (),
) -> bytes:
    """
    Encode a finished span; each argument replaces or extends what the span itself says.

    Args:
        span: The SDK's span.
        span_id: Another id, for an outcome observed after the attempt's own span was written by somebody else.
        end_unix_ns: Another end time, in ns since the epoch.
        status: Another status: 0 unset, 1 ok or 2 error, and its message.
        extra_attributes: More attributes; one with an equal key is replaced.
        extra_links: More links, after the span's own.

    Returns:
        A Span message, not length-delimited, as `wrap` takes it.
    """
    parts: list[bytes] = []
    _put_start(parts, span, span_id)
    end = span.end_time if end_unix_ns is None else end_unix_ns
    if end:
        parts.append(_pack_fixed64(b"\x41", _u64(end)))
    attributes = attributes_of(span)
    if extra_attributes:
        attributes = {**attributes, **extra_attributes}
    _put_attributes(parts, _HEADS[0x4A], attributes)
    _put_events(parts, span.events)
    _put_links(parts, span.links)
    if extra_links:
        _put_links(parts, extra_links)
    _put_counts(parts, ((b"\x50", span.dropped_attributes), (b"\x60", span.dropped_events), (b"\x70", span.dropped_links)))
    if status is not None:
        parts.append(_status(*status))
    elif (own := span.status) is not None:  # pyright: ignore[reportUnnecessaryComparison] # a hand-made span may have none
        code = own.status_code
        plain = code is StatusCode.UNSET and not own.description
        parts.append(b"\x7a\x00" if plain else _status(code.value, own.description))
    return b"".join(parts)


def wrap(resource: bytes, groups: Mapping[bytes, Sequence[bytes]]) -> bytes:
    """
    Make one ExportTraceServiceRequest. Requests put one after the other are one valid request with all their spans.

    Args:
        resource: What `encode_resource` gave.
        groups: Span messages by what `encode_scope` gave for them.
    """
    parts = [resource]
    for scope, spans in groups.items():
        inner = [scope]
        for span in spans:
            inner += (b"\x12", _varint(len(span)), span)
        body = b"".join(inner)
        parts += (b"\x12", _varint(len(body)), body)
    return _delimited(b"\x0a", b"".join(parts))


def _put_start(parts: list[bytes], span: ReadableSpan, span_id: int | None) -> None:
    """Add ids, trace state, parent, flags, name, kind and start time."""
    context = span.get_span_context()
    if context is not None:
        own_id = context.span_id if span_id is None else span_id
        parts += (
            b"\x0a\x10",
            (context.trace_id & _MAX_U128).to_bytes(16, "big"),
            b"\x12\x08",
            (own_id & _MAX_U64).to_bytes(8, "big"),
        )
        if context.trace_state:
            parts.append(_text_field(b"\x1a", ",".join(f"{key}={value}" for key, value in context.trace_state.items())))
    parent: SpanContext | None = span.parent
    if parent is None:
        parts += (b"\x85\x01", _FLAGS_LOCAL)
    else:
        flags = _FLAGS_REMOTE if parent.is_remote else _FLAGS_LOCAL
        parts += (b"\x85\x01", flags, b"\x22\x08", (parent.span_id & _MAX_U64).to_bytes(8, "big"))
    parts += (_text_field(b"\x2a", span.name), _KINDS[span.kind])
    if span.start_time:
        parts.append(_pack_fixed64(b"\x39", _u64(span.start_time)))


def attributes_of(span: ReadableSpan) -> Mapping[str, Any]:
    """Give a plain copy of the span's attributes: iterating the SDK's own mapping costs more than encoding it."""
    attributes: Any = span.attributes
    try:
        copy: Mapping[str, Any] = attributes.copy()
    except AttributeError:
        return dict(attributes or {})
    return copy


def _put_attributes(parts: list[bytes], heads: Sequence[bytes], attributes: Mapping[str, Any]) -> None:
    """
    Add attributes as repeated KeyValue fields.

    Args:
        parts: Where to.
        heads: Tag and length of a short field, by length.
        attributes: What; a value that OTLP can't carry is left out with a warning, as the SDK does.
    """
    prefixes = _prefixes
    for key, value in attributes.items():
        prefix = prefixes.get(key) or _prefix(key)
        if value.__class__ is str:
            try:
                raw = value.encode()
            except UnicodeEncodeError:
                raw = _utf8(value)
            size = len(raw)
            total = size + len(prefix) + 3
            if total < _SHORT:
                parts += (heads[total], prefix, _STRING_HEADS[size], raw)
                continue
            encoded = b"".join((b"\x0a", _varint(size), raw))
            encoded = _varint(len(encoded)) + encoded
        elif value.__class__ is int and 0 <= value < _SHORT:
            encoded = _SMALL_INTS[value]
        elif value is True:
            encoded = _TRUE
        elif value is False:
            encoded = _FALSE
        else:
            try:
                encoded = _any_value(value, 0)
            except Exception:
                _logger.warning("attribute %r is left out: OTLP can't carry its value of %s", key, type(value), exc_info=True)
                continue
            encoded = _varint(len(encoded)) + encoded
        total = len(prefix) + len(encoded)
        parts += (heads[total] if total < _SHORT else heads[0][:1] + _varint(total), prefix, encoded)


def _prefix(key: Any) -> bytes:
    """Give a KeyValue message up to the tag of its value."""
    encoded = _text_field(b"\x0a", key) + b"\x12"
    if key.__class__ is str:
        if len(_prefixes) >= _MAX_KEYS:
            _prefixes.clear()
        _prefixes[key] = encoded
    return encoded


def _any_value(value: object, depth: int) -> bytes:  # noqa: C901, PLR0911 # one case for each kind of value that OTLP knows
    """
    Encode an AnyValue message.

    Raises:
        ValueError: An integer beyond 64 bits, or nesting that receivers refuse.
        TypeError: A type that OTLP doesn't have.
    """
    if value is None:
        return b""
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, str):
        return _delimited(b"\x0a", _utf8(value))
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError("the integer doesn't fit into 64 bits")
        return b"\x18" + _varint(value & _MAX_U64)
    if isinstance(value, float):
        return _pack_double(b"\x21", value)
    if isinstance(value, bytes):
        return _delimited(b"\x3a", value)
    if depth >= _MAX_DEPTH:
        raise ValueError(f"the value is nested deeper than {_MAX_DEPTH} levels")
    parts: list[bytes] = []
    if isinstance(value, Sequence):
        parts.extend(_delimited(b"\x0a", _any_value(item, depth + 1)) for item in value)
        return _delimited(b"\x2a", b"".join(parts))
    if isinstance(value, Mapping):
        for key, item in value.items():
            pair = _text_field(b"\x0a", str(key)) + _delimited(b"\x12", _any_value(item, depth + 1))
            parts.append(_delimited(b"\x0a", pair))
        return _delimited(b"\x32", b"".join(parts))
    raise TypeError(f"OTLP has no value like {type(value)}")


def _put_events(parts: list[bytes], events: Iterable[Event]) -> None:
    for event in events:
        body: list[bytes] = []
        if event.timestamp:
            body.append(_pack_fixed64(b"\x09", _u64(event.timestamp)))
        body.append(_text_field(b"\x12", event.name))
        if event.attributes:
            _put_attributes(body, _HEADS[0x1A], event.attributes)
        _put_counts(body, ((b"\x20", getattr(event, "dropped_attributes", 0)),))
        parts.append(_delimited(b"\x5a", b"".join(body)))


def _put_links(parts: list[bytes], links: Iterable[Link]) -> None:
    for link in links:
        context = link.context
        body = [
            b"\x0a\x10",
            (context.trace_id & _MAX_U128).to_bytes(16, "big"),
            b"\x12\x08",
            (context.span_id & _MAX_U64).to_bytes(8, "big"),
            # The SDK's exporter leaves out the link's trace state, and so do we: both must give the same span.
            b"\x35",
            _FLAGS_REMOTE if context.is_remote else _FLAGS_LOCAL,
        ]
        if link.attributes:
            _put_attributes(body, _HEADS[0x22], link.attributes)
        _put_counts(body, ((b"\x28", getattr(link, "dropped_attributes", 0)),))
        parts.append(_delimited(b"\x6a", b"".join(body)))


def _put_counts(parts: list[bytes], counts: Iterable[tuple[bytes, int]]) -> None:
    for tag, count in counts:
        if count:
            parts += (tag, _varint(min(count, _MAX_U32)))


def _status(code: int, message: str | None) -> bytes:
    """Encode the field `status`; it is there even when unset, as the SDK writes it."""
    body = _text_field(b"\x12", message)
    return _delimited(b"\x7a", body + bytes((0x18, code)) if code else body)


def _text_field(tag: bytes, value: object) -> bytes:
    """Encode a string field; nothing for an empty string or None, which are its default."""
    if not value:
        return b""
    return _delimited(tag, _utf8(value))


def _utf8(value: object) -> bytes:
    # Error messages do hold lone surrogates (file names); readable text is worth more than a dropped attribute.
    return str.encode(value if isinstance(value, str) else str(value), "utf-8", "backslashreplace")


def _delimited(tag: bytes, body: bytes) -> bytes:
    return b"".join((tag, _varint(len(body)), body))


def _varint(value: int) -> bytes:
    if value < 0x80:  # noqa: PLR2004 # seven bits a byte
        return bytes((value,))
    if value < 0x4000:  # noqa: PLR2004 (two bytes of a varint)
        return bytes((value & 0x7F | 0x80, value >> 7))
    out = bytearray()
    while value > 0x7F:  # noqa: PLR2004 (as above)
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _u64(value: int) -> int:
    return min(max(int(value), 0), _MAX_U64)


def _remember(cache: dict[int, tuple[Any, bytes]], entry: tuple[Any, bytes]) -> None:
    if len(cache) >= _MAX_OBJECTS:
        cache.clear()
    cache[id(entry[0])] = entry
