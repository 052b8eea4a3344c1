"""Contract: what a parent process writes about its children's attempts, and how work that waits finds what it waited for."""

from __future__ import annotations

import json
from dataclasses import replace

from otelexec.store.base import Store
from otelexec.store.rows import RUNNING, SUCCEEDED, TIMED_OUT, Frozen, Outcome
from otelexec.store.writes import AmendAttempt, CloseLost, Contribute, Heartbeat, NameMessage, ReadContributions
from otelexec.testing.rows import closed, closing, execution, opened, opening, process, pruned, record, span, states, write

OOPS = "result_not_stored"


class FamilyContract:
    """Parents and children, chords and their bodies."""

    def test_what_a_parent_accepted_becomes_the_childs(self, store: Store) -> None:
        write(store, Heartbeat(replace(process("parent"), pid=1)), Heartbeat(replace(process("child"), pid=2)))
        opened(store, opening(process_id="parent"))
        child = replace(opening(process_id="child", started=7, takes_over=True), span=span("own"))
        answer = opened(store, child)
        assert (answer.number, answer.duplicate) == (1, False)
        (attempt,) = record(store).attempts
        assert (attempt.pid, attempt.started_unix_ns, attempt.span_id) == (2, 7, span("own").span_id)
        assert [work.process_id for work in store.open_work(["parent", "child"], limit=10)] == ["child"]
        closed(store, closing(child))
        assert states(store) == (SUCCEEDED, [SUCCEEDED])

    def test_an_acceptance_that_comes_late_changes_nothing(self, store: Store) -> None:
        child = opening(process_id="child", takes_over=True)
        opened(store, child)
        late = replace(opening(process_id="parent"), repeated=True)
        assert opened(store, late).number == 1
        assert [work.process_id for work in store.open_work(["parent", "child"], limit=10)] == ["child"]
        closed(store, closing(child))
        before = record(store)
        assert opened(store, late).number == 1
        assert record(store) == before

    def test_a_process_says_who_reports_its_death(self, store: Store) -> None:
        row = replace(process("child"), parent_pid=41, parent_start=4141)
        write(store, Heartbeat(row))
        opened(store, opening(process_id="child"))
        (found,) = store.processes()
        assert (found.parent_pid, found.parent_start) == (41, 4141)

    def test_a_parent_may_know_more_of_an_end_than_that_it_was_lost(self, store: Store) -> None:
        opened(store, opening())
        outcome = Outcome(TIMED_OUT, 9, "parent", "hard_limit", "TimeLimit", "stopped")
        assert write(store, CloseLost("e", "t", Frozen(outcome, b"span"))) == [True]
        assert states(store) == (TIMED_OUT, [TIMED_OUT])
        assert record(store).attempts[0].classification == "hard_limit"

    def test_a_classification_is_added_to_a_closed_attempt_that_has_none(self, store: Store) -> None:
        row = opening()
        opened(store, row)
        assert write(store, AmendAttempt("e", "t", OOPS)) == [False]
        assert states(store) == (RUNNING, [RUNNING])
        closed(store, closing(row))
        assert write(store, AmendAttempt("e", "t", OOPS), AmendAttempt("e", "t", "other")) == [True, False]
        assert (record(store).attempts[0].state, record(store).attempts[0].classification) == (SUCCEEDED, OOPS)

    def test_the_name_of_a_message_may_come_after_its_record(self, store: Store) -> None:
        opened(store, opening())
        write(store, NameMessage("e", 'run "1"'), NameMessage("nobody", "m"))
        assert json.loads(record(store).correlation) == {"tenant": "a", "messaging.message.id": 'run "1"'}
        assert store.executions_of('run "1"', limit=2) == ["e"]

    def test_contributions_are_found_in_the_order_of_their_executions(self, store: Store) -> None:
        for name in ("a", "b", "c"):
            opened(store, replace(opening(f"t{name}", name), execution=execution(name)))
        write(store, Contribute("body", "b", "2" * 32, "b" * 16), Contribute("body", "a", "1" * 32, "a" * 16))
        write(store, Contribute("other", "c", "3" * 32, "c" * 16))
        assert write(store, ReadContributions("body")) == [[("1" * 32, "a" * 16), ("2" * 32, "b" * 16)]]
        write(store, Contribute("body", "a", "1" * 32, "d" * 16))
        assert write(store, ReadContributions("body")) == [[("1" * 32, "d" * 16), ("2" * 32, "b" * 16)]]
        assert write(store, ReadContributions("nothing")) == [[]]

    def test_contributions_go_with_their_execution(self, store: Store) -> None:
        row = opening()
        opened(store, row)
        write(store, Contribute("body", "e", "1" * 32, "a" * 16))
        closed(store, replace(closing(row), frozen=Frozen(Outcome(SUCCEEDED, 10), b"")))
        assert pruned(store, 2**60) == 1
        opened(store, opening())
        assert write(store, ReadContributions("body")) == [[]]
