"""
The W3C formats as text: Baggage (https://www.w3.org/TR/baggage/) and Trace Context level 2.

Out, strict: percent-encoded, within the limits that every reader keeps to. In, lenient: whatever can be read is, and
nothing raises.

A `+` in a value is a plus sign, as W3C has it. The Python SDK writes a space as `+` and reads `+` as a space; what it
wrote is therefore read with its `+` and passed on unchanged, and what we write has `%20` and `%2B`, which every
reader agrees on.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote, unquote_plus

from opentelemetry.trace import SpanContext, TraceFlags, TraceState

from otelexec import semconv

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_HEADER_BYTES: Final = 8_192
MAX_MEMBER_BYTES: Final = 4_096
MAX_MEMBERS: Final = 180
"""What every reader of baggage can be relied on to take (W3C Baggage, section 3.3)."""

MAX_READ_CHARS: Final = 65_536
"""How much of an incoming baggage header is looked at: eight times what anybody may rely on."""

# Left as it is: what no reader decodes, so neither `%` nor `+`, and no separator of any header or URL form.
_PLAIN_KEY: Final = re.compile(r"[A-Za-z0-9!#$&'*.^_`|~-]+")
_PLAIN_KEY_SAFE: Final = "!#$&'*^`|"
_PLAIN_VALUE: Final = re.compile(r"[A-Za-z0-9!#$&'()*./:?@_~-]*")
_PLAIN_VALUE_SAFE: Final = "!#$&'()*/:?@"
_PLAIN_MEMBER: Final = rf"{_PLAIN_KEY.pattern}={_PLAIN_VALUE.pattern}"
_PLAIN_HEADER: Final = re.compile(rf"{_PLAIN_MEMBER}(?:,{_PLAIN_MEMBER})*")

_TOKEN: Final = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # noqa: S105 # the grammar's word, RFC 9110
_OCTETS: Final = r"(?:[\x21\x23\x24\x26-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]|%[0-9A-Fa-f]{2})*"
_MEMBER: Final = re.compile(rf"{_TOKEN}[ \t]*=[ \t]*{_OCTETS}(?:[ \t]*;[ \t]*{_TOKEN}(?:[ \t]*=[ \t]*{_OCTETS})?)*")

_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
MAX_TRACEPARENT_CHARS: Final = 512
MAX_TRACESTATE_CHARS: Final = 8_192
"""As the Python SDK; 512 is the least that is to be propagated (Trace Context, section 3.3.1.5), and several vendors together have more."""

_FLAGS: Final = {f"{flags:02x}": TraceFlags(flags) for flags in range(256)}

_SURROGATES: Final = re.compile("[\ud800-\udfff]")


def clean(value: str) -> str:
    """Replace lone surrogates by U+FFFD: they can't be written as UTF-8, so no header, store or span can hold them."""
    return value if value.isascii() else _SURROGATES.sub("\ufffd", value)


class Member(str):
    """
    The value of a member that is not ours, with the text it came in as: properties survive, and so does the spelling.

    Attributes:
        name: The decoded name it came under; set under another one it is an ordinary value.
        text: The member as it was; None when that is not valid W3C Baggage and has to be written anew.
    """

    __slots__ = ("name", "text")

    name: str
    text: str | None


@lru_cache(maxsize=256)
def _encode_key(name: str) -> str:
    return name if _PLAIN_KEY.fullmatch(name) else quote(clean(name), safe=_PLAIN_KEY_SAFE)


def _encode_value(value: str) -> str:
    return value if _PLAIN_VALUE.fullmatch(value) else quote(clean(value), safe=_PLAIN_VALUE_SAFE)


def encode_baggage(ours: Mapping[str, str], others: Mapping[str, object]) -> tuple[str, tuple[str, ...]]:
    """
    Write a baggage header that every W3C reader takes whole.

    Args:
        ours: Members to write first, in order; the ids lead, so they always fit.
        others: Members to write after them. A `Member` is written as it came in.

    Returns:
        The header, empty when there is nothing to write, and the names that had to be left out: over 4,096 bytes,
        over 180 members, over 8,192 bytes in all, or without a name. Smaller members after one that is left out
        are still written.
    """
    if not others:
        header = ",".join([f"{name}={value}" for name, value in ours.items()])
        # No plain name or value holds a comma, so the right number of them means that none came from inside.
        if len(header) <= MAX_MEMBER_BYTES and header.count(",") == len(ours) - 1 < MAX_MEMBERS and _PLAIN_HEADER.fullmatch(header):
            return header, ()
    members: list[str] = []
    dropped: list[str] = []
    room = MAX_HEADER_BYTES + 1  # the first member has no comma
    for key, content in (*ours.items(), *others.items()):
        try:
            name = str(key)
            member = content.text if isinstance(content, Member) and content.name == name else None
            member = member or f"{_encode_key(name)}={_encode_value(str(content))}"
        except Exception:
            dropped.append(type(key).__name__)  # an object whose str() fails; it has no name either
            continue
        size = len(member) + 1
        if not name or size > room or size > MAX_MEMBER_BYTES + 1 or len(members) >= MAX_MEMBERS:
            dropped.append(name)
            continue
        members.append(member)
        room -= size
    return ",".join(members), tuple(dropped)


def decode_baggage(header: str) -> tuple[dict[str, str], dict[str, Member]]:
    """
    Read a baggage header as far as it can be read; what has no name or no `=` is passed over.

    Args:
        header: Any text. Of two members with one name the last counts.

    Returns:
        Members called `otelexec.*`, and all others.
    """
    if len(header) > MAX_READ_CHARS:
        header = header[:MAX_READ_CHARS].rpartition(",")[0]
    plain = "%" not in header and " " not in header and ";" not in header and "\t" not in header
    ours: dict[str, str] = {}
    others: dict[str, Member] = {}
    for part in header.split(","):
        written, equals, value = part.partition("=")
        name = written
        if not plain:
            value = value.partition(";")[0].strip(" \t")
            if "%" in name:
                name = unquote(name)
            if "%" in value:
                value = unquote(value)
        # Of blanks of any kind, as the Python SDK does, which takes a plus for one as well: neither must hide one of our names
        # from the checks below, or a reader further on would find it.
        name = name.strip()
        if not name or not equals:
            continue
        if name.startswith(semconv.PREFIX):
            ours[name] = value
        elif "+" in written and (read := unquote_plus(written).strip()).startswith(semconv.PREFIX):
            ours[read] = value
        else:
            member = others[name] = Member(value)
            member.name = name
            text = part.strip(" \t")
            member.text = text if _MEMBER.fullmatch(text) else None
    return ours, others


def encode_traceparent(span_context: SpanContext) -> str:
    """Write a valid span context as `traceparent`, version 00."""
    return f"00-{span_context.trace_id:032x}-{span_context.span_id:016x}-{span_context.trace_flags & 0xFF:02x}"


def decode_trace(traceparent: str, tracestate: str | None) -> SpanContext | None:
    """
    Read a remote span context (Trace Context level 2, section 4.3).

    Args:
        traceparent: Any text. Versions above 00 may have more parts than this one knows.
        tracestate: Any text, several headers joined by commas; None for none. One that can't be read is left out.

    Returns:
        None when the text names no span.
    """
    if len(traceparent) > MAX_TRACEPARENT_CHARS:
        return None
    match = _TRACEPARENT.fullmatch(traceparent.strip(" \t"))
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more is not None):
        return None
    state = TraceState.from_header([tracestate]) if tracestate and len(tracestate) <= MAX_TRACESTATE_CHARS else None
    found = SpanContext(int(trace_id, 16), int(span_id, 16), True, _FLAGS[flags], state)  # noqa: FBT003 # is_remote
    return found if found.is_valid else None
