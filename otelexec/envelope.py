"""
The context of one message inside its payload, under the reserved key `_otelexec`.

The key holds `v`, `traceparent`, `tracestate`, `baggage`, `enqueued_unix_ns` and `signature`, as far as they are.
Payloads from before otelexec carry `executionId`, `requestId` and `correlation`; those that carry nothing take the
message's own id. Ids never come from what else is in a payload: two equal payloads are two jobs.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from datetime import date, timedelta
from datetime import time as time_of_day
from enum import Enum
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address
from itertools import islice
from numbers import Number
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from opentelemetry import context as otel_context

from otelexec import semconv
from otelexec.carrier import NOTHING, Carrier, read_headers
from otelexec.correlation import Correlation, Scope
from otelexec.errors import CarrierError
from otelexec.ids import as_text
from otelexec.propagation import Opening, announce, incoming, outgoing, write
from otelexec.w3c import MAX_MEMBERS

if TYPE_CHECKING:
    from opentelemetry.context import Context

_logger = logging.getLogger(__name__)

VERSION: Final = 1
MAX_LEGACY_CHARS: Final = 4_096
"""How much of a legacy field is kept: what would not fit into one baggage member could not travel on."""

_LEGACY_NAMES: Final = {
    "executionId": semconv.EXECUTION_ID,
    "requestId": semconv.REQUEST_ID,
    "source": semconv.SOURCE,
    "parentExecutionId": semconv.PARENT_EXECUTION_ID,
    "triggerType": semconv.PREFIX + "trigger_type",
    "workflowId": semconv.PREFIX + "workflow_id",
    "scheduleId": semconv.PREFIX + "schedule_id",
    "scheduledFor": semconv.PREFIX + "scheduled_for",
    "webhookId": semconv.PREFIX + "webhook_id",
}
_IDS: Final = frozenset({semconv.EXECUTION_ID, semconv.REQUEST_ID, semconv.PARENT_EXECUTION_ID})
_MAX_UNIX_NS: Final = 2**63 - 1
_SAME_TEXT: Final = (date, time_of_day, timedelta, UUID, Number, Enum, PurePath, bytes, bytearray, IPv4Address, IPv6Address)


class Extraction:
    """
    What `extract()` found in a payload.

    Attributes:
        payload: The payload without the reserved key; the same object where it had none.
        scope: The scope that is open during the `with` block.
    """

    __slots__ = ("payload", "scope")

    def __init__(self, payload: Any, scope: Scope) -> None:
        self.payload = payload
        self.scope = scope

    @property
    def correlation(self) -> Correlation:
        """The correlation of the first execution in the block."""
        return self.scope.correlation

    @property
    def trusted(self) -> bool:
        """Whether the sender was believed."""
        return self.scope.trusted


def inject(payload: Mapping[str, Any], *, retry: bool = False) -> dict[str, Any]:
    """
    Put the current trace, baggage and the ids of one message into a payload.

    Args:
        payload: Any mapping; not changed. The reserved key of an earlier send is replaced.
        retry: Keep the running execution's id, for a message that asks for another attempt at it.

    Returns:
        A new dict: the payload and the reserved key. What is added is JSON.

    Raises:
        CarrierError: The payload is no mapping.
    """
    if not isinstance(payload, Mapping):
        raise CarrierError(f"{type(payload).__name__} can't carry the context: give inject() a mapping, such as {{'data': payload}}")
    message = without_envelope(payload)
    context = otel_context.get_current()
    correlation = outgoing(context, retry=retry)
    announce(context)
    enqueued = time.time_ns()
    carried, signature = write(context, correlation, lambda: _bound(enqueued, message))
    envelope: dict[str, Any] = {"v": VERSION, **carried, "enqueued_unix_ns": enqueued}
    if signature is not None:
        envelope["signature"] = signature
    message[semconv.PAYLOAD_KEY] = envelope
    return message


def extract(payload: object, *, trusted: bool = True, message_id: str | None = None) -> Opening[Extraction]:
    """
    Run a `with` block, which may hold asynchronous code, as the work that a payload asks for. Never raises by itself.

    Args:
        payload: Any object.
        trusted: False for payloads from outside: their ids are not used, and their trace is linked.
        message_id: The message's own id, used as the execution's when the payload carries none; None when it has none.

    Returns:
        A context manager that gives the payload without the reserved key, the correlation, and whether the sender
        was believed.
    """

    def open_() -> tuple[Context, Extraction]:
        context, scope, rest = receive(payload, trusted=trusted, message_id=message_id)
        return context, Extraction(rest, scope)

    return Opening(open_)


def receive(
    payload: object, *, trusted: bool = True, message_id: str | None = None, context: Context | None = None
) -> tuple[Context, Scope, Any]:
    """
    Do what `extract` does, without attaching: for adapters. Never raises.

    Args:
        payload: Any object.
        trusted: As for `extract`.
        message_id: As for `extract`.
        context: Where to start; None means the current context.

    Returns:
        The context to attach, the scope that is in it, and the payload without the reserved key.
    """
    carrier, enqueued, legacy, rest = NOTHING, None, {}, payload
    try:
        if isinstance(payload, Mapping):
            envelope = payload.get(semconv.PAYLOAD_KEY)
            if isinstance(envelope, Mapping):
                carrier, enqueued = _read(envelope)
            if semconv.PAYLOAD_KEY in payload:
                rest = without_envelope(payload)
            legacy = _legacy(payload)
    except Exception:
        _logger.debug("otelexec.carrier.unreadable: %s", type(payload).__name__, exc_info=True)
    inner, scope = incoming(
        carrier,
        trusted=trusted,
        message_id=message_id,
        enqueued_unix_ns=enqueued,
        legacy=legacy,
        bounds=lambda: () if (bound := _bound(enqueued, rest)) is None else (bound,),
        context=context,
    )
    return inner, scope, rest


def without_envelope(payload: Mapping[Any, Any]) -> dict[Any, Any]:
    """Give a payload without the reserved key, in a new dict."""
    return {key: value for key, value in payload.items() if key != semconv.PAYLOAD_KEY}


def _read(envelope: Mapping[Any, Any]) -> tuple[Carrier, int | None]:
    """Read an envelope of any version: what is there under a known name and of the right kind is understood."""
    carrier = read_headers(envelope)
    signature = envelope.get("signature")
    enqueued = envelope.get("enqueued_unix_ns")
    if not isinstance(enqueued, int) or isinstance(enqueued, bool) or not 0 < enqueued <= _MAX_UNIX_NS:
        enqueued = None
    return carrier._replace(signature=signature if isinstance(signature, str) else None), enqueued


def _legacy(payload: Mapping[Any, Any]) -> dict[str, str]:
    """Read the ids and fields of a payload from before otelexec, as members; its own ids go before nested ones."""
    members: dict[str, str] = {}
    nested = payload.get("correlation")
    if isinstance(nested, Mapping):
        for name, value in islice(nested.items(), MAX_MEMBERS):
            if isinstance(name, str):
                member = _LEGACY_NAMES.get(name, semconv.PREFIX + name)
                if text := _legacy_text(value, an_id=member in _IDS):
                    members[member] = text
    for name in ("executionId", "requestId"):
        if text := _legacy_text(payload.get(name), an_id=True):
            members[_LEGACY_NAMES[name]] = text
    return members


def _legacy_text(value: object, *, an_id: bool) -> str:
    """Give the text of a legacy value, empty for none; what is no text becomes JSON, but names nothing."""
    if value is None or (an_id and not isinstance(value, (str, int, UUID))) or (an_id and isinstance(value, bool)):
        return ""
    try:
        return as_text(value)[:MAX_LEGACY_CHARS]
    except ValueError:
        pass
    try:
        return json.dumps(value, separators=(",", ":"))[:MAX_LEGACY_CHARS]
    except (TypeError, ValueError, RecursionError):
        return ""


def _bound(enqueued: int | None, payload: object) -> tuple[object, ...] | None:
    """
    Give what the signature of an envelope covers besides the members.

    The payload counts as JSON says it, read back and sorted: what a queue turns into text on its way (tuples, number
    keys) has the same digest on both sides. So have dates, numbers and the like, by their text. None for a payload that
    holds anything else: there is nothing to bind to.
    """
    try:
        canonical = json.dumps(json.loads(json.dumps(payload, default=_text)), sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        text = "otelexec.signature.impossible: a payload that is no JSON has no signature, so its ids are not believed: %s"
        _logger.warning(text, error)
        return None
    return ("payload", enqueued, sha256(canonical.encode("ascii")).hexdigest())


def _text(value: object) -> str:
    """Give the text of what JSON doesn't know, where every process makes the same of it: not of sets, nor of objects at an address."""
    if isinstance(value, _SAME_TEXT):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no text that is the same everywhere")
