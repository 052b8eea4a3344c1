"""
The join: the terminal record and the span that says the same, in one transaction.

First the store, retried with backoff for a bounded time; then a minimal record, if the store refuses the full one;
then the fsynced spool; then one CRITICAL log line with everything, kept in memory as well. The user's result and
exception are never touched by any of it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from otelexec.clock import monotonic
from otelexec.effects import Block, Commit, Effect, Sleep
from otelexec.errors import StoreError, StoreReentered, StoreRejected, StoreVersionError
from otelexec.freeze import end_span, freeze, minimal, observed
from otelexec.store.rows import CANCELLED, LOST
from otelexec.store.writes import CloseAttempt, Closed, CloseOuter, OpenAttempt, Write

if TYPE_CHECKING:
    from otelexec.endings import Ending
    from otelexec.journal import Journal
    from otelexec.running import RunningExecution
    from otelexec.runtime import Runtime

logger = logging.getLogger("otelexec.finalize")

FIRST_BACKOFF_SECONDS = 0.01
LAST_BACKOFF_SECONDS = 0.5

# Of its own: a user's random.seed() must neither set it nor be disturbed by it.
_jitter = random.SystemRandom()


@dataclass(frozen=True, slots=True)
class Kept:
    """
    The store could not take a write.

    Attributes:
        durable: Whether the spool has it on disk; else it is in the log and in memory.
    """

    durable: bool


def persist(journal: Journal, write: Write, *, durable: bool, patience_seconds: float) -> Generator[Effect, Any, object]:
    """
    Bring a write into the store, or else keep it where it will be found.

    Args:
        journal: The journal of this process.
        write: What to write.
        durable: Whether it must survive power loss.
        patience_seconds: How long to try the store; one of another version is tried once, and so is one whose commit this interrupts.

    Returns:
        The store's result; StoreRejected when the store refused this write; Kept when it is in the spool; StoreUnavailable
        for an exclusive open, about which the spool can't decide.
    """
    exclusive = isinstance(write, OpenAttempt) and write.exclusive
    deadline = monotonic() + patience_seconds
    backoff = FIRST_BACKOFF_SECONDS
    # Once something is in the spool all else goes there until it is taken in, so that the order stays.
    while exclusive or not journal.spooling:
        left = deadline - monotonic()
        answer = yield Commit(write, durable, max(left, 0.001))
        if not isinstance(answer, StoreError) or isinstance(answer, StoreRejected):
            return answer
        left = deadline - monotonic()
        given_up = left <= 0 or isinstance(answer, StoreReentered | StoreVersionError)
        if given_up and exclusive:
            return answer
        if given_up:
            journal.store_failed(answer)
            break
        if isinstance(write, OpenAttempt):
            write = replace(write, repeated=True)  # a store may fail after it has committed
        yield Sleep(min(left, backoff * _jitter.uniform(0.5, 1.0)))
        backoff = min(2 * backoff, LAST_BACKOFF_SECONDS)
    kept: Kept = yield Block(partial(journal.keep, write, durable=durable))
    return kept


def finalize(runtime: Runtime, execution: RunningExecution, ending: Ending, ended_ns: int) -> Generator[Effect, Any, bool]:
    """
    Close an attempt and its span together. May be repeated: the token makes it idempotent.

    Args:
        runtime: The runtime of this process.
        execution: What ended.
        ending: How.
        ended_ns: When, in nanoseconds since 1970.

    Returns:
        Whether its record is durable.
    """
    execution.closed = True
    end_span(execution, ending, ended_ns)
    if not runtime.records:
        return False
    write = execution.closing or closing(runtime, execution, ending, ended_ns)
    execution.closing = write
    patience = runtime.settings.finalize_timeout_seconds
    # The end of an outer executor is no promise: the core's success stands whatever becomes of it.
    durable = isinstance(write, CloseAttempt)
    answer = yield from persist(runtime.journal, write, durable=durable, patience_seconds=patience)
    if isinstance(answer, StoreRejected) and isinstance(write, CloseAttempt):
        logger.error("otelexec.finalize.fallback: %s", answer)
        write = minimal(runtime, execution, write, str(answer))
        answer = yield from persist(runtime.journal, write, durable=True, patience_seconds=patience)
    if isinstance(answer, StoreRejected):
        runtime.journal.cry(write, answer)
        return False
    if isinstance(answer, Kept):
        return answer.durable
    if isinstance(answer, Closed):
        execution.number = answer.number
        if not answer.won:
            yield from _lost_race(runtime, execution, write, answer)
    return True


def _lost_race(
    runtime: Runtime, execution: RunningExecution, write: CloseAttempt | CloseOuter, closed: Closed
) -> Generator[Effect, Any, None]:
    logger.warning(
        "otelexec.finalize.lost_race: execution %s attempt %d is %s already, recorded by %s; this attempt ended %s",
        execution.id,
        closed.number,
        closed.state,
        closed.finalized_by,
        write.frozen.outcome.state,
        extra={"otelexec_state": closed.state, "otelexec_finalized_by": closed.finalized_by},
    )
    if closed.state == LOST:
        found = observed(runtime, execution, write.frozen)
        yield from persist(runtime.journal, found, durable=True, patience_seconds=runtime.settings.finalize_timeout_seconds)


def closing(runtime: Runtime, execution: RunningExecution, ending: Ending, ended_ns: int) -> CloseAttempt | CloseOuter:
    """Make the write that closes an attempt or, where a core had taken it over, the executor around that."""
    children = runtime.collector.take_children(execution, runtime.process_id)
    if execution.cores.begun:
        return CloseOuter(
            execution_id=execution.id,
            outer_token=execution.token,
            frozen=freeze(execution, ending, ended_ns, outer=True),
            spans=children,
            retrying=ending.retrying,
        )
    depends = ending.depends_on_cancellation and not execution.cancel_requested
    if_cancelled = replace(ending, state=CANCELLED, classification=None) if depends else None
    return CloseAttempt(
        attempt=execution.attempt_row,
        number=execution.number,
        frozen=freeze(execution, ending, ended_ns),
        if_cancelled=None if if_cancelled is None else freeze(execution, if_cancelled, ended_ns, sticky=True),
        nonce=f"{runtime.process_id}:{execution.token}",
        spans=children,
    )
