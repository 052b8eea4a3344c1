"""What a request says, read and checked: whatever is wrong with it gets an answer that says so."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

from starlette.requests import Request

from otelexec.store.runs import RunRecord
from otelexec_trigger import engine, wire

_MAX_LINE_BYTES: Final = wire.MAX_BODY_BYTES + 64 * 1024
"""A line of a batch is a whole run, with its options."""

_FILTERS: Final = frozenset(
    f"filter[{name}]"
    for name in ("status", "taskIdentifier", "tag", "batch", "isTest", "createdAt][from", "createdAt][to", "createdAt][period")
)


class Refused(Exception):
    """
    A request gets an error for an answer.

    Args:
        status: The HTTP status.
        message: What is wrong with it.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def read_body(request: Request, limit: int) -> bytes:
    """Read a body; one that is too large is not read to its end."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise Refused(413, f"the body has more than {limit} bytes")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise Refused(413, f"the body has more than {limit} bytes")
    return bytes(body)


async def read_object(request: Request, limit: int = 256 * 1024) -> dict[str, Any]:
    """Read a body that is a JSON object; an empty one is an empty object."""
    body = await read_body(request, limit)
    if not body.strip():
        return {}
    return _object(body)


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = wire.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise Refused(400, "the body is a JSON object")
    return value


def mapping(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Give an object in a body; an empty one where it is missing."""
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise Refused(400, f"{name} is an object")
    return value


def item_of(item: Any) -> tuple[str, Any, dict[str, Any]]:
    """Give task, payload and options of one run of a batch."""
    if not isinstance(item, Mapping) or not isinstance(item.get("task"), str) or not item["task"]:
        raise Refused(400, "every item names its task")
    return item["task"], item.get("payload"), dict(mapping(item, "options"))


def indexed_item(line: bytes, count: int) -> tuple[int, tuple[str, Any, dict[str, Any]]]:
    """Give the place of a run in its batch, and what `item_of` gives of it."""
    item = _object(line)
    index = item.get("index")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        raise Refused(400, f"the index of an item is 0 to {count - 1}, not {str(index)[:32]}")
    return index, item_of(item)


async def read_lines(request: Request) -> AsyncIterator[bytes]:
    """Give the lines of a body, one at a time: a whole batch may be larger than what a request may be."""
    rest = b""
    async for chunk in request.stream():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield line
        if len(rest) > _MAX_LINE_BYTES:
            raise Refused(413, f"an item has more than {wire.MAX_BODY_BYTES} bytes")
    if rest.strip():
        yield rest


def number(text: str | None, default: int) -> int:
    """Read a whole number of a query."""
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise Refused(400, f"{text[:32]!r} is no whole number") from None


def run_filter(query: Mapping[str, str]) -> Callable[[RunRecord], bool]:
    """Give what tells whether a run is one of those that a query asks for; its task and batch are asked of the store."""
    unknown = [name for name in query if name.startswith("filter[") and name not in _FILTERS]
    if unknown:
        raise Refused(400, f"the local engine does not filter by {unknown[0][:64]}: it would give runs that are not meant")
    statuses = {status for status in query.get("filter[status]", "").split(",") if status}
    unknown = sorted(statuses - wire.STATES.keys())
    if unknown:
        raise Refused(400, f"filter[status]: there is no status {', '.join(unknown)[:64]}")
    tags = {tag for tag in query.get("filter[tag]", "").split(",") if tag}
    test = query.get("filter[isTest]")
    if test not in (None, "true", "false"):
        raise Refused(400, "filter[isTest] is true or false")
    since = _milliseconds(query.get("filter[createdAt][from]"), 0) * 1_000_000
    until = _milliseconds(query.get("filter[createdAt][to]"), 2**42) * 1_000_000
    period = query.get("filter[createdAt][period]")
    latest = 2**62 if period is None else int(wire.seconds_of(period) * 1e9)

    def wanted(run: RunRecord) -> bool:
        return (
            (not statuses or engine.status_of(run) in statuses)
            and (not tags or not tags.isdisjoint(json.loads(run.tags)))
            and (test is None or bool(json.loads(run.options).get("test", False)) is (test == "true"))
            and since <= run.created_unix_ns <= until
            and run.read_unix_ns - run.created_unix_ns <= latest
        )

    return wanted


def _milliseconds(text: str | None, default: int) -> int:
    """Read a time since 1970: in milliseconds, or as a date."""
    try:
        return number(text, default)
    except Refused:
        return wire.date_unix_ns(str(text)) // 1_000_000


def operated(metadata: Any, operation: Any) -> Any:
    """Give metadata after one operation on it."""
    if not isinstance(operation, Mapping):
        raise Refused(400, "an operation is an object")
    kind, key, value = str(operation.get("type")), operation.get("key"), operation.get("value")
    if kind == "update" and isinstance(value, Mapping):
        return dict(value)
    known = dict(metadata) if isinstance(metadata, Mapping) else {}
    if kind not in _OPERATIONS or not isinstance(key, str):
        raise Refused(400, f"there is no operation {kind[:32]!r} of this form")
    name = key.removeprefix("$.")
    if kind == "delete":
        known.pop(name, None)
        return known
    return known | {name: _OPERATIONS[kind](known.get(name), value)}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _sum(before: Any, value: Any) -> Any:
    if not isinstance(value, int | float):
        raise Refused(400, "an increment is a number")
    try:
        return (before if isinstance(before, int | float) else 0) + value
    except OverflowError:  # of a fraction and a whole number that is larger than any fraction
        raise Refused(400, "the sum is too large") from None


_OPERATIONS: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "set": lambda _, value: value,
    "append": lambda before, value: [*_list(before), value],
    "remove": lambda before, value: [each for each in _list(before) if each != value],
    "increment": _sum,
    "delete": lambda _, __: None,
}
