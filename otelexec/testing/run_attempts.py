"""Contract: exclusive attempts, what becomes of their runs, and how many of a lane run at a time."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

from otelexec.store import run_queries
from otelexec.store.base import Store
from otelexec.store.rows import CANCELLED, FAILED, LOST, SUCCEEDED, Cancellation
from otelexec.store.runs import Enqueued, EnqueueRun, RescheduleRun
from otelexec.store.writes import Busy, Closed, Heartbeat, Opened, RequestCancel
from otelexec.testing.rows import OpenStore, beat, closing, execution, losing, opened, opening, process, record, states, write
from otelexec.testing.runs import HOUR, due, enqueue, exclusive, found, run_row, until_lapsed
from otelexec.testing.sharing import at_once

MOST_SECONDS = 0.5
"""How long a look for what is due may take: some milliseconds, on a machine that does other things as well."""


class RunAttemptContract:
    """Attempts at runs."""

    def test_an_exclusive_attempt_is_opened_while_no_other_runs(self, store: Store) -> None:
        first, second = exclusive("t1", "e"), exclusive("t2", "e")
        assert opened(store, first) == Opened(1)
        (busy,) = write(store, second)
        assert isinstance(busy, Busy)
        assert "attempt 1" in busy.reason
        assert opened(store, replace(first, repeated=True)) == Opened(1)
        write(store, closing(first, FAILED))
        assert opened(store, second).number == 2
        write(store, closing(second))
        assert opened(store, exclusive("t3", "e")).duplicate

    def test_of_many_exclusive_attempts_at_once_one_is_opened(self, store: Store, other_store: OpenStore) -> None:
        stores = [store, other_store(), other_store()]
        answers: list[object] = []

        def attempt(number: int) -> None:
            (answer,) = stores[number % 3].commit([exclusive(f"t{number}", "e")], durable=False, timeout_seconds=20)
            answers.append(answer)

        for round_ in range(5):
            answers.clear()
            at_once(*(partial(attempt, number) for number in range(round_ * 6, round_ * 6 + 6)))
            assert sum(isinstance(answer, Opened) for answer in answers) == 1, answers
            (running,) = (each for each in record(store).attempts if each.ended_unix_ns is None)
            for number in range(round_ * 6, round_ * 6 + 6):
                write(store, losing(opening(f"t{number}", "e")))
            assert running.attempt == round_ + 1

    def test_a_backend_that_counts_attempts_names_the_least_number(self, store: Store) -> None:
        assert opened(store, replace(opening("t1"), number=3)).number == 3
        assert opened(store, replace(opening("t2"), number=2)).number == 4

    def test_a_run_and_its_execution_are_one(self, store: Store) -> None:
        answer = enqueue(store, run_row())
        assert answer == Enqueued("r", "e-r", cached=False, created=True)
        assert found(store).state == record(store, "e-r").state == "queued"
        assert [each.run.run_id for each in due(store)] == ["r"]
        assert not due(store, "another")
        attempt = exclusive("t", "e-r")
        opened(store, attempt)
        assert (found(store).state, found(store).attempts) == ("running", 1)
        assert not due(store)
        write(store, closing(attempt))
        assert found(store).state == "succeeded"
        (busy,) = write(store, exclusive("t2", "e-r"))
        assert isinstance(busy, Busy)

    def test_a_failed_attempt_is_followed_by_another_after_a_while(self, store: Store) -> None:
        enqueue(store, run_row())
        for number, ended in ((1, store.now_unix_ns()), (2, store.now_unix_ns() - HOUR)):
            attempt = exclusive(f"t{number}", "e-r")
            opened(store, attempt)
            write(store, closing(attempt, FAILED, retrying=True, ended=ended))
            assert found(store).state == "retrying"
            assert len(due(store)) == (0 if number == 1 else 1)

    def test_how_long_something_waits_counts_on_the_stores_clock(self, store: Store) -> None:
        before = store.now_unix_ns()
        enqueue(store, replace(run_row("delayed", delay=HOUR), ttl_ns=2 * HOUR))
        enqueue(store, replace(run_row("dated"), not_before_unix_ns=before + 2 * HOUR))
        enqueue(store, replace(run_row("past"), not_before_unix_ns=before - HOUR, ttl_ns=HOUR))
        enqueue(store, replace(run_row("ahead"), priority_ns=HOUR, ttl_ns=HOUR))
        after = store.now_unix_ns()
        delayed, dated, past, ahead = (found(store, run_id) for run_id in ("delayed", "dated", "past", "ahead"))
        assert before <= delayed.created_unix_ns == delayed.due_unix_ns - HOUR == (delayed.expires_unix_ns or 0) - 3 * HOUR <= after
        assert dated.due_unix_ns == before + 2 * HOUR
        assert before <= past.due_unix_ns == (past.expires_unix_ns or 0) - HOUR <= after
        assert before <= ahead.due_unix_ns + HOUR == (ahead.expires_unix_ns or 0) - HOUR <= after
        assert [each.run.run_id for each in due(store)] == ["ahead", "past"]
        assert write(store, RescheduleRun("delayed", 3 * HOUR), RescheduleRun("dated", not_before_unix_ns=after + HOUR)) == [True, True]
        assert before + 3 * HOUR <= found(store, "delayed").due_unix_ns <= store.now_unix_ns() + 3 * HOUR
        assert (found(store, "delayed").expires_unix_ns or 0) - found(store, "delayed").due_unix_ns == 2 * HOUR
        assert found(store, "dated").due_unix_ns == after + HOUR
        assert record(store, "e-delayed").queued_unix_ns == delayed.created_unix_ns
        assert after <= found(store, "past").read_unix_ns <= store.now_unix_ns()

    def test_a_workers_clock_changes_nothing_about_when_a_run_is_retried(self, store: Store) -> None:
        for skew in (-HOUR, HOUR):
            worker = f"p{skew}"
            write(store, Heartbeat(process(worker), clock_unix_ns=store.now_unix_ns() + skew))
            for since, again in ((0, False), (HOUR // 2, True)):
                run_id = f"r{skew}-{since}"
                enqueue(store, run_row(run_id))
                attempt = exclusive("t", f"e-{run_id}", process_id=worker)
                opened(store, attempt)
                write(store, closing(attempt, FAILED, retrying=True, ended=store.now_unix_ns() + skew - since))
                assert (run_id in {each.run.run_id for each in due(store)}) is again, run_id
        enqueue(store, run_row("lost"))
        attempt = exclusive("t", "e-lost", process_id=f"p{HOUR}")
        opened(store, attempt)
        write(store, losing(attempt, ended=store.now_unix_ns() + HOUR))
        assert "lost" in {each.run.run_id for each in due(store)}

    def test_what_was_attempted_meanwhile_is_looked_at_anew(self, store: Store) -> None:
        enqueue(store, run_row())
        first = replace(exclusive("t1", "e-r"), expected_attempts=0)
        opened(store, first)
        assert opened(store, replace(first, repeated=True)).number == 1, "its own repetition"
        write(store, closing(first, FAILED, retrying=True))
        (busy,) = write(store, replace(exclusive("t2", "e-r"), expected_attempts=0))
        assert isinstance(busy, Busy)
        assert opened(store, replace(exclusive("t2", "e-r"), expected_attempts=1)).number == 2

    def test_a_lost_attempt_is_retried_while_there_are_any(self, store: Store) -> None:
        enqueue(store, run_row(attempts=2))
        for token, state in (("t1", "retrying"), ("t2", LOST)):
            attempt = exclusive(token, "e-r")
            opened(store, attempt)
            write(store, losing(attempt))
            assert states(store, "e-r")[0] == state
        assert not due(store)
        plain = opening("t", "plain")
        opened(store, plain)
        write(store, losing(plain))
        assert states(store, "plain") == (LOST, [LOST])

    def test_an_attempt_of_a_process_whose_lease_has_lapsed_may_be_joined(self, store: Store) -> None:
        enqueue(store, run_row())
        opened(store, exclusive("t1", "e-r", process_id="unheard of"))
        beat(store, "p")
        assert not due(store, lapsed=True), "of a process without a row nobody knows the lease"
        write(store, losing(opening("t1", "e-r")))
        opened(store, exclusive("t2", "e-r"))
        assert not due(store, lapsed=True), "its lease holds"
        (busy,) = write(store, replace(exclusive("t3", "e-r"), takes_lapsed=True))
        assert isinstance(busy, Busy)

    def test_a_run_whose_worker_hangs_is_taken_over_in_its_own_lane(self, store: Store) -> None:
        enqueue(store, run_row(lane="lane"))
        for number in range(20):
            enqueue(store, run_row(f"waits {number}"))
        write(store, Heartbeat(replace(process("hung"), lease_seconds=0.001)))
        opened(store, exclusive("t1", "e-r", process_id="hung"))
        first = until_lapsed(store)
        assert (first.run.run_id, first.lapsed) == ("r", True), "ahead of any number that wait"
        others = store.read(lambda tx: run_queries.due_runs(tx, ("task",), limit=100, lapsed_too=True, but=("r",)))
        assert len(others) == 20
        second = replace(exclusive("t2", "e-r"), takes_lapsed=True, expected_attempts=1)
        assert opened(store, second).number == 2
        write(store, closing(second, FAILED, retrying=True, ended=store.now_unix_ns() - HOUR))
        (again,) = (each for each in due(store, lapsed=True) if each.run.run_id == "r")
        assert again.lapsed, "the first attempt hangs still"
        assert opened(store, replace(exclusive("t3", "e-r"), takes_lapsed=True, expected_attempts=2)).number == 3

    def test_while_the_code_around_a_failed_core_goes_on_nobody_attempts_the_run(self, store: Store) -> None:
        enqueue(store, run_row("r", lane="lane"))
        enqueue(store, run_row("r2", lane="lane"))
        outer = exclusive("t1", "e-r")
        opened(store, outer)
        core = replace(outer, takes_over=True, outer_token="outer", outer_started_unix_ns=1)
        opened(store, core)
        write(store, closing(core, FAILED, retrying=True, ended=store.now_unix_ns() - HOUR))
        for token, execution_id in (("t2", "e-r"), ("t3", "e-r2")):
            (busy,) = write(store, exclusive(token, execution_id))
            assert isinstance(busy, Busy)

    def test_a_run_that_was_to_be_cancelled_is_so_although_its_worker_died(self, store: Store) -> None:
        enqueue(store, run_row())
        attempt = exclusive("t", "e-r")
        opened(store, attempt)
        write(store, RequestCancel("e-r", Cancellation(1, terminate=True)))
        write(store, losing(attempt))
        assert states(store, "e-r") == (CANCELLED, [LOST])

    def test_a_run_has_the_output_of_the_attempt_that_succeeded(self, store: Store) -> None:
        enqueue(store, run_row())
        write(store, Heartbeat(replace(process("hung"), lease_seconds=0.001)))
        first = exclusive("t1", "e-r", process_id="hung")
        opened(store, first)
        until_lapsed(store)
        second = replace(exclusive("t2", "e-r"), takes_lapsed=True)
        opened(store, second)
        close = closing(first)
        close.frozen.outcome.output = '"well"'
        write(store, close)
        write(store, closing(second, FAILED))
        assert (found(store).state, found(store).result) == (SUCCEEDED, '"well"')

    def test_the_close_of_an_exclusive_attempt_needs_no_open(self, store: Store) -> None:
        enqueue(store, run_row())
        opened(store, exclusive("t2", "e-r"))
        (answer,) = write(store, closing(exclusive("t1", "e-r")))
        assert isinstance(answer, Closed)
        assert answer.won

    def test_runs_of_a_lane_wait_for_each_other(self, store: Store) -> None:
        for number in range(3):
            enqueue(store, run_row(f"r{number}", lane="lane", limit=2))
        assert [each.run.run_id for each in due(store)] == ["r0", "r1"]
        opened(store, exclusive("t0", "e-r0"))
        assert [each.run.run_id for each in due(store)] == ["r1"]
        opened(store, exclusive("t1", "e-r1"))
        assert not due(store)
        (busy,) = write(store, exclusive("t2", "e-r2"))
        assert isinstance(busy, Busy)
        write(store, closing(opening("t0", "e-r0")))
        assert opened(store, exclusive("t2", "e-r2")).number == 1

    def test_of_each_lane_as_many_are_due_as_have_room(self, store: Store) -> None:
        for lane, limit in (("one", 1), ("two", 2)):
            for number in range(9):
                enqueue(store, run_row(f"{lane}{number}", lane=lane, limit=limit))
        enqueue(store, run_row("larger", lane="one", limit=3))
        enqueue(store, run_row("free"))

        def some(*but: str) -> list[str]:
            found = store.read(lambda tx: run_queries.due_runs(tx, ("task",), limit=4, lapsed_too=False, but=but))
            return [each.run.run_id for each in found]

        assert some() == ["one0", "two0", "two1", "free"]
        assert some("one0", "two0") == ["one1", "two1", "two2", "free"], "what can't be opened does not stand in the way"
        opened(store, exclusive("t", "e-one0"))
        assert some() == ["two0", "two1", "larger", "free"], "each by its own limit"
        opened(store, exclusive("t", "e-two0"))
        assert some() == ["two1", "larger", "free"]
        opened(store, exclusive("t", "e-two1"))
        assert some() == ["larger", "free"]

    def test_a_run_that_goes_on_takes_one_place_in_its_lane(self, store: Store) -> None:
        for number in range(3):
            enqueue(store, run_row(f"r{number}", lane="lane", limit=2))
        outer = exclusive("t", "e-r0")
        opened(store, outer)
        core = replace(outer, takes_over=True, outer_token="outer", outer_started_unix_ns=1)
        opened(store, core)
        write(store, closing(core, FAILED, retrying=True, ended=store.now_unix_ns() - HOUR))
        assert "r1" in {each.run.run_id for each in due(store)}
        opened(store, exclusive("t", "e-r1"))
        assert "r2" not in {each.run.run_id for each in due(store)}
        (busy,) = write(store, exclusive("t", "e-r2"))
        assert isinstance(busy, Busy)

    def test_thousands_may_wait_in_one_lane(self, store: Store) -> None:
        for start in range(0, 2000, 100):  # in steps, since no commit may take longer than its writers' patience
            rows = [run_row(f"r{number}", lane="lane") for number in range(start, start + 100)]
            write(store, *(EnqueueRun(row, ((execution(f"e-{row.run_id}"), "{}"),)) for row in rows))
        enqueue(store, run_row("free"))

        def looked() -> tuple[list[str], float]:
            begun = time.monotonic()
            return [each.run.run_id for each in due(store)], time.monotonic() - begun

        found, seconds = looked()
        assert found == ["r0", "free"]
        assert seconds < MOST_SECONDS
        opened(store, exclusive("t", "e-r0"))
        found, seconds = looked()
        assert found == ["free"]
        assert seconds < MOST_SECONDS
