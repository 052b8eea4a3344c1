"""
What a message carries for us, and where it stands in a Celery message.

Celery makes a request attribute of each top-level header, and takes `request.headers`, which a retry sends again, from a
nested `headers` key if there is one. So both places are written, with the same content, and both are read.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, Final

from celery.app.task import Context as TaskContext

from otelexec import semconv
from otelexec.carrier import HEADERS, NOTHING, Carrier, read_headers

PREFIX: Final = "otelexec-"
ENQUEUED: Final = "otelexec-enqueued"
"""When the message was sent, in nanoseconds since 1970, as text."""
PREVIOUS: Final = "otelexec-previous"
"""`traceparent` of the attempt that asked for this one."""
JOINS: Final = "otelexec-joins"
"""Task id of the body of a chord, or of its first task: its headers have noted their spans under it."""
DELIVERY: Final = "otelexec-delivery"
"""The fencing token of one delivery: from the worker's main process to its child, never in a message."""
LIMITS: Final = "otelexec-limits"
"""The hard and the soft limit that the worker has for it where the message names none; from main process to child, too."""

NESTED: Final = "headers"

# As `celery.app.task.Context._get_custom_headers` has it: everything else is a header of the user's.
_CELERYS: Final = frozenset(vars(TaskContext)) | {"lang", "task", "argsrepr", "kwargsrepr", "compression"}


def is_ours(name: object) -> bool:
    """Tell whether a header is one that we write, in any case."""
    if not isinstance(name, str):
        return False
    lowered = name.lower()
    return lowered in HEADERS or lowered.startswith(PREFIX)


def write(headers: MutableMapping[str, Any], carried: Mapping[str, str]) -> None:
    """
    Put what a message carries into its headers, in both places, after removing what an earlier send left there.

    Args:
        headers: The message's headers; changed in place. A nested mapping is replaced, since it may be the caller's own.
        carried: Names and values to write.
    """
    own: dict[str, Any] = {}
    for name in [name for name in headers if name not in _CELERYS]:
        if is_ours(name):
            del headers[name]
        else:
            own[name] = headers[name]
    nested = headers.get(NESTED)
    if isinstance(nested, Mapping):
        own.update((name, value) for name, value in nested.items() if not is_ours(name))
    own.update(carried)
    headers[NESTED] = own
    headers.update(carried)


def find(request: object) -> Mapping[str, Any]:
    """
    Find our headers in a request or a message, whichever of the two places holds them.

    Args:
        request: A mapping of headers, with or without a nested one; anything else holds nothing.
    """
    if not isinstance(request, Mapping):
        return {}
    if _holds(request):
        return request
    nested = request.get(NESTED)
    return nested if isinstance(nested, Mapping) and _holds(nested) else {}


def _holds(headers: Mapping[str, Any]) -> bool:
    return semconv.HEADER_BAGGAGE in headers or semconv.HEADER_TRACEPARENT in headers


def carrier_of(found: Mapping[str, Any]) -> Carrier:
    """Give the W3C part of what `find` gave."""
    if not found:
        return NOTHING
    get = found.get
    carried = Carrier(
        get(semconv.HEADER_TRACEPARENT), get(semconv.HEADER_TRACESTATE), get(semconv.HEADER_BAGGAGE), get(semconv.HEADER_SIGNATURE)
    )
    if all(value is None or type(value) is str for value in carried):
        return carried
    return read_headers({name: found[name] for name in HEADERS if name in found})  # bytes, or whatever somebody else wrote


def text_of(found: Mapping[str, Any], name: str) -> str | None:
    """Give one of our own headers; None when it is not there, or no text."""
    value = found.get(name)
    return value if isinstance(value, str) and value else None


def time_of(found: Mapping[str, Any], name: str) -> int | None:
    """Give one of our own headers that holds a time in nanoseconds since 1970; None when it doesn't."""
    text = text_of(found, name)
    return int(text) if text is not None and text.isascii() and text.isdecimal() and len(text) < 20 else None  # noqa: PLR2004 (digits of 64 bits)
