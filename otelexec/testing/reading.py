"""Contract: what a store gives back: pages of executions, open work, processes, ingestion, statistics."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from otelexec.store.base import Store
from otelexec.store.rows import FAILED, QUEUED, RUNNING, SUCCEEDED, Cancellation
from otelexec.store.schema import Transaction
from otelexec.store.writes import AddSpans, Heartbeat, Ingested, RecordQueued, RequestCancel
from otelexec.testing.rows import (
    OpenStore,
    beat,
    claim,
    closed,
    closing,
    execution,
    opened,
    opening,
    outer_closing,
    process,
    record,
    span,
    write,
)


class ReadingContract:
    """Reading: complete, in order, in pages."""

    def test_executions_come_newest_first_in_pages_with_their_attempts(self, store: Store) -> None:
        many = 450
        write(store, *(opening(f"t{number}", f"e{number}", started=number + 1) for number in range(many)))
        write(store, opening("again", "e7"))
        found = list(store.executions())
        assert [one.execution_id for one in found] == [f"e{number}" for number in reversed(range(many))]
        assert [len(one.attempts) for one in found if one.execution_id in ("e7", "e8")] == [1, 2]
        page = list(store.executions(limit=3))
        assert [one.execution_id for one in page] == ["e449", "e448", "e447"]
        assert [one.execution_id for one in store.executions(limit=2, before=page[-1].seq)] == ["e446", "e445"]
        assert list(store.executions(limit=0)) == []
        assert len(list(store.executions(limit=201))) == 201

    def test_what_is_read_at_once_is_of_one_moment(self, store: Store, other_store: OpenStore) -> None:
        """Else an execution that ends in between would run, with its only attempt ended."""
        opened(store, opening())
        other = other_store()

        def states(tx: Transaction) -> list[str]:
            [before] = tx.execute("SELECT state FROM execution").fetchone()
            closed(other, closing(opening()))
            return [before, *tx.execute("SELECT state FROM attempt").fetchone()]

        assert store.read(states) == [RUNNING, RUNNING]
        assert record(store).attempts[0].state == SUCCEEDED
        other.close()

    def test_executions_can_be_asked_for_by_state(self, store: Store) -> None:
        for number, state in enumerate((SUCCEEDED, FAILED, SUCCEEDED)):
            row = opening(f"t{number}", f"e{number}")
            opened(store, row)
            closed(store, closing(row, state))
        assert [one.execution_id for one in store.executions(state=SUCCEEDED)] == ["e2", "e0"]
        assert [one.execution_id for one in store.executions(state=FAILED, limit=1)] == ["e1"]
        assert list(store.executions(state=QUEUED)) == []
        assert store.execution("nobody") is None

    def test_executions_can_be_asked_for_by_who_asked_for_them(self, store: Store) -> None:
        fields = ('{"webhook_id": "wh_1", "tenant": "a"}', '{"webhook_id": "WH_1"}', '{"note": "\\"webhook_id\\": \\"wh_1\\""}', "{}")
        for number, correlation in enumerate(fields):
            row = opening(f"t{number}", f"e{number}")
            about = replace(
                row.execution, name=f"job {number % 2}", request_id=f"r{number // 2}", source="webhook", correlation=correlation
            )
            opened(store, replace(row, execution=about))

        def found(**wanted: Any) -> list[str]:
            return [one.execution_id for one in store.executions(**wanted)]

        assert found(name="job 1") == ["e3", "e1"]
        assert found(request_id="r0") == ["e1", "e0"]
        assert found(request_id="r0", name="job 0") == ["e0"]
        assert found(source="webhook", limit=1) == ["e3"]
        assert found(source="schedule") == []
        assert found(fields={"webhook_id": "wh_1"}) == ["e0"]
        assert found(fields={"webhook_id": "wh_1", "tenant": "a"}) == ["e0"]
        assert found(fields={"webhook_id": "wh_1", "tenant": "b"}) == []
        assert found(fields={"webhook_id": "wh_"}) == []

    def test_executions_can_be_asked_for_by_when_something_became_of_them(self, store: Store) -> None:
        for number, ended in enumerate((10, 30, None)):
            row = opening(f"t{number}", f"e{number}", started=5 * number)
            opened(store, row)
            if ended is not None:
                closed(store, closing(row, ended=ended))
        write(store, RecordQueued(execution("e3"), None, "p", 12))
        found = {since: [one.execution_id for one in store.executions(since_unix_ns=since)] for since in (0, 10, 11, 13, 31)}
        assert found == {0: ["e3", "e2", "e1", "e0"], 10: ["e3", "e2", "e1", "e0"], 11: ["e3", "e1"], 13: ["e1"], 31: []}
        assert [one.execution_id for one in store.executions(since_unix_ns=11, state=QUEUED)] == ["e3"]

    def test_executions_are_known_by_their_request_and_their_message(self, store: Store) -> None:
        for number in range(3):
            row = opening(f"t{number}", f"e{number}")
            about = replace(row.execution, request_id=f"r{number % 2}", correlation=f'{{"messaging.message.id": "m{number}"}}')
            opened(store, replace(row, execution=about))
        assert store.executions_of("m1", limit=3) == ["e1"]
        assert store.executions_of("r0", limit=3) == ["e2", "e0"]
        assert store.executions_of("r0", limit=1) == ["e2"]
        assert store.executions_of("nobody", limit=3) == []

    def test_paging_goes_on_while_others_write(self, store: Store) -> None:
        write(store, *(opening(f"t{number}", f"e{number}") for number in range(300)))
        pages = store.executions()
        seen = [next(pages).execution_id]
        write(store, opening("new", "newcomer"))
        seen += [one.execution_id for one in pages]
        assert seen == [f"e{number}" for number in reversed(range(300))]

    def test_open_work_is_attempts_then_outers_then_spans(self, store: Store) -> None:
        write(store, AddSpans(opened=(span("s"),), process_id="p", execution_id="e"))
        opened(store, replace(opening("o", "e1", process_id="p"), started_unix_ns=3))
        core = opening("o", "e1", started=3, outer_token="o", takes_over=True)
        opened(store, core)
        closed(store, closing(core, FAILED, ended=8))
        opened(store, replace(opening("t", "e2", process_id="p"), deadline_unix_ns=50))
        opened(store, opening("x", "e3", process_id="another"))
        work = store.open_work(["p"], limit=10)
        assert [(one.kind, one.execution_id, one.token) for one in work] == [
            ("attempt", "e2", "t"),
            ("outer", "e1", "o"),
            ("span", "e", ""),
        ]
        attempt, outer, loose = work
        assert (attempt.number, attempt.span, attempt.deadline_unix_ns, attempt.started_unix_ns) == (1, span("t"), 50, 1)
        assert attempt.name == record(store, "e2").name
        assert (outer.span, outer.started_unix_ns) == (span("oo"), 3)
        assert loose.span == span("s")
        assert [one.kind for one in store.open_work(["p"], limit=1)] == ["attempt"]
        assert store.open_work(["nobody"], limit=10) == []
        write(store, outer_closing("o", "e1"), AddSpans(recorded=((span("s"), b"s"),)))
        closed(store, closing(opening("t", "e2")))
        assert store.open_work(["p"], limit=10) == []

    def test_an_ended_child_is_a_sign_of_life_of_its_attempt(self, store: Store) -> None:
        opened(store, opening())
        write(store, AddSpans(b"child", 1, execution_id="e", process_id="p", last_end_unix_ns=77))
        write(store, AddSpans(b"older", 1, execution_id="e", process_id="p", last_end_unix_ns=60))
        write(store, AddSpans(b"foreign", 1, execution_id="e", process_id="other", last_end_unix_ns=99))
        assert store.open_work(["p"], limit=10)[0].last_seen_unix_ns == 77

    def test_processes_are_those_with_something_open_and_beat_on_the_stores_clock(self, store: Store) -> None:
        before = store.now_unix_ns()
        beat(store, "idle")
        assert store.processes() == []
        beat(store, "p")
        opened(store, opening())
        (found,) = store.processes()
        assert replace(found, heartbeat_unix_ns=0, clock_unix_ns=0) == process("p")
        assert before <= found.heartbeat_unix_ns <= store.now_unix_ns()
        first = found.heartbeat_unix_ns
        deadline = time.monotonic() + 5
        while store.processes()[0].heartbeat_unix_ns == first:
            beat(store, "p", ended=True)
            assert time.monotonic() < deadline
        assert store.processes()[0].ended
        closed(store, closing(opening()))
        assert store.processes() == []

    def test_a_process_with_open_spans_or_a_claim_counts_as_busy(self, store: Store) -> None:
        write(store, *(Heartbeat(process(name)) for name in ("outer", "span", "claim")))
        opened(store, opening("o", process_id="outer"))
        core = opening("o", outer_token="o", takes_over=True, process_id="outer")
        opened(store, core)
        closed(store, closing(core))
        write(store, AddSpans(opened=(span("s"),), process_id="span"))
        claim(store, "claim")
        assert {found.process_id for found in store.processes()} == {"outer", "span", "claim"}

    def test_how_far_a_spool_segment_is_in_is_remembered(self, store: Store, other_store: OpenStore) -> None:
        assert store.ingested("segment") == 0
        write(store, Ingested("segment", 10), Ingested("other", 5))
        write(store, Ingested("segment", 25))
        assert store.ingested("segment") == 25
        other = other_store()
        assert other.ingested("segment") == 25
        other.close()

    def test_cancellations_are_found_among_many(self, store: Store) -> None:
        write(store, *(RequestCancel(f"e{number}", Cancellation(number + 1, None)) for number in range(0, 1200, 2)))
        found = store.cancellations([f"e{number}" for number in range(1200)])
        assert len(found) == 600
        assert found["e4"] == Cancellation(5, None)
        assert store.cancellations([]) == {}

    def test_statistics_count_what_is_there(self, store: Store) -> None:
        empty = store.statistics()
        assert (dict(empty.executions), empty.outbox_rows, empty.outbox_oldest_unix_ns, list(empty.parked)) == ({}, 0, None, [])
        beat(store, "p")
        beat(store, "gone", ended=True)
        write(store, RecordQueued(execution("q"), None, "p", 1))
        opened(store, opening("t1", "e1"))
        closed(store, closing(opening("t1", "e1"), spans=AddSpans(b"+2", 2, execution_id="e1", process_id="p")))
        opened(store, opening("t2", "e2"))
        write(store, RequestCancel("e2", Cancellation(1, True)), RequestCancel("e1", Cancellation(1, True)))
        claim(store, "relay", max_rows=1)
        found = store.statistics()
        assert dict(found.executions) == {QUEUED: 1, SUCCEEDED: 1, RUNNING: 1}
        assert (found.outbox_rows, found.outbox_spans, found.claimed_rows) == (1, 3, 1)
        assert found.outbox_oldest_unix_ns is not None
        assert found.outbox_oldest_unix_ns <= store.now_unix_ns()
        assert found.processes == 1
        assert list(found.unseen_cancellations) == ["e2"]
        assert found.size_bytes > 0

    def test_what_is_committed_is_there_after_a_reopen(self, store: Store, other_store: OpenStore) -> None:
        row = opening()
        opened(store, row)
        closed(store, closing(row))
        before = record(store)
        store.close()
        again = other_store()
        assert record(again) == before
        again.close()
        assert record(store) == before
