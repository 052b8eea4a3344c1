"""
What every execution writes, packed for one call of a function on the server.

Opens, closes, queued records, spans and markers of a whole group go to the server as a few JSON texts: one statement, one
round trip, and one pass of the C encoder instead of a statement for each. A write that needs more than its rows as they
stand (a takeover, a repetition, a cancellation that decides) is not packed, and a second write for the same execution not together
with the first, unless it closes the attempt that this opens.
"""

from __future__ import annotations

import json
import re
from binascii import b2a_base64
from collections.abc import Container, Iterable, Sequence
from typing import Any, Final

from otelexec.store.attempt_statements import execution_end
from otelexec.store.postgres_schema import CLOSE_FIELDS, OPEN_FIELDS, SCHEMA
from otelexec.store.rows import Cancellation, ExecutionRow, Outcome, SpanRow
from otelexec.store.writes import (
    NO_SPANS,
    AddSpans,
    CloseAttempt,
    Closed,
    CloseLost,
    OpenAttempt,
    Opened,
    RecordProgress,
    RecordQueued,
    Write,
)

_GROUP: Final = f"SELECT * FROM {SCHEMA}.commit_writes($1, $2, $3, $4, $5)".encode()


def _lone(name: str, fields: Sequence[tuple[str, str]]) -> bytes:
    places = ", ".join(f"${place}" for place in range(1, len(fields) + 3))
    return f"SELECT * FROM {SCHEMA}.{name}({places})".encode()


_LONE_OPEN: Final = _lone("open_attempt", OPEN_FIELDS)
_LONE_CLOSE: Final = _lone("close_attempt", CLOSE_FIELDS)

_PACKED: Final = (OpenAttempt, CloseAttempt, CloseLost, RecordQueued, AddSpans, RecordProgress)

# A NUL as json.dumps writes it, behind an even number of backslashes. PostgreSQL's text has no NUL
# (https://www.postgresql.org/docs/current/datatype-character.html).
_NUL: Final = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")
_INSTEAD_OF_NUL: Final = "\ufffd"


def without_nul(value: Any) -> Any:
    """Give a value that PostgreSQL's text can hold."""
    return value.replace("\0", _INSTEAD_OF_NUL) if isinstance(value, str) and "\0" in value else value


def stretches(writes: Sequence[Write], *, but: Container[int] = (), alone: Container[str] = ()) -> list[tuple[bool, list[int]]]:
    """
    Give the places of writes in order, those that can be packed together as one stretch, and whether they can.

    Args:
        writes: The writes.
        but: Places to leave out.
        alone: Executions whose writes are not packed.
    """
    if len(writes) == 1:
        return [(_is_simple(writes[0]), [0])]
    found: list[tuple[bool, list[int]]] = []
    subjects: dict[str, Write] = {}
    for place, write in enumerate(writes):
        if place in but:
            continue
        subject = _subject(write)
        simple = _is_simple(write) and (subject is None or subject not in alone)
        before = None if subject is None else subjects.get(subject)
        if found and simple and found[-1][0] and (before is None or _closes(before, write)):
            found[-1][1].append(place)
        else:
            found.append((simple, [place]))
            subjects.clear()
        if subject is not None:
            subjects[subject] = write
    return found


def _closes(before: Write, write: Write) -> bool:
    # Two writes for one execution keep their order: in a packed group opens come before closes, whatever theirs is.
    return isinstance(before, OpenAttempt) and isinstance(write, CloseAttempt) and before.token == write.attempt.token


def _is_simple(write: Write) -> bool:
    if isinstance(write, OpenAttempt):
        return not (write.takes_over or write.repeated or write.exclusive or write.number)
    if isinstance(write, CloseAttempt):
        return write.if_cancelled is None
    if isinstance(write, RecordQueued):
        return not write.repeated
    if isinstance(write, AddSpans):
        return not (write.nonce and write.opened)
    return isinstance(write, _PACKED)


def _subject(write: Write) -> str | None:
    if isinstance(write, OpenAttempt | RecordQueued):
        return write.execution.execution_id
    if isinstance(write, CloseAttempt):
        return write.attempt.execution.execution_id
    return getattr(write, "execution_id", None)


class Packed:
    """
    A group of writes as one statement.

    Args:
        writes: All writes.
        places: Which of them to pack.
    """

    def __init__(self, writes: Sequence[Write], places: Iterable[int]) -> None:
        self._writes = writes
        self._places = tuple(places)
        self._opens: list[dict[str, Any]] = []
        self._closes: list[dict[str, Any]] = []
        self._more: dict[str, list[dict[str, Any]]] = {}
        for place in self._places:
            self._pack(place, writes[place])

    def statement(self, *, durable: bool, server: int) -> tuple[bytes, list[bytes | None]]:
        """
        Give the statement and its parameters, as text.

        Args:
            durable: Whether it must survive a crash of the server.
            server: When the server was started, in microseconds since 1970, as far as the caller knows.
        """
        first = [b"t" if durable else b"f", b"%d" % server]
        if len(self._opens) + len(self._closes) == 1 and not self._more:
            if self._opens:
                return _LONE_OPEN, first + [_plain(self._opens[0].get(field)) for field, _ in OPEN_FIELDS]
            return _LONE_CLOSE, first + [_plain(self._closes[0].get(field)) for field, _ in CLOSE_FIELDS]
        return _GROUP, [*first, _text(self._opens), _text(self._closes), _text(self._more)]

    def settle(self, rows: Iterable[Sequence[bytes | None]], results: list[object]) -> list[int]:
        """
        Put what the server gave into the results.

        Args:
            rows: The rows of the call.
            results: One place for each write.

        Returns:
            The places of closes that found no running attempt: `attempt_statements.py` says what that means.
        """
        found = {_number(row[0]): row for row in rows}
        left = []
        for place in self._places:
            write, row = self._writes[place], found.get(place)
            if isinstance(write, OpenAttempt) and row is not None:
                results[place] = _opened(row)
            elif isinstance(write, CloseLost):
                results[place] = row is not None
            elif isinstance(write, CloseAttempt):
                if row is None:
                    left.append(place)
                else:
                    outcome = write.frozen.outcome
                    number, duplicate = _number(row[1]) or 0, bool(_number(row[2]))
                    results[place] = Closed(True, outcome.state, outcome.finalized_by, number, duplicate, _decoded(row[3]))  # noqa: FBT003 (won)
        return left

    def _pack(self, place: int, write: Write) -> None:
        if isinstance(write, OpenAttempt):
            self._opens.append(_opening(place, write))
            self._opened(write.opened, write.process_id, write.execution.parent_execution_id)
        elif isinstance(write, CloseAttempt):
            self._close(place, write)
        elif isinstance(write, CloseLost):
            row = _closing(place, write.execution_id, write.token, write.frozen.outcome)
            if write.frozen.request:
                row |= {"rq": _b64(write.frozen.request), "ct": 1}
            self._closes.append(row)
        elif isinstance(write, RecordQueued):
            self._queued(write)
        elif isinstance(write, AddSpans):
            self._spans(write, plain=True)
        elif isinstance(write, RecordProgress):
            row = {"e": write.execution_id, "t": write.token, "pr": write.progress, "at": write.at_unix_ns}
            self._more.setdefault("progress", []).append(row)

    def _close(self, place: int, write: CloseAttempt) -> None:
        request, spans = write.frozen.request, write.spans
        row = _closing(place, write.attempt.execution.execution_id, write.attempt.token, write.frozen.outcome)
        row["nn"] = write.nonce
        if request:
            row |= {"rq": _b64(request + spans.request), "ct": 1 + spans.count}
        self._closes.append(row)
        if spans is not NO_SPANS:
            self._spans(spans, plain=not request, ends=True)

    def _queued(self, write: RecordQueued) -> None:
        span = write.span
        row = {**_execution(write.execution), "b": write.queued_unix_ns}
        if span is not None:
            row |= {"ti": span.trace_id, "si": span.span_id}
            self._opened((span,), write.process_id, write.execution.execution_id)
        self._more.setdefault("queued", []).append(row)
        self._opened(write.opened, write.process_id, write.execution.parent_execution_id)

    def _spans(self, write: AddSpans, *, plain: bool, ends: bool = False) -> None:
        execution_id = write.execution_id
        if plain and write.count:
            row = {"nn": write.nonce, "rq": _b64(write.request), "ct": write.count, "e": execution_id}
            self._more.setdefault("plain", []).append(row)
        for span, request in write.recorded:
            ended = {"ti": span.trace_id, "si": span.span_id, "rq": _b64(request), "e": execution_id}
            self._more.setdefault("ended", []).append(ended)
        self._opened(write.opened, write.process_id, execution_id)
        if write.last_end_unix_ns and execution_id is not None and not ends:  # what has ended needs no sign of life
            self._more.setdefault("seen", []).append({"e": execution_id, "w": write.process_id, "at": write.last_end_unix_ns})

    def _opened(self, spans: Iterable[SpanRow], process_id: str, execution_id: str | None) -> None:
        for span in spans:
            row = {"ti": span.trace_id, "si": span.span_id, "w": process_id, "e": execution_id, "sb": _b64(span.start)}
            self._more.setdefault("opened", []).append(row)


def _number(value: bytes | None) -> int | None:
    return None if value is None else int(value)


def _decoded(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8")


def _opened(row: Sequence[bytes | None]) -> Opened:
    duplicate, requested, terminate = bool(_number(row[2])), _number(row[4]), _number(row[5])
    wish = None if requested is None or duplicate else Cancellation.from_columns(requested, terminate)
    return Opened(_number(row[1]), duplicate, wish, _decoded(row[3]))


def _execution(row: ExecutionRow) -> dict[str, Any]:
    return {
        "e": row.execution_id,
        "n": row.name,
        "q": row.request_id,
        "s": row.source,
        "c": row.correlation,
        "p": row.parent_execution_id,
    }


def _opening(place: int, write: OpenAttempt) -> dict[str, Any]:
    span, outer = write.span, write.outer
    row = {
        **_execution(write.execution),
        "i": place,
        "t": write.token,
        "w": write.process_id,
        "b": write.started_unix_ns,
        "d": write.deadline_unix_ns,
    }
    if span is not None:
        row |= {"ti": span.trace_id, "si": span.span_id, "sb": _b64(span.start)}
    if write.outer_token is not None:
        row |= {"ot": write.outer_token, "os": write.outer_started_unix_ns}
    if outer is not None:
        row |= {"oi": outer.span_id, "oti": outer.trace_id, "ob": _b64(outer.start)}
    return row


def _closing(place: int, execution_id: str, token: str, outcome: Outcome) -> dict[str, Any]:
    state, ended, sticky, snapshot = execution_end(outcome)
    return {
        "i": place,
        "e": execution_id,
        "t": token,
        "st": outcome.state,
        "en": outcome.ended_unix_ns,
        "et": outcome.error_type,
        "em": outcome.error_message,
        "fb": outcome.finalized_by,
        "cl": outcome.classification,
        "rc": outcome.reconciled_unix_ns,
        "pr": outcome.progress,
        "ou": outcome.output,
        "xs": state,
        "xe": ended,
        "sk": sticky,
        "sn": snapshot,
    }


def _b64(data: bytes) -> str:
    return b2a_base64(data, newline=False).decode("ascii")


def _plain(value: Any) -> bytes | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else str(value)
    return (text.replace("\0", _INSTEAD_OF_NUL) if "\0" in text else text).encode("utf-8")


def _text(rows: Any) -> bytes | None:
    if not rows:
        return None
    text = json.dumps(rows)
    return (_NUL.sub(r"\1\\ufffd", text) if r"\u0000" in text else text).encode("ascii")
