"""
Which of many repeated writes got through: one question for all of them, where each by itself would ask its own.

What comes back from the spool, and what a server that crashed may have forgotten, is full of opens and queued records of which
an earlier try may have been committed. Those that were are answered, and the others are first tries, which can be packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeGuard

from otelexec.store.outbox_statements import chunks
from otelexec.store.postgres_packing import without_nul
from otelexec.store.rows import Cancellation
from otelexec.store.schema import Transaction
from otelexec.store.writes import CloseAttempt, OpenAttempt, Opened, RecordQueued, Write

_Made: TypeAlias = tuple[type[Write], str, str | None]
"""What a write makes: an attempt, by execution and token, or a queued record, by execution and PRODUCER span."""

# One table each: without statistics, a join goes through one of them from end to end.
_EXECUTIONS = "SELECT execution_id, producer_span_id, snapshot FROM execution WHERE execution_id "
_ATTEMPTS = "SELECT execution_id, token, attempt, duplicate FROM attempt WHERE execution_id "
_CANCELLATIONS = "SELECT execution_id, requested_unix_ns, terminate FROM cancellation WHERE execution_id "


def is_doubtful(write: Write) -> TypeGuard[OpenAttempt | RecordQueued]:
    """Tell whether an earlier try of a write may have got through; what takes an attempt over looks for it in any case."""
    if isinstance(write, OpenAttempt):
        return write.repeated and not write.takes_over
    return isinstance(write, RecordQueued) and write.repeated


@dataclass(frozen=True, slots=True)
class LookedUp:
    """
    What became of doubtful writes.

    Attributes:
        writes: All writes, with those that never got through as first tries.
        results: The results of those that did, by their place.
        executions: Whose those are. What else is written of them may have got through as well, and has to look by itself.
    """

    writes: Sequence[Write]
    results: Mapping[int, object]
    executions: AbstractSet[str]


def looked_up(tx: Transaction, writes: Sequence[Write]) -> LookedUp:
    """
    Find out which doubtful writes got through.

    Args:
        tx: The transaction that is to make the others.
        writes: All writes, in order.
    """
    there = _made_before(tx, {write.execution.execution_id for write in writes if is_doubtful(write)})
    made: set[_Made] = set()
    found: list[Write] = []
    results: dict[int, object] = {}
    executions: set[str] = set()
    for place, write in enumerate(writes):
        what = _what(write)
        found.append(write)
        if what is None:
            continue
        if is_doubtful(write):
            if what in there:
                results[place] = there[what]
                executions.add(write.execution.execution_id)
            elif what not in made:
                found[place] = replace(write, repeated=False)
        made.add(what)
    return LookedUp(found, results, executions)


def _what(write: Write) -> _Made | None:
    if isinstance(write, CloseAttempt):  # it makes a row that is missing
        return _what(write.attempt)
    if isinstance(write, OpenAttempt):
        return OpenAttempt, without_nul(write.execution.execution_id), without_nul(write.token)
    if isinstance(write, RecordQueued):
        return RecordQueued, without_nul(write.execution.execution_id), None if write.span is None else write.span.span_id
    return None


def _made_before(tx: Transaction, executions: Iterable[str]) -> dict[_Made, object]:
    found: dict[_Made, object] = {}
    for among, ids in chunks(tx, list(executions)):
        snapshots: dict[str, str | None] = {}
        for execution_id, producer_span_id, snapshot in tx.execute(_EXECUTIONS + among, ids).fetchall():
            snapshots[execution_id] = snapshot
            if producer_span_id is not None:
                found[RecordQueued, execution_id, producer_span_id] = None
        if not snapshots:
            continue
        wishes = {
            execution_id: Cancellation.from_columns(requested, terminate)
            for execution_id, requested, terminate in tx.execute(_CANCELLATIONS + among, ids).fetchall()
        }
        for execution_id, token, number, duplicate in tx.execute(_ATTEMPTS + among, ids).fetchall():
            found[OpenAttempt, execution_id, token] = Opened(number, bool(duplicate), wishes.get(execution_id), snapshots.get(execution_id))
    return found
