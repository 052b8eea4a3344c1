"""
Our names in anything that carries text: found in any shape, removed from what is sent again.

Reading never raises, whatever the object is, and does not look into what it finds.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from otelexec import semconv
from otelexec.errors import CarrierError

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

_logger = logging.getLogger(__name__)

HEADERS: Final = {
    name: name for name in (semconv.HEADER_TRACEPARENT, semconv.HEADER_TRACESTATE, semconv.HEADER_BAGGAGE, semconv.HEADER_SIGNATURE)
}
ENVIRONMENT: Final = {name.upper().replace("-", "_"): name for name in HEADERS}
"""Upper case, and `_` for what a name can't hold (OpenTelemetry, Environment Variables as Context Propagation Carriers)."""

_LISTS: Final = frozenset({semconv.HEADER_TRACESTATE, semconv.HEADER_BAGGAGE})
"""Several of these are one list; of the others the first counts."""


class Carrier(NamedTuple):
    """What was found in a carrier, as text and not yet looked at; None for what is not there."""

    traceparent: str | None = None
    tracestate: str | None = None
    baggage: str | None = None
    signature: str | None = None


NOTHING: Final = Carrier()


def strip(carrier: MutableMapping[str, str], names: Mapping[str, str] = HEADERS) -> None:
    """
    Remove what an earlier send left in a carrier, so that a retry has no stale parent and no stale baggage.

    Args:
        carrier: Changed in place.
        names: The names to remove; header names match in any case.

    Raises:
        CarrierError: The carrier is no mutable mapping.
    """
    if not (hasattr(carrier, "keys") and hasattr(carrier, "__setitem__") and hasattr(carrier, "__delitem__")):
        raise CarrierError(f"{type(carrier).__name__} can't carry the context: give a mutable mapping of names to text")
    for name in [name for name in carrier.keys() if _fold(name, names) in names]:  # noqa: SIM118 # some iterate over pairs
        try:
            del carrier[name]
        except KeyError:  # a multi-dict has removed all of one name already
            continue


def _fold(name: object, names: Mapping[str, str]) -> str:
    text = name if isinstance(name, str) else name.decode("latin-1") if isinstance(name, bytes) else ""
    return text.lower() if names is HEADERS else text


def read_headers(headers: object) -> Carrier:
    """
    Find our headers in anything: a mapping, a list or tuple of pairs, an object with `.items()`, names and values as text or bytes.

    Args:
        headers: Any object. Names match in any case; a header given several times is joined, as HTTP has it.
    """
    return _read(headers, HEADERS)


def read_env(environ: object) -> Carrier:
    """
    Find our variables in an environment.

    Args:
        environ: Any object; usually a mapping.
    """
    return _read(environ, ENVIRONMENT)


def _read(carrier: object, names: Mapping[str, str]) -> Carrier:
    found: dict[str, str] = {}
    try:
        items = getattr(carrier, "items", None)
        pairs: Any = items() if callable(items) else carrier if isinstance(carrier, (list, tuple)) else ()
        for pair in pairs:
            try:
                written, value = pair
            except (TypeError, ValueError):
                continue
            name = names.get(written) if isinstance(written, str) else None
            if name is None:
                name = names.get(_fold(written, names))
                if name is None:
                    continue
            text = value if isinstance(value, str) else _text(value)
            if name not in found:
                found[name] = text
            elif name in _LISTS:
                found[name] = f"{found[name]},{text}"
    except Exception:
        _logger.debug("otelexec.carrier.unreadable: %s", type(carrier).__name__, exc_info=True)
    if not found:
        return NOTHING
    get = found.get
    return Carrier(
        get(semconv.HEADER_TRACEPARENT), get(semconv.HEADER_TRACESTATE), get(semconv.HEADER_BAGGAGE), get(semconv.HEADER_SIGNATURE)
    )


def _text(value: object) -> str:
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).decode("utf-8", "replace")
    if isinstance(value, (list, tuple)):
        return ",".join(one if isinstance(one, str) else _text(one) for one in value if isinstance(one, (str, bytes)))
    return ""
