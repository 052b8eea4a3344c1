"""What a caller asks of the local engine, checked, and as the row that the store gets."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from otelexec.store.runs import RunKey, RunRow
from otelexec_trigger import wire
from otelexec_trigger.runs import InvalidRequest

MAX_ATTEMPTS: Final = 3
"""How many attempts a run has unless the call says otherwise."""

MOST_SECONDS: Final = 10 * 365 * 86_400
"""Ten years: what is longer is a mistake, and a time in nanoseconds must fit into 63 bits."""
NANOSECONDS: Final = 1_000_000_000
_MOST_WHOLE: Final = 2**31 - 1
"""The columns are 32 bits wide in PostgreSQL."""


@dataclass(frozen=True, slots=True)
class RunRequest:
    """
    What a caller asks for.

    Attributes:
        task: The task's id.
        payload: The payload as text; None without one.
        payload_type: Its media type.
        options: The options of the wire contract, by their names there.
        request_key: Names this very call, so that a repetition gets the same answer; None: a repetition is another call.
        batch_id: The batch that the run belongs to; None without one.
        batch_index: Its place in the batch; None without one.
    """

    task: str
    payload: str | None = None
    payload_type: str = wire.JSON
    options: Mapping[str, Any] = field(default_factory=dict)
    request_key: str | None = None
    batch_id: str | None = None
    batch_index: int | None = None


def row_of(request: RunRequest, run_id: str) -> RunRow:
    """
    Give the run that is asked for.

    Raises:
        InvalidRequest: An option can't be used.
    """
    options = request.options
    delay = _option(options, "delay", str)
    wait, date = (0, None) if delay is None else checked_delay(delay)
    priority_ns = _priority_ns(options)
    lane, lane_limit = _lane(request)
    attempts = _count(options, "maxAttempts")
    max_seconds = _max_seconds(options)
    ttl_ns = _ttl_ns(options)
    payload, payload_type = request.payload, request.payload_type
    if payload is not None:
        payload, payload_type = storable(payload, payload_type)
    return RunRow(
        run_id=run_id,
        task=request.task,
        payload=payload,
        payload_type=payload_type,
        options=json.dumps(dict(options)),
        tags=json.dumps(wire.checked_tags(options.get("tags"))),
        metadata=metadata_text(options.get("metadata")),
        lane=lane,
        lane_limit=lane_limit,
        max_attempts=attempts or MAX_ATTEMPTS,
        max_seconds=max_seconds,
        delay_ns=wait,
        not_before_unix_ns=date,
        # A run with a delay is due when that is over, and not before.
        priority_ns=0 if delay is not None else priority_ns,
        ttl_ns=ttl_ns,
        batch_id=request.batch_id,
        batch_index=request.batch_index,
    )


def _priority_ns(options: Mapping[str, Any]) -> int:
    """Give how much sooner a run is due than others."""
    priority = _option(options, "priority", int, float) or 0
    if not 0 <= priority <= MOST_SECONDS:
        raise InvalidRequest(f"priority is a number of seconds, 0 to {MOST_SECONDS}, not {priority}", status=400)
    return int(priority * NANOSECONDS)


def _lane(request: RunRequest) -> tuple[str | None, int]:
    """Give the lane that a run waits in and how many of that may run at a time; no lane where nothing limits it."""
    queue = _option(request.options, "queue", Mapping) or {}
    key = _option(request.options, "concurrencyKey", str, int, float)
    limit = _count(queue, "concurrencyLimit", "queue.concurrencyLimit")
    name = _option(queue, "name", str) or f"task/{request.task}"
    if key is not None:
        return f"{name}/{_part(key)}", limit or 1
    return (None, 1) if limit is None else (_part(name), limit)


def _max_seconds(options: Mapping[str, Any]) -> float | None:
    duration = _option(options, "maxDuration", int, float)
    if duration is None:
        return None
    if not 0 < duration <= MOST_SECONDS:
        raise InvalidRequest(f"maxDuration is a number of seconds above 0, up to {MOST_SECONDS}, not {duration}", status=400)
    return float(duration)


def _ttl_ns(options: Mapping[str, Any]) -> int | None:
    """Give how long a run may wait for its first attempt; None where it may for ever."""
    ttl = _option(options, "ttl", str, int)
    if not ttl:
        return None
    seconds = wire.seconds_of(ttl) if isinstance(ttl, str) else ttl
    if not 0 <= seconds <= MOST_SECONDS:
        raise InvalidRequest(f"ttl is 0 to {MOST_SECONDS} seconds", status=400)
    return int(seconds * NANOSECONDS)


def _count(options: Mapping[str, Any], name: str, shown: str | None = None) -> int | None:
    """
    Give an option that counts something; None where it is not there.

    Args:
        options: The options.
        name: Its name there.
        shown: Its name for a caller; None: the same.
    """
    count: int | None = _option(options, name, int)
    if count is not None and not 1 <= count <= _MOST_WHOLE:
        raise InvalidRequest(f"{shown or name} is 1 to {_MOST_WHOLE}, not {count}", status=400)
    return count


def storable(payload: str, payload_type: str) -> tuple[str, str]:
    """
    Give a payload in a form that every store holds unaltered, and the media type of that.

    Args:
        payload: Its text.
        payload_type: Its media type.
    """
    # PostgreSQL's text has no NUL, which JSON escapes; what has one is no JSON yet, whatever its type says.
    if "\0" in payload and payload_type in (wire.TEXT, wire.JSON, wire.SUPERJSON):
        return json.dumps(payload), wire.JSON
    return payload, payload_type


def checked_delay(delay: str) -> tuple[int, int | None]:
    """
    Give a delay as `wire.delay_of` does.

    Args:
        delay: A duration or a date.

    Raises:
        InvalidRequest: It is neither, or too long.
    """
    wait, date = wire.delay_of(delay)
    if (wait if date is None else date - time.time_ns()) > MOST_SECONDS * NANOSECONDS:
        raise InvalidRequest(f"a delay is {MOST_SECONDS} seconds at most", status=400)
    return wait, date


def _option(options: Mapping[str, Any], name: str, *kinds: type) -> Any:
    value = options.get(name)
    if value is None:
        return None
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise InvalidRequest(f"{name} can't be {str(value)[:64]!r}", status=400)
    return value


def metadata_text(value: Any) -> str | None:
    """
    Give metadata as JSON text; None without any.

    Raises:
        InvalidRequest: There is too much of it, or it can't be written.
    """
    if value is None:
        return None
    try:
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError as error:  # a number that grew too large
        raise InvalidRequest(f"metadata can't be written as JSON: {error}", status=400) from None
    try:
        wire.loads(text)
    except (ValueError, RecursionError):
        text = json.dumps(value)
    if len(text.encode("utf-8", "replace")) > wire.MAX_METADATA_BYTES:
        raise InvalidRequest(f"metadata has at most {wire.MAX_METADATA_BYTES} bytes", status=413)
    return text


def keys_of(request: RunRequest) -> tuple[RunKey, ...]:
    """
    Give the keys under which a repetition finds the run.

    Raises:
        InvalidRequest: The idempotency key is none.
    """
    keys = []
    if request.request_key is not None:
        keys.append(RunKey(f"request/{_part(request.task)}/{request.request_key}", wire.REQUEST_KEY_SECONDS * NANOSECONDS, exact=True))
    key = _option(request.options, "idempotencyKey", str)
    if key:
        if len(key) > wire.MAX_KEY_CHARS:
            raise InvalidRequest(f"an idempotency key has at most {wire.MAX_KEY_CHARS} characters, not {len(key)}", status=400)
        keys.append(RunKey(key_name(request.task, key), int(_key_seconds(request.options.get("idempotencyKeyTTL")) * NANOSECONDS)))
    return tuple(keys)


def _key_seconds(ttl: object) -> float:
    # The server ignores a text that it can't read, too.
    try:
        return min(wire.seconds_of(ttl), MOST_SECONDS) if isinstance(ttl, str) else wire.KEY_SECONDS
    except InvalidRequest:
        return wire.KEY_SECONDS


def key_name(task: str, key: str) -> str:
    """Give the name under which the store holds a task's idempotency key."""
    return f"key/{_part(task)}/{key}"


def _part(name: object) -> str:
    """Give a name without the `/` that joins it to others: ids may hold one, and two that are joined must not look like two others."""
    return str(name).replace("%", "%25").replace("/", "%2F")
