"""
What the Trigger.dev wire contract says, for the client and for the server of ours that speaks it.

Taken from the server's and the SDK's sources at 4.8.3 (https://github.com/triggerdotdev/trigger.dev, packages/core/src/v3/schemas).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Final

from otelexec import semconv
from otelexec_trigger.runs import CANCELLED, EXPIRED, FAILED, PENDING, RUNNING, SUCCEEDED, TIMED_OUT, WAITING, InvalidRequest

API_VERSION: Final = "2025-07-16"
"""`x-trigger-api-version`: without exactly this value the server answers with the statuses of before."""

MAX_BODY_BYTES: Final = 3 * 1024 * 1024
MAX_METADATA_BYTES: Final = 256 * 1024
MAX_KEY_CHARS: Final = 2048
MAX_TAG_CHARS: Final = 128
MAX_TAGS: Final = 10
MAX_BATCH: Final = 1000
OFFLOAD_BYTES: Final = 128 * 1024
"""From this size on the SDK sends a payload through the object store."""
KEY_SECONDS: Final = 30 * 86_400
"""How long an idempotency key holds unless the call says otherwise."""
REQUEST_KEY_SECONDS: Final = 86_400
"""How long the server remembers `x-trigger-request-idempotency-key`."""

JSON: Final = "application/json"
SUPERJSON: Final = "application/super+json"
TEXT: Final = "text/plain"
STORED: Final = "application/store"

STATES: Final[Mapping[str, str]] = {
    "PENDING_VERSION": PENDING,
    "DELAYED": PENDING,
    "QUEUED": PENDING,
    "DEQUEUED": PENDING,
    "EXECUTING": RUNNING,
    "WAITING": WAITING,
    "COMPLETED": SUCCEEDED,
    "CANCELED": CANCELLED,
    "FAILED": FAILED,
    "CRASHED": FAILED,
    "SYSTEM_FAILURE": FAILED,
    "EXPIRED": EXPIRED,
    "TIMED_OUT": TIMED_OUT,
}
"""The statuses of the server, and what each is called here. A status that is not in it keeps its own name."""

_UNIT_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "hr": 3600, "d": 86_400, "w": 604_800}
_DURATION: Final = re.compile(r"([0-9]{1,15})(hr|[smhdw])")
"""With so many digits that a sum of seconds is a float; whoever has limits refuses it then."""
_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}")
_MILLISECONDS_FROM: Final = 1e12


def state_of(status: object) -> str:
    """Give the state that a status stands for; the status itself where it is not known."""
    text = str(status)
    return STATES.get(text, text)


def idempotency_hash(*parts: str) -> str:
    """
    Make an idempotency key as the SDK does: SHA-256 of the parts joined by `-`, lowercase hex.

    Args:
        *parts: The user's key, and what scopes it. A lone one of 64 hex digits is taken for a hash already.
    """
    if len(parts) == 1 and _SHA256.fullmatch(parts[0]):
        return parts[0].lower()
    return hashlib.sha256("-".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def seconds_of(duration: str) -> float:
    """
    Read a duration such as `30s`, `2h30m` or `1w`.

    Raises:
        InvalidRequest: It is none.
    """
    text = duration.strip().replace(" ", "")
    found = list(_DURATION.finditer(text))
    if not found or "".join(match[0] for match in found) != text:
        raise InvalidRequest(f"{duration!r} is no duration: give whole numbers with s, m, h, hr, d or w, such as '2h30m'", status=400)
    return float(sum(int(match[1]) * _UNIT_SECONDS[match[2]] for match in found))


def duration_text(value: str | float | timedelta) -> str:
    """
    Give a duration as the server reads it.

    Args:
        value: Text that is one, seconds, or a timedelta; fractions of a second are rounded up.

    Raises:
        InvalidRequest: It is none, or negative.
    """
    if isinstance(value, str):
        seconds_of(value)
        return value
    try:
        seconds = value.total_seconds() if isinstance(value, timedelta) else float(value)
    except (TypeError, OverflowError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InvalidRequest(f"{value!r} is no duration")
    return f"{-int(-seconds // 1)}s"


def delay_text(value: str | float | timedelta | datetime) -> str:
    """
    Give a delay as the server reads it: a duration, or a date in ISO 8601.

    Args:
        value: As for `duration_text`, or a date; one without a time zone is local time.
    """
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, str) and not _DURATION.match(value.strip()):
        delay_of(value)
        return value
    return duration_text(value)


def delay_of(delay: str) -> tuple[int, int | None]:
    """
    Give how long a delay is, in nanoseconds, and the date that it is, in nanoseconds since 1970.

    A duration has no date: it counts from when the run is taken, by the clock of who takes it. A date is 0 long.

    Args:
        delay: A duration or a date.

    Raises:
        InvalidRequest: It is neither.
    """
    try:
        return int(seconds_of(delay) * 1e9), None
    except InvalidRequest:
        pass
    try:
        return 0, date_unix_ns(delay)
    except InvalidRequest:
        raise InvalidRequest(f"{delay!r} is neither a duration such as '2h30m' nor a date in ISO 8601", status=400) from None


def date_unix_ns(text: str) -> int:
    """
    Read a date, as nanoseconds since 1970; one without a time zone is in UTC.

    Raises:
        InvalidRequest: It is none.
    """
    try:
        when = datetime.fromisoformat(text)
        return int((when if when.tzinfo is not None else when.replace(tzinfo=UTC)).timestamp() * 1e9)
    except (ValueError, OverflowError):
        raise InvalidRequest(f"{text!r} is no date in ISO 8601", status=400) from None


def iso(unix_ns: int) -> str:
    """Give a time as the server spells it."""
    return datetime.fromtimestamp(unix_ns / 1e9, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def checked_tags(tags: object) -> list[str]:
    """
    Give the tags of a call without repetitions.

    Args:
        tags: A string, several, or None for none.

    Raises:
        InvalidRequest: One is no text or too long, or there are too many.
    """
    if tags is not None and not isinstance(tags, str | Sequence):
        raise InvalidRequest(f"tags are a string or several, not {str(tags)[:32]}", status=400)
    given = [] if tags is None else [tags] if isinstance(tags, str) else list(tags)
    for tag in given:
        if not isinstance(tag, str) or not 0 < len(tag) <= MAX_TAG_CHARS:
            raise InvalidRequest(f"a tag has 1 to {MAX_TAG_CHARS} characters, not {str(tag)[:32]!r} of {len(str(tag))}", status=422)
    found = list(dict.fromkeys(given))
    if len(found) > MAX_TAGS:
        raise InvalidRequest(f"a run has at most {MAX_TAGS} tags, not {len(found)}", status=422)
    return found


def correlation_tags(members: Mapping[str, str], taken: int) -> tuple[list[str], list[str]]:
    """
    Give the tags that make a run findable by its correlation, as many as there is room for.

    Args:
        members: The correlation's baggage members, the most important first.
        taken: How many tags the run has already.

    Returns:
        The tags, and the names of the members for which there was no room. What is too long for a tag is hashed.
    """
    order = (semconv.EXECUTION_ID, semconv.REQUEST_ID, semconv.SOURCE)
    names = [*(name for name in order if name in members), *(name for name in members if name not in order)]
    room = max(0, MAX_TAGS - taken)
    tags = []
    for name in names[:room]:
        tag = f"{name}:{members[name]}"
        tags.append(
            tag if len(tag) <= MAX_TAG_CHARS else f"{name[: MAX_TAG_CHARS - 65]}:{hashlib.sha256(members[name].encode()).hexdigest()}"
        )
    return tags, names[room:]


def wait_seconds(status: int, headers: Mapping[str, str]) -> float:
    """
    Give how long an answer asks to wait: `Retry-After`, or where a rate limit was hit `x-ratelimit-reset`, which one limiter gives in
    seconds since 1970 and the other in milliseconds. Dates count from the answer's own: the two clocks may differ.

    Args:
        status: That of the answer; only 429 and 503 ask for something.
        headers: Those of the answer, by lowercase name.

    Returns:
        Seconds; 0 where it asks for nothing.
    """  # noqa: D205 (the first sentence is as long as the fact)
    if status not in (429, 503):  # RFC 9110, section 10.2.3, and RFC 6585, section 4
        return 0.0
    asked = headers.get("retry-after", "")
    seconds, date = _number(asked), _date(asked)
    if seconds is None and date is None and status == 429:  # noqa: PLR2004 (too many requests)
        reset = _number(headers.get("x-ratelimit-reset", ""))
        date = reset / 1000 if reset is not None and reset >= _MILLISECONDS_FROM else reset
    if seconds is None and date is not None:
        answered = _date(headers.get("date", ""))
        seconds = date - (time.time() if answered is None else answered)
    return max(0.0, seconds or 0.0)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _date(text: str) -> float | None:
    """Read the date of a header, as seconds since 1970; None where it is none."""
    try:
        when = parsedate_to_datetime(text)
        return (when if when.tzinfo is not None else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def loads(text: str | bytes) -> Any:
    """
    Read JSON, without the NaN and the infinities that Python would read (RFC 8259, section 6), and could not write again.

    Raises:
        ValueError: It is none.
        RecursionError: It is nested too deeply.
    """
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    value = float(text)
    if value != value or abs(value) == float("inf"):  # noqa: PLR0124 (a NaN is unequal to itself)
        msg = f"JSON has no {text[:32]}"
        raise ValueError(msg)
    return value


def decode(payload: str | None, payload_type: str) -> Any:
    """
    Give what a payload or an output means, as far as it is JSON.

    Args:
        payload: Its text; None without one.
        payload_type: Its media type. Of superjson the plain part counts: dates and the like stay text.

    Raises:
        InvalidRequest: It is no JSON although it says so.
    """
    if payload is None or payload_type == TEXT:
        return payload
    try:
        value = loads(payload)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the payload is no JSON: {error}", status=400) from None
    return value.get("json") if payload_type == SUPERJSON and isinstance(value, dict) else value
