"""Contract: how runs are asked for, found and changed in the queue of the store."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from otelexec.store import run_queries
from otelexec.store.base import Store
from otelexec.store.rows import CANCELLED, FAILED, SUCCEEDED, Cancellation, Outcome
from otelexec.store.runs import (
    AddTags,
    CreateBatch,
    Enqueued,
    ForgetRuns,
    HoldKey,
    PutPacket,
    RescheduleRun,
    ResetKey,
    RunKey,
    SetRunMetadata,
    SetRunOutput,
)
from otelexec.store.writes import RefuseQueued, RequestCancel
from otelexec.testing.rows import OpenStore, closing, opened, opening, pruned, record, write
from otelexec.testing.runs import HOUR, due, enqueue, exclusive, found, run_row
from otelexec.testing.sharing import at_once


class QueueContract:
    """Runs in the queue."""

    def test_a_key_asks_for_one_run_until_that_has_failed(self, store: Store) -> None:
        key = (RunKey("key/task/k", HOUR),)
        enqueue(store, run_row("r1"), keys=key)
        assert enqueue(store, run_row("r2"), keys=key) == Enqueued("r1", "e-r1", cached=True, created=False)
        held = store.read(lambda tx: run_queries.find_key(tx, "key/task/k"))
        assert held is not None
        assert held.run_id == "r1"
        attempt = exclusive("t", "e-r1")
        opened(store, attempt)
        write(store, closing(attempt, FAILED))
        assert store.read(lambda tx: run_queries.find_key(tx, "key/task/k")) is None
        assert enqueue(store, run_row("r3"), keys=key).created
        assert write(store, ResetKey("key/task/k"), ResetKey("key/task/k")) == [True, False]
        assert enqueue(store, run_row("r4"), keys=key).created

    def test_a_call_that_is_repeated_gets_the_same_answer(self, store: Store) -> None:
        keys = (RunKey("request/1", HOUR, exact=True), RunKey("key/task/k", HOUR))
        enqueue(store, run_row("r1"), keys=keys)
        attempt = exclusive("t", "e-r1")
        opened(store, attempt)
        write(store, closing(attempt, FAILED))
        assert enqueue(store, run_row("r2"), keys=keys) == Enqueued("r1", "e-r1", cached=False, created=False)

    def test_a_key_lapses(self, store: Store) -> None:
        key = (RunKey("key/task/k", -1),)
        assert enqueue(store, run_row("r1"), keys=key).created
        assert enqueue(store, run_row("r2"), keys=key).created
        assert write(store, HoldKey("proof", "a", HOUR), HoldKey("proof", "b", HOUR)) == ["a", "a"]

    def test_one_key_asked_for_by_many_at_once_has_one_run(self, store: Store, other_store: OpenStore) -> None:
        stores = [store, other_store()]
        key = (RunKey("key/task/k", HOUR),)
        answers: list[Enqueued] = []

        def ask(number: int) -> None:
            answers.append(enqueue(stores[number % 2], run_row(f"r{number}"), keys=key))

        at_once(*(partial(ask, number) for number in range(8)))
        assert len({answer.run_id for answer in answers}) == 1
        assert sum(answer.created for answer in answers) == 1

    def test_an_execution_that_has_a_run_or_an_attempt_gets_no_other_run(self, store: Store) -> None:
        assert enqueue(store, run_row("r1"), "e").execution_id == "e"
        assert enqueue(store, run_row("r2"), "e").execution_id == "spare-r2"
        opened(store, opening("t", "worked"))
        assert enqueue(store, run_row("r3"), "worked").execution_id == "spare-r3"

    def test_a_batch_has_each_of_its_runs_once(self, store: Store) -> None:
        key = (RunKey("batch/b", HOUR),)
        assert write(store, CreateBatch("b1", 2, "{}", key)) == [("b1", False)]
        assert write(store, CreateBatch("b2", 2, "{}", key)) == [("b1", True)]
        row = replace(run_row("r1"), batch_id="b1", batch_index=0)
        assert enqueue(store, row).created
        assert enqueue(store, replace(row, run_id="r2")) == Enqueued("r1", "e-r1", cached=False, created=False)
        enqueue(store, replace(row, run_id="r3", batch_index=1))
        batch = store.read(lambda tx: run_queries.find_batch(tx, "b1"))
        assert batch is not None
        assert (batch.run_count, batch.runs) == (2, ("r1", "r3"))
        runs = store.read(lambda tx: run_queries.list_runs(tx, limit=10, batch_id="b1"))
        assert [run.run_id for run in runs] == ["r3", "r1"]
        assert store.read(lambda tx: run_queries.find_batch(tx, "none")) is None

    def test_the_key_of_a_batch_that_was_pruned_is_the_next_ones(self, store: Store) -> None:
        keys = (RunKey("request", HOUR, exact=True), RunKey("batch/b", HOUR))
        assert write(store, CreateBatch("b1", 1, "{}", keys)) == [("b1", False)]
        pruned(store, store.now_unix_ns() + 1)
        assert write(store, CreateBatch("b2", 1, "{}", keys), CreateBatch("b3", 1, "{}", keys[1:])) == [("b2", False), ("b2", True)]
        assert store.read(lambda tx: run_queries.find_batch(tx, "b2")) is not None

    def test_an_item_of_a_batch_whose_key_has_a_run_is_that_run(self, store: Store) -> None:
        key = (RunKey("key/task/k", HOUR),)
        enqueue(store, run_row("known"), keys=key)
        write(store, CreateBatch("b1", 2, "{}"))
        enqueue(store, replace(run_row("r1"), batch_id="b1", batch_index=1))
        for _ in range(2):
            item = replace(run_row("r2"), batch_id="b1", batch_index=0)
            assert enqueue(store, item, keys=key).run_id == "known"
        batch = store.read(lambda tx: run_queries.find_batch(tx, "b1"))
        assert batch is not None
        assert batch.runs == ("known", "r1")

    def test_what_can_be_changed_of_a_run(self, store: Store) -> None:
        enqueue(store, replace(run_row(delay=HOUR), ttl_ns=10))
        assert not due(store)
        assert write(store, RescheduleRun("r"), RescheduleRun("r", HOUR), RescheduleRun("none")) == [True, False, None]
        assert (found(store).expires_unix_ns or 0) - found(store).due_unix_ns == 10
        assert write(store, AddTags("r", ("a", "b"), 2), AddTags("r", ("b", "c"), 2), AddTags("none", (), 2)) == [True, False, None]
        assert found(store).tags == '["a", "b"]'
        changes = [SetRunMetadata("r", "1", None), SetRunMetadata("r", "2", None), SetRunMetadata("none", "1", None)]
        assert write(store, *changes) == [True, False, None]
        write(store, SetRunOutput("e-r", "42"), PutPacket("name", "content", "text/plain"))
        assert (found(store).metadata, found(store).result) == ("1", "42")
        assert store.read(lambda tx: run_queries.find_packet(tx, "name")) == ("content", "text/plain")

    def test_runs_that_will_not_be_run_are_found(self, store: Store) -> None:
        enqueue(store, replace(run_row("expired", lane="lane"), ttl_ns=-1))
        assert not due(store), "its time to live is over"
        enqueue(store, run_row("cancelled", lane="lane", delay=HOUR))
        enqueue(store, run_row("running", lane="lane"))
        write(store, RequestCancel("e-cancelled", Cancellation(1, terminate=True)))
        opened(store, exclusive("t", "e-running"))
        hopeless = store.read(lambda tx: run_queries.hopeless_runs(tx, limit=10))
        assert {run.run_id for run in hopeless} == {"expired", "cancelled"}
        # An attempt that only closes it takes no place in its lane.
        assert opened(store, exclusive("t2", "e-expired")).number == 1
        assert opened(store, exclusive("t3", "e-cancelled")).cancellation is not None

    def test_ended_runs_leave_the_queue_and_are_pruned_with_their_records(self, store: Store) -> None:
        enqueue(store, run_row("r1"))
        enqueue(store, run_row("r2"))
        attempt = exclusive("t", "e-r1")
        opened(store, attempt)
        write(store, replace(closing(attempt), frozen=replace(closing(attempt).frozen, request=b"")))
        assert store.read(lambda tx: run_queries.ended_runs(tx, limit=10)) == ["e-r1"]
        write(store, ForgetRuns(("e-r1",)))
        assert not store.read(lambda tx: run_queries.ended_runs(tx, limit=10))
        pruned(store, store.now_unix_ns() + 1)
        assert store.read(lambda tx: run_queries.find_run(tx, "r1")) is None
        assert found(store, "r2").state == "queued"

    def test_a_queued_execution_whose_message_was_taken_back_is_cancelled_for_good(self, store: Store) -> None:
        enqueue(store, run_row())
        back = RefuseQueued("e-r", Outcome(CANCELLED, 5, "publisher", sticky=True))
        write(store, back)
        assert record(store, "e-r").state == CANCELLED
        attempt = opening("t", "e-r")
        opened(store, attempt)
        write(store, closing(attempt, FAILED))
        assert record(store, "e-r").state == CANCELLED
        other = opening("t", "begun")
        opened(store, other)
        write(store, replace(back, execution_id="begun"), closing(other))
        assert record(store, "begun").state == SUCCEEDED

    def test_lists_go_both_ways(self, store: Store) -> None:
        for number in range(5):
            enqueue(store, run_row(f"r{number}", task=f"task{number % 2}"))
        newest = store.read(lambda tx: run_queries.list_runs(tx, limit=2))
        assert [run.run_id for run in newest] == ["r4", "r3"]
        assert [(run.payload, found(store, run.run_id).payload) for run in newest] == [(None, "1")] * 2, "a list may be long"
        older = store.read(lambda tx: run_queries.list_runs(tx, limit=2, before=newest[-1].seq))
        assert [run.run_id for run in older] == ["r2", "r1"]
        newer = store.read(lambda tx: run_queries.list_runs(tx, limit=2, after=older[-1].seq))
        assert [run.run_id for run in newer] == ["r3", "r2"]
        assert len(store.read(lambda tx: run_queries.list_runs(tx, limit=9, tasks=("task0",)))) == 3

    def test_a_task_may_have_any_name(self, store: Store) -> None:
        enqueue(store, run_row("r", task="a\0b"))
        listed = store.read(lambda tx: run_queries.list_runs(tx, limit=9, tasks=("none\0", "a\0b")))
        assert [run.run_id for run in listed] == ["r"]
        assert [each.run.run_id for each in due(store, "none\0", "a\0b")] == ["r"]
