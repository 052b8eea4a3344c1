"""Whose work a payload is: what its reserved key carries goes before what stands around it, in headers or in the environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opentelemetry.context import Context

from otelexec import semconv
from otelexec.carrier import Carrier
from otelexec.correlation import Scope
from otelexec.envelope import receive, without_envelope
from otelexec.propagation import incoming


def has_envelope(payload: object) -> bool:
    """Tell whether a decoded payload has the reserved key."""
    return isinstance(payload, Mapping) and semconv.PAYLOAD_KEY in payload


def received(payload: object, around: Carrier, *, trusted: bool = True, message_id: str | None = None) -> tuple[Context, Scope]:
    """
    Make the context that a payload's work runs in, whatever is current here. Never raises.

    Args:
        payload: The decoded payload.
        around: What was found around it; counts where the payload carries nothing itself.
        trusted: Whether its sender is believed.
        message_id: The message's own id; None when it has none.

    Returns:
        The context to attach, and the scope that is in it.
    """
    if has_envelope(payload):
        context, scope, _ = receive(payload, trusted=trusted, message_id=message_id, context=Context())
        return context, scope
    return incoming(around, trusted=trusted, message_id=message_id, context=Context())


def unwrapped(payload: Any) -> Any:
    """Give a decoded payload as the executor gets it: without the reserved key."""
    return without_envelope(payload) if has_envelope(payload) else payload
