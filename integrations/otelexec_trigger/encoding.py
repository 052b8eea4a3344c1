"""A call of `trigger` in the terms of the wire contract: its options, checked, and its payload as text."""

from __future__ import annotations

import json
from typing import Any

from otelexec_trigger import wire
from otelexec_trigger.backend import Trigger
from otelexec_trigger.runs import InvalidRequest


def options_of(wanted: Trigger) -> dict[str, Any]:
    """
    Give the options of a call as the wire contract has them.

    Args:
        wanted: The call.

    Raises:
        InvalidRequest: One is over a limit.
    """
    given: Any = wanted  # whatever the caller's types say
    if not isinstance(given.task, str) or not given.task:
        raise InvalidRequest("A run is of a task: give the task's id.")
    check_text(given.task, "a task's id")
    attempts = given.max_attempts
    if attempts is not None and (not isinstance(attempts, int) or isinstance(attempts, bool) or attempts < 1):
        raise InvalidRequest(f"max_attempts is a whole number, 1 or more, not {attempts!r}")
    if given.key is not None and (not isinstance(given.key, str) or not 0 < len(given.key) <= wire.MAX_KEY_CHARS):
        raise InvalidRequest(f"a key is text of 1 to {wire.MAX_KEY_CHARS} characters, not {str(given.key)[:32]!r}")
    if given.queue is not None and (not isinstance(given.queue, str) or not given.queue):
        raise InvalidRequest(f"a queue has a name, not {given.queue!r}")
    if given.concurrency_key is not None and not isinstance(given.concurrency_key, str | int | float):
        raise InvalidRequest(f"a concurrency key is text or a number, not {given.concurrency_key!r}")
    if wanted.metadata is not None and len(json_text(wanted.metadata, "metadata").encode()) > wire.MAX_METADATA_BYTES:
        raise InvalidRequest(f"metadata has at most {wire.MAX_METADATA_BYTES} bytes of JSON")
    options = {
        "idempotencyKey": None if wanted.key is None else wire.idempotency_hash(wanted.key),
        "tags": wire.checked_tags(wanted.tags) or None,
        "delay": None if wanted.delay is None else wire.delay_text(wanted.delay),
        "ttl": None if wanted.ttl is None else wire.duration_text(wanted.ttl),
        "metadata": wanted.metadata,
        "queue": None if wanted.queue is None else {"name": wanted.queue},
        "concurrencyKey": wanted.concurrency_key,
        "maxAttempts": wanted.max_attempts,
    }
    return {name: value for name, value in options.items() if value is not None}


def encode(payload: Any) -> tuple[str | None, str]:
    """
    Give the text of a payload and its media type.

    Args:
        payload: Text, None, or anything that JSON can hold.

    Raises:
        InvalidRequest: JSON can't hold it, or it is too large.
    """
    if payload is None or isinstance(payload, str):
        text, kind = payload, wire.TEXT if isinstance(payload, str) else wire.JSON
    else:
        text, kind = json_text(payload, "the payload"), wire.JSON
    if text is not None and check_text(text, "a payload that is text") > wire.MAX_BODY_BYTES:
        raise InvalidRequest(f"a payload has at most {wire.MAX_BODY_BYTES} bytes")
    return text, kind


def check_text(text: str, what: str) -> int:
    """
    Give how many bytes a text has.

    Args:
        text: It.
        what: Names it in the error.

    Raises:
        InvalidRequest: UTF-8 can't hold it.
    """
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{what} must be text that UTF-8 can hold: {error}") from None


def json_text(value: Any, what: str) -> str:
    """Give the JSON text of a value; `what` names it in the error."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what} can't be written as JSON: {error}") from None
