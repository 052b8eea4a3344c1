"""The states of attempts and executions as a small pure model, and a machine that compares a store with it in any order of events."""

from __future__ import annotations

import itertools
import uuid
from dataclasses import dataclass, field, replace
from typing import Any, cast

from otelexec.store.rows import (
    CANCELLED,
    ENDED_STATES,
    FAILED,
    LOST,
    PAUSED,
    QUEUED,
    REJECTED,
    RETRYING,
    RUNNING,
    SUCCEEDED,
    TIMED_OUT,
    Cancellation,
    Outcome,
)
from otelexec.store.writes import CloseAttempt, OpenAttempt, RecordQueued, RefuseQueued, RequestCancel
from otelexec.testing.rows import (
    OpenStore,
    closed,
    closing,
    execution,
    losing,
    observing,
    opened,
    opening,
    outer_closing,
    write,
)

EXAMPLES = 150
"""How many runs of the machine."""
STEPS = 40
"""At most so many things in one of them."""

OWN_ENDS = (FAILED, SUCCEEDED, TIMED_OUT, CANCELLED, PAUSED, REJECTED)
"""How an attempt's own process may close it."""

_CLOSES = (
    *((state, retrying, False) for state in (FAILED, TIMED_OUT, REJECTED, CANCELLED) for retrying in (False, True)),
    *((state, False, False) for state in (PAUSED, SUCCEEDED)),
    *((CANCELLED, retrying, True) for retrying in (False, True)),
)
"""State, whether another attempt is on its way, whether somebody asked for the cancellation."""


@dataclass
class ModelAttempt:
    """One attempt as it should be."""

    number: int
    duplicate: bool
    state: str = RUNNING
    ended: int | None = None
    retrying: bool = False
    nonce: str | None = None
    observed: bool = False
    outer: str | None = None
    outer_outcome: str | None = None


@dataclass
class ModelExecution:
    """
    One execution as it should be; `state` says in so many words what the README's Words do.

    Attributes:
        queued: Whether a publish was recorded before any attempt.
        refused: When that publish was refused; None when it was not.
        asked: Whether somebody asked for its cancellation.
        stuck: When a cancellation that was asked for ended it; None otherwise.
        succeeded: When its first success ended.
        attempts: By token.
    """

    queued: bool = False
    refused: int | None = None
    asked: bool = False
    stuck: int | None = None
    succeeded: int | None = None
    attempts: dict[str, ModelAttempt] = field(default_factory=dict)

    @property
    def leading(self) -> ModelAttempt | None:
        """The highest-numbered attempt that is no duplicate."""
        return max((one for one in self.attempts.values() if not one.duplicate), key=lambda one: one.number, default=None)

    @property
    def state(self) -> str | None:
        """The execution's state."""
        leading = self.leading
        if self.succeeded is not None:
            return SUCCEEDED
        if self.stuck is not None:
            return CANCELLED
        if leading is None:
            return (QUEUED if self.refused is None else REJECTED) if self.queued else None
        return RETRYING if leading.retrying else leading.state

    @property
    def ended(self) -> int | None:
        """When it ended; None while it goes on."""
        if self.succeeded is not None or self.stuck is not None:
            return self.stuck if self.succeeded is None else self.succeeded
        if self.state not in ENDED_STATES:
            return None
        return self.refused if self.leading is None else self.leading.ended

    def open(self, token: str, outer: str | None = None) -> ModelAttempt:
        """Open an attempt."""
        attempt = self.attempts[token] = ModelAttempt(len(self.attempts) + 1, self.succeeded is not None, outer=outer)
        return attempt

    def close(self, token: str, outcome: Outcome, nonce: str | None) -> bool:
        """Close an attempt; gives whether this close did it."""
        attempt = self.attempts[token]
        if attempt.state != RUNNING:
            return nonce is not None and attempt.nonce == nonce
        sticky = outcome.state == CANCELLED and outcome.sticky
        attempt.state, attempt.ended, attempt.nonce = outcome.state, outcome.ended_unix_ns, nonce
        attempt.retrying = outcome.retrying and outcome.state != SUCCEEDED and not sticky
        if outcome.state == SUCCEEDED and self.succeeded is None:
            self.succeeded = outcome.ended_unix_ns
        if sticky and attempt is self.leading and self.stuck is None and self.succeeded is None:
            self.stuck = outcome.ended_unix_ns
        return True

    def end_outer(self, outer: str, state: str, *, retrying: bool) -> bool:
        """End the code around cores; gives whether this did it."""
        cores = [one for one in self.attempts.values() if one.outer == outer and one.outer_outcome is None]
        for core in cores:
            core.outer_outcome = state
        leading = self.leading
        if (
            retrying
            and leading is not None
            and leading.state not in (RUNNING, SUCCEEDED)
            and leading.number == max((core.number for core in cores), default=0)
        ):
            leading.retrying = True
        return bool(cores)


def check_against_model(open_store: OpenStore) -> None:
    """
    Do to a store and to the model the same things in any order, and compare them after each.

    Args:
        open_store: Gives a store; its database may hold anything else.

    Raises:
        AssertionError: The two disagree.
    """
    from hypothesis import HealthCheck, settings
    from hypothesis.stateful import run_state_machine_as_test

    store, machine = open_store(), _machine()
    chosen = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
        database=None,
    )
    try:
        run_state_machine_as_test(cast("Any", lambda: machine(store)), settings=chosen)
    finally:
        store.close()


def _machine() -> Any:  # noqa: C901 (one class with one method per event)
    from hypothesis import strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

    index = st.sampled_from((0, 0, 0, 1, 1, 2, 3, 4))
    own_ends = st.sampled_from(OWN_ENDS)

    class Machine(RuleBasedStateMachine):
        def __init__(self, store: Any) -> None:
            super().__init__()
            self.store = store
            self.clock = itertools.count(1)
            self._begin()

        def _begin(self) -> None:
            self.id = uuid.uuid4().hex
            self.model = ModelExecution()
            self.rows: dict[str, OpenAttempt] = {}
            self.closes: list[CloseAttempt] = []

        def _new(self, outer: str | None = None) -> OpenAttempt:
            token = f"{self.id}/{len(self.rows)}"
            row = self.rows[token] = opening(token, self.id, started=next(self.clock), outer_token=outer)
            return row

        def _pick(self, number: int) -> str:
            return list(self.rows)[-1 - number % len(self.rows)]  # mostly one of the last

        @precondition(lambda self: self.model.state in (SUCCEEDED, CANCELLED) and len(self.rows) > 2)
        @rule()
        def turn_to_another_execution(self) -> None:
            self._begin()

        @precondition(lambda self: not self.model.queued or self.rows)
        @rule()
        def publish(self) -> None:
            write(self.store, RecordQueued(execution(self.id), None, "p", next(self.clock)))
            self.model.queued = True

        @precondition(lambda self: self.model.state == QUEUED)
        @rule()
        def refuse(self) -> None:
            now = next(self.clock)
            write(self.store, RefuseQueued(self.id, Outcome(REJECTED, now, "publisher")))
            self.model.refused = now

        @rule()
        def open(self) -> None:
            row = self._new()
            answer = opened(self.store, row)
            expected = self.model.open(row.token)
            assert (answer.number, answer.duplicate) == (expected.number, expected.duplicate)
            # A wish from before a success does not concern what is delivered once more.
            assert (answer.cancellation is not None) == (self.model.asked and not expected.duplicate)

        @precondition(lambda self: self.rows)
        @rule(number=index)
        def open_again_after_a_doubt(self, number: int) -> None:
            token = self._pick(number)
            answer = opened(self.store, replace(self.rows[token], repeated=True))
            assert answer.number == self.model.attempts[token].number

        @precondition(lambda self: self.rows)
        @rule(number=index)
        def take_over(self, number: int) -> None:
            token = self._pick(number)
            row = replace(self.rows[token], outer_token=token, outer=None, outer_started_unix_ns=1, takes_over=True)
            answer = opened(self.store, row)
            attempt = self.model.attempts[token]
            assert answer.number == attempt.number
            if attempt.state == RUNNING:
                attempt.outer = token
                self.rows[token] = row

        @precondition(lambda self: self.rows)
        @rule(number=index)
        def call_another_core(self, number: int) -> None:
            outer = self.model.attempts[self._pick(number)].outer
            if outer is not None:
                row = self._new(outer)
                opened(self.store, row)
                self.model.open(row.token, outer)

        def _running(self) -> list[str]:
            return [token for token, one in self.model.attempts.items() if one.state == RUNNING]

        @precondition(lambda self: self._running())
        @rule(newest=st.booleans(), how=st.sampled_from(_CLOSES), if_asked=st.booleans())
        def close(self, newest: bool, how: tuple[str, bool, bool], if_asked: bool) -> None:
            state, retrying, sticky = how
            row = self.rows[self._running()[-1 if newest else 0]]
            self._close(row, state, retrying=retrying, sticky=sticky, if_asked=if_asked)

        @precondition(lambda self: self.rows)
        @rule(number=index, how=st.sampled_from(_CLOSES))
        def close_maybe_once_more(self, number: int, how: tuple[str, bool, bool]) -> None:
            state, retrying, sticky = how
            self._close(self.rows[self._pick(number)], state, retrying=retrying, sticky=sticky)

        @precondition(lambda self: len(self.rows) < 3)
        @rule(state=own_ends)
        def close_what_the_store_has_lost(self, state: str) -> None:
            row = self._new()
            self.model.open(row.token)
            self._close(row, state)

        def _close(self, row: OpenAttempt, state: str, *, retrying: bool = False, sticky: bool = False, if_asked: bool = False) -> None:
            now = next(self.clock)
            close = closing(
                row,
                state,
                nonce=f"{self.id}/{now}",
                ended=now,
                retrying=retrying,
                sticky=sticky,
                if_asked=if_asked,
            )
            self.closes.append(close)
            self._compare_close(close)

        @precondition(lambda self: self.closes)
        @rule(number=index)
        def repeat_a_close(self, number: int) -> None:
            self._compare_close(self.closes[-1 - number % len(self.closes)])

        def _compare_close(self, close: CloseAttempt) -> None:
            frozen = close.if_cancelled if close.if_cancelled is not None and self.model.asked else close.frozen
            won = self.model.close(close.attempt.token, frozen.outcome, close.nonce)
            answer = closed(self.store, close)
            attempt = self.model.attempts[close.attempt.token]
            assert (answer.won, answer.state, answer.number, answer.duplicate) == (
                won,
                attempt.state,
                attempt.number,
                attempt.duplicate,
            )

        @precondition(lambda self: self.rows)
        @rule(number=index)
        def lose(self, number: int) -> None:
            lost = losing(self.rows[self._pick(number)], ended=next(self.clock))
            assert write(self.store, lost) == [self.model.close(lost.token, lost.frozen.outcome, None)]

        @precondition(lambda self: any(one.state == LOST for one in self.model.attempts.values()))
        @rule(number=index, state=own_ends)
        def observe(self, number: int, state: str) -> None:
            lost = [token for token, one in self.model.attempts.items() if one.state == LOST]
            token = lost[number % len(lost)]
            write(self.store, observing(self.rows[token], state))
            self.model.attempts[token].observed = True

        @precondition(lambda self: any(one.outer for one in self.model.attempts.values()))
        @rule(number=index, state=own_ends, retrying=st.booleans())
        def end_the_outer_code(self, number: int, state: str, retrying: bool) -> None:
            outers = [one.outer for one in self.model.attempts.values() if one.outer]
            outer = outers[number % len(outers)]
            expected = self.model.end_outer(outer, state, retrying=retrying)
            assert write(self.store, outer_closing(outer, self.id, state, retrying=retrying)) == [expected]

        @precondition(lambda self: self.rows and not self.model.asked)
        @rule(terminate=st.sampled_from((None, False, True)))
        def ask_to_cancel(self, terminate: bool | None) -> None:
            assert write(self.store, RequestCancel(self.id, Cancellation(1, terminate))) == [self.model.state]
            self.model.asked = self.model.state != SUCCEEDED

        @invariant()
        def the_store_says_what_the_model_says(self) -> None:
            found = self.store.execution(self.id)
            if self.model.state is None:
                assert found is None
                return
            assert found is not None
            assert (found.state, found.ended_unix_ns) == (self.model.state, self.model.ended)
            assert [(one.attempt, one.state, one.duplicate, one.ended_unix_ns) for one in found.attempts] == [
                (one.number, one.state, one.duplicate, one.ended) for one in self.model.attempts.values()
            ]
            assert [(one.observed is not None, one.outer_outcome) for one in found.attempts] == [
                (one.observed, one.outer_outcome) for one in self.model.attempts.values()
            ]

    return Machine
