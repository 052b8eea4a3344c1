"""
Which of many repeated writes got through: one question for all of them, where each by itself would ask its own.

What comes back from the spool, and what a server that crashed may have forgotten, is full of opens and queued records of which
an earlier try may have been committed. Those that were are answered, and the others are first tries, which can be packed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from otelexec.store.outbox_statements import chunks
from otelexec.store.rows import Cancellation
from otelexec.store.schema import Transaction
from otelexec.store.writes import CloseAttempt, OpenAttempt, Opened, RecordQueued, Write

_Made: TypeAlias = tuple[str, str | None]
"""What a write makes: an execution's attempt, by its token, or its queued record, by the id of the PRODUCER span."""

_OPENS = """
    SELECT a.execution_id, a.token, a.attempt, a.duplicate, e.snapshot, c.requested_unix_ns, c.terminate
    FROM attempt a JOIN execution e ON e.execution_id = a.execution_id LEFT JOIN cancellation c ON c.execution_id = a.execution_id
    WHERE a.execution_id """
_QUEUED = "SELECT execution_id, producer_span_id FROM execution WHERE producer_span_id IS NOT NULL AND execution_id "


def doubtful(writes: Sequence[Write]) -> list[OpenAttempt | RecordQueued]:
    """Give the writes of which an earlier try may have got through; what takes an attempt over looks for it in any case."""
    return [
        write
        for write in writes
        if isinstance(write, OpenAttempt | RecordQueued) and write.repeated and not (isinstance(write, OpenAttempt) and write.takes_over)
    ]


def looked_up(tx: Transaction, writes: Sequence[Write]) -> tuple[list[Write], Mapping[int, object]]:
    """
    Find out which doubtful writes got through.

    Args:
        tx: The transaction that is to make the others.
        writes: All writes, in order.

    Returns:
        The writes, with those that never got through as first tries; and the results of those that did, by their place.
    """
    in_doubt = doubtful(writes)
    there = _made_before(tx, in_doubt)
    these = set(map(id, in_doubt))
    made: set[_Made] = set()
    found: list[Write] = []
    results: dict[int, object] = {}
    for place, write in enumerate(writes):
        what = _what(write)
        found.append(write)
        if what is None:
            continue
        if id(write) in these and what in there:
            results[place] = there[what]
        elif id(write) in these and what not in made and isinstance(write, OpenAttempt | RecordQueued):
            found[place] = replace(write, repeated=False)
        made.add(what)
    return found, results


def _what(write: Write) -> _Made | None:
    if isinstance(write, OpenAttempt):
        return write.execution.execution_id, write.token
    if isinstance(write, CloseAttempt):  # it makes a row that is missing
        return write.attempt.execution.execution_id, write.attempt.token
    if isinstance(write, RecordQueued):
        return write.execution.execution_id, None if write.span is None else write.span.span_id
    return None


def _made_before(tx: Transaction, writes: Sequence[OpenAttempt | RecordQueued]) -> dict[_Made, object]:
    found: dict[_Made, object] = {}
    for among, ids in chunks(tx, list({write.execution.execution_id for write in writes})):
        for execution_id, token, number, duplicate, snapshot, requested, terminate in tx.execute(_OPENS + among, ids).fetchall():
            wish = None if requested is None else Cancellation(requested, None if terminate is None else bool(terminate))
            found[execution_id, token] = Opened(number, bool(duplicate), wish, snapshot)
        found.update(dict.fromkeys(tx.execute(_QUEUED + among, ids).fetchall()))
    return found
