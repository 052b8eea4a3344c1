"""Contract: attempts are opened, taken over and closed once, and the execution's state follows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from otelexec.errors import StoreError, StoreRejected
from otelexec.store.base import Store
from otelexec.store.rows import (
    CANCELLED,
    FAILED,
    LOST,
    PAUSED,
    QUEUED,
    REJECTED,
    RETRYING,
    RUNNING,
    SPOOL,
    SUCCEEDED,
    TIMED_OUT,
    Cancellation,
    Frozen,
    Outcome,
)
from otelexec.store.writes import (
    AddSpans,
    CloseAttempt,
    Closed,
    Heartbeat,
    Ingested,
    OpenAttempt,
    Opened,
    RecordProgress,
    RecordQueued,
    RefuseQueued,
    RequestCancel,
)
from otelexec.testing.rows import (
    closed,
    closing,
    execution,
    frozen,
    losing,
    observing,
    opened,
    opening,
    outbox,
    outer_closing,
    process,
    record,
    span,
    states,
    write,
)

ENDS = (SUCCEEDED, FAILED, TIMED_OUT, CANCELLED, PAUSED, REJECTED, LOST)


def changed(row: OpenAttempt, **fields: Any) -> OpenAttempt:
    """Give the open with other fields."""
    return replace(row, **fields)


class AttemptContract:
    """Write-once attempts, and the state of the execution over them."""

    def test_an_attempt_is_opened_with_everything_it_carries(self, store: Store) -> None:
        write(store, Heartbeat(process()))
        answer = opened(store, changed(opening(started=5), deadline_unix_ns=99))
        assert (answer.number, answer.duplicate, answer.cancellation, answer.snapshot) == (1, False, None, None)
        found = record(store)
        assert (found.state, found.name, found.request_id, found.source, found.correlation) == (
            RUNNING,
            "job",
            "request",
            "direct",
            '{"tenant":"a"}',
        )
        assert (found.started_unix_ns, found.ended_unix_ns) == (5, None)
        (attempt,) = found.attempts
        assert (attempt.attempt, attempt.state, attempt.started_unix_ns, attempt.deadline_unix_ns) == (1, RUNNING, 5, 99)
        assert (attempt.trace_id, attempt.span_id) == (span("t").trace_id, span("t").span_id)
        assert (attempt.host, attempt.pid) == ("host", 42)

    def test_each_end_closes_the_attempt_with_its_span_in_one_commit(self, store: Store) -> None:
        for number, state in enumerate(ENDS):
            row = opening(f"t{number}", f"e{number}")
            opened(store, row)
            answer = closed(store, closing(row, state, ended=20 + number))
            assert (answer.won, answer.state, answer.number, answer.duplicate) == (True, state, 1, False)
            assert answer.finalized_by == "executor"
            assert answer.span_id == span(f"t{number}").span_id
            found = record(store, f"e{number}")
            assert found.state == state
            assert found.ended_unix_ns == (None if state == PAUSED else 20 + number)
            (attempt,) = found.attempts
            assert (attempt.state, attempt.ended_unix_ns) == (state, 20 + number)
            assert attempt.error_type == (None if state == SUCCEEDED else f"why {state}")
        assert outbox(store) == [f"{state} t{number}".encode() for number, state in enumerate(ENDS)]

    def test_a_second_close_loses_and_is_told_who_won(self, store: Store) -> None:
        row = opening()
        opened(store, row)
        closed(store, closing(row, FAILED, ended=10))
        before = record(store)
        for state in ENDS:
            answer = closed(store, closing(row, state, nonce=f"another {state}", ended=11))
            assert (answer.won, answer.state, answer.finalized_by, answer.number) == (False, FAILED, "executor", 1)
        assert record(store) == before
        assert outbox(store) == [b"failed t"]

    def test_the_children_of_a_loser_are_written_all_the_same(self, store: Store) -> None:
        row = opening()
        opened(store, row)
        closed(store, closing(row))
        closed(store, closing(row, FAILED, spans=AddSpans(b"child", 1, execution_id="e", process_id="p")))
        assert outbox(store) == [b"succeeded t", b"child"]

    def test_a_close_repeated_under_its_nonce_is_no_second_close(self, store: Store) -> None:
        row = opening()
        opened(store, row)
        close = closing(row, FAILED, spans=AddSpans(b"+child", 1, execution_id="e", process_id="p"))
        first = closed(store, close)
        assert closed(store, close) == first
        assert outbox(store) == [b"failed t+child"]

    def test_a_close_without_a_row_inserts_the_whole_attempt_closed(self, store: Store) -> None:
        answer = closed(store, closing(opening(started=3), TIMED_OUT, ended=9))
        assert (answer.won, answer.state, answer.number) == (True, TIMED_OUT, 1)
        found = record(store)
        assert (found.state, found.started_unix_ns, found.ended_unix_ns, found.name) == (TIMED_OUT, 3, 9, "job")
        assert found.attempts[0].span_id == span("t").span_id
        assert outbox(store) == [b"timed_out t"]
        repeated = changed(opening(started=3), repeated=True)
        assert opened(store, repeated).number == 1
        assert len(record(store).attempts) == 1

    def test_an_open_that_may_have_got_through_is_looked_for_first(self, store: Store) -> None:
        opened(store, opening())
        assert opened(store, changed(opening(), repeated=True)).number == 1
        assert len(record(store).attempts) == 1
        assert opened(store, changed(opening("new"), repeated=True)).number == 2

    def test_an_unsampled_attempt_has_a_record_and_no_span(self, store: Store) -> None:
        row = changed(opening(), span=None)
        opened(store, row)
        answer = closed(store, CloseAttempt(row, 1, frozen(SUCCEEDED, b""), "n"))
        assert (answer.won, answer.span_id) == (True, None)
        assert record(store).attempts[0].trace_id is None
        assert outbox(store) == []

    def test_attempts_are_numbered_from_one_and_the_newest_leads(self, store: Store) -> None:
        first, second, third = opening("t1", started=1), opening("t2", started=2), opening("t3", started=3)
        opened(store, first)
        closed(store, closing(first, FAILED))
        assert states(store)[0] == FAILED
        assert opened(store, second).number == 2
        assert states(store)[0] == RUNNING
        assert record(store).ended_unix_ns is None
        assert opened(store, third).number == 3
        closed(store, closing(second, TIMED_OUT))
        assert states(store) == (RUNNING, [FAILED, TIMED_OUT, RUNNING])
        closed(store, closing(third, REJECTED, ended=77))
        assert states(store)[0] == REJECTED
        assert (record(store).started_unix_ns, record(store).ended_unix_ns) == (1, 77)

    def test_success_of_any_attempt_wins_and_sticks(self, store: Store) -> None:
        old, new = opening("t1"), opening("t2")
        opened(store, old)
        opened(store, new)
        closed(store, closing(old, SUCCEEDED, ended=5))
        assert states(store) == (SUCCEEDED, [SUCCEEDED, RUNNING])
        closed(store, closing(new, FAILED, ended=6))
        assert states(store) == (SUCCEEDED, [SUCCEEDED, FAILED])
        assert record(store).ended_unix_ns == 5

    def test_an_attempt_after_success_is_a_duplicate_and_changes_nothing(self, store: Store) -> None:
        row, again = opening("t1"), opening("t2")
        opened(store, row)
        closed(store, closing(row, ended=5))
        answer = opened(store, again)
        assert (answer.number, answer.duplicate) == (2, True)
        assert states(store) == (SUCCEEDED, [SUCCEEDED, RUNNING])
        answer_to_close = closed(store, closing(again, FAILED, ended=50))
        assert (answer_to_close.won, answer_to_close.duplicate) == (True, True)
        found = record(store)
        assert (found.state, found.ended_unix_ns) == (SUCCEEDED, 5)
        assert [attempt.duplicate for attempt in found.attempts] == [False, True]
        assert outbox(store) == [b"succeeded t1", b"failed t2"]

    def test_a_cancellation_that_was_asked_for_sticks(self, store: Store) -> None:
        row, later = opening("t1"), opening("t2")
        opened(store, row)
        closed(store, closing(row, CANCELLED, sticky=True, ended=5))
        opened(store, later)
        assert states(store) == (CANCELLED, [CANCELLED, RUNNING])
        closed(store, closing(later, FAILED))
        assert (states(store)[0], record(store).ended_unix_ns) == (CANCELLED, 5)

    def test_an_interruption_is_left_by_the_next_attempt(self, store: Store) -> None:
        row, later = opening("t1"), opening("t2")
        opened(store, row)
        closed(store, closing(row, CANCELLED))
        assert states(store)[0] == CANCELLED
        opened(store, later)
        assert states(store)[0] == RUNNING
        closed(store, closing(later))
        assert states(store)[0] == SUCCEEDED

    def test_a_cancellation_counts_in_the_closing_transaction(self, store: Store) -> None:
        row = opening()
        opened(store, row)
        assert write(store, RequestCancel("e", Cancellation(7, None))) == [RUNNING]
        answer = closed(store, closing(row, SUCCEEDED, if_asked=True))
        assert (answer.won, answer.state) == (True, CANCELLED)
        assert states(store)[0] == CANCELLED
        assert outbox(store) == [b"cancelled t"]
        other = opening("t2", "e2")
        opened(store, other)
        assert closed(store, closing(other, SUCCEEDED, if_asked=True)).state == SUCCEEDED

    def test_to_a_close_from_the_spool_a_cancellation_counts_that_was_asked_for_before_the_end(self, store: Store) -> None:
        for execution_id, asked, state in (("early", 7, CANCELLED), ("late", 11, FAILED)):
            row = opening(f"t {execution_id}", execution_id)
            opened(store, row)
            write(store, RequestCancel(execution_id, Cancellation(asked, None)))
            close = closing(row, FAILED, if_asked=True)
            close.frozen.outcome.finalized_by = SPOOL
            assert closed(store, close).state == record(store, execution_id).state == state

    def test_a_wish_to_cancel_waits_for_the_attempt_and_only_grows_stronger(self, store: Store) -> None:
        assert write(store, RequestCancel("e", Cancellation(7, None))) == [None]
        assert opened(store, opening()).cancellation == Cancellation(7, None)
        for terminate, stands in ((False, False), (None, False), (True, True), (False, True), (None, True)):
            write(store, RequestCancel("e", Cancellation(8, terminate)))
            assert store.cancellations(["e", "nobody"]) == {"e": Cancellation(7, stands)}
        assert record(store).cancellation == Cancellation(7, True)

    def test_a_retry_under_way_shows_and_is_not_an_end(self, store: Store) -> None:
        row = opening()
        opened(store, row)
        closed(store, closing(row, FAILED, retrying=True))
        assert (states(store)[0], record(store).ended_unix_ns) == (RETRYING, None)
        opened(store, opening("t2"))
        assert states(store)[0] == RUNNING

    def test_a_pause_is_left_by_a_resume_that_finds_its_snapshot(self, store: Store) -> None:
        row, resumed, last = opening("t1"), opening("t2"), opening("t3")
        opened(store, row)
        closed(store, closing(row, PAUSED, snapshot='{"block":3}'))
        found = record(store)
        assert (found.state, found.ended_unix_ns, found.snapshot) == (PAUSED, None, '{"block":3}')
        assert opened(store, resumed).snapshot == '{"block":3}'
        assert states(store)[0] == RUNNING
        closed(store, closing(resumed, FAILED))
        assert opened(store, last).snapshot == '{"block":3}'
        closed(store, closing(last))
        assert states(store)[0] == SUCCEEDED
        assert record(store).snapshot is None

    def test_a_dead_attempt_is_closed_once_and_its_own_report_stands_beside(self, store: Store) -> None:
        row = opening()
        opened(store, row)
        assert write(store, losing(row, ended=8)) == [True]
        assert write(store, losing(row, ended=9)) == [False]
        answer = closed(store, closing(row, SUCCEEDED))
        assert (answer.won, answer.state, answer.finalized_by) == (False, LOST, "reconciler")
        assert write(store, observing(row, ended=12)) == [None]
        write(store, observing(row, FAILED))
        found = record(store)
        (attempt,) = found.attempts
        assert (found.state, attempt.state, attempt.ended_unix_ns, attempt.classification) == (LOST, LOST, 8, "killed")
        assert attempt.reconciled_unix_ns == 9
        assert attempt.observed is not None
        assert '"succeeded"' in attempt.observed
        assert outbox(store) == [b"lost t", b"observed t"]

    def test_a_close_that_brings_what_it_observed_records_it_when_it_lost_to_a_reconciler(self, store: Store) -> None:
        row = opening()
        opened(store, row)
        write(store, losing(row))
        close = closing(row, observed=observing(row))
        for _ in range(2):
            answer = closed(store, close)
            assert (answer.won, answer.state) == (False, LOST)
        assert outbox(store) == [b"lost t", b"observed t"]

    def test_a_reconciler_never_closes_what_its_process_closed(self, store: Store) -> None:
        row = opening()
        opened(store, row)
        closed(store, closing(row))
        assert write(store, losing(row)) == [False]
        assert write(store, losing(opening("unknown"))) == [False]
        assert outbox(store) == [b"succeeded t"]

    def test_a_core_takes_the_attempt_over_and_the_outer_end_is_written_once(self, store: Store) -> None:
        outer = opening("o", started=1)
        opened(store, outer)
        core = changed(
            opening("o", started=4, outer_token="o", takes_over=True),
            execution=execution(name="core"),
            span=span("core"),
            outer=span("o"),
            outer_started_unix_ns=1,
        )
        answer = opened(store, core)
        assert (answer.number, answer.duplicate) == (1, False)
        assert record(store).name == "core"
        closed(store, closing(core, FAILED))
        assert states(store) == (FAILED, [FAILED])
        (attempt,) = record(store).attempts
        assert (attempt.span_id, attempt.outer_span_id, attempt.started_unix_ns) == (span("core").span_id, span("o").span_id, 4)
        assert (attempt.outer_started_unix_ns, attempt.outer_outcome) == (1, None)
        assert write(store, outer_closing("o", state=FAILED, retrying=True)) == [True]
        assert write(store, outer_closing("o", state=SUCCEEDED)) == [False]
        found = record(store)
        assert (found.state, found.ended_unix_ns, found.attempts[0].outer_outcome) == (RETRYING, None, FAILED)
        assert outbox(store) == [b"failed o", b"outer failed o"]

    def test_the_end_of_the_outer_code_changes_no_success(self, store: Store) -> None:
        opened(store, opening("o"))
        core = opening("o", outer_token="o", takes_over=True)
        opened(store, core)
        closed(store, closing(core, SUCCEEDED, ended=10))
        assert write(store, outer_closing("o", state=FAILED, retrying=True)) == [True]
        assert (states(store)[0], record(store).ended_unix_ns) == (SUCCEEDED, 10)

    def test_a_takeover_of_a_row_that_is_gone_inserts_it(self, store: Store) -> None:
        core = opening("o", outer_token="o", takes_over=True)
        assert opened(store, core).number == 1
        closed(store, closing(core))
        assert write(store, outer_closing("o")) == [True]
        assert states(store) == (SUCCEEDED, [SUCCEEDED])

    def test_a_takeover_of_a_closed_attempt_leaves_it_as_it_is(self, store: Store) -> None:
        row = opening("o")
        opened(store, row)
        write(store, losing(row))
        before = record(store)
        opened(store, opening("o", started=99, outer_token="o", takes_over=True))
        assert record(store) == before

    def test_queued_is_recorded_first_and_never_overwrites(self, store: Store) -> None:
        write(store, RecordQueued(execution(), span("producer"), "p", 1))
        found = record(store)
        assert (found.state, found.queued_unix_ns, found.started_unix_ns, found.attempts) == (QUEUED, 1, None, ())
        assert (found.producer_trace_id, found.producer_span_id) == (span("producer").trace_id, span("producer").span_id)
        row = opening(started=2)
        assert opened(store, row).number == 1
        for close in (None, closing(row, FAILED), closing(opening("t2"))):
            if close is not None:
                closed(store, close)
            before = record(store)
            write(store, RecordQueued(execution(name="other"), span("again"), "p", 9))
            assert record(store) == before

    def test_a_repeated_queued_record_opens_no_span_that_has_ended(self, store: Store) -> None:
        queued = RecordQueued(execution(), span("producer"), "p", 1)
        again = RecordQueued(execution(), span("producer"), "p", 1, repeated=True)
        write(store, again)
        write(store, AddSpans(recorded=((span("producer"), b"producer"),), execution_id="e"))
        write(store, again)
        assert store.open_work(["p"], limit=10) == []
        write(store, queued)
        assert outbox(store) == [b"producer"]

    def test_a_repeated_open_finds_the_row_and_its_snapshot(self, store: Store) -> None:
        row, resumed = opening("t1"), opening("t2")
        opened(store, row)
        closed(store, closing(row, PAUSED, snapshot='{"block":3}'))
        first = opened(store, resumed)
        assert opened(store, changed(resumed, repeated=True)) == first
        assert states(store) == (RUNNING, [PAUSED, RUNNING])

    def test_repeated_opens_and_their_closes_in_one_commit_are_made_once_and_in_their_order(self, store: Store) -> None:
        """As the spool gives them back."""
        failed, again, other, bare = (changed(opening(token, token[0]), repeated=True) for token in ("a1", "a2", "b", "c"))
        opened(store, opening("b", "b"))  # this one had got through
        whole = (failed, other, closing(failed, FAILED), closing(other), again, failed, closing(again), closing(bare), bare)
        for _ in range(2):
            answers = write(store, *whole)
            assert [answer.number for answer in answers if isinstance(answer, Opened | Closed)] == [1, 1, 1, 1, 2, 1, 2, 1, 1]
            assert states(store, "a") == (SUCCEEDED, [FAILED, SUCCEEDED])
            assert states(store, "b") == (SUCCEEDED, [SUCCEEDED])
            assert states(store, "c") == (SUCCEEDED, [SUCCEEDED])
            assert sorted(outbox(store)) == [b"failed a1", b"succeeded a2", b"succeeded b", b"succeeded c"]

    def test_an_open_and_its_close_that_come_again_end_no_span_twice(self, store: Store) -> None:
        row = changed(opening(), repeated=True)
        # A child has ended below a span that was still open at the end of the attempt; then that one's end.
        close = closing(row, spans=AddSpans(b"child", 1, opened=(span("above"),), process_id="p", execution_id="e", nonce="n"))
        ended = AddSpans(recorded=((span("above"), b"above"),), process_id="p")
        for _ in range(2):
            write(store, row, close, ended, Ingested("segment", 1))
            assert sorted(outbox(store)) == [b"above", b"succeeded tchild"]
            assert store.open_work(["p"], limit=10) == []

    def test_a_repeated_open_is_known_by_a_token_that_not_every_store_can_hold(self, store: Store) -> None:
        row = changed(opening("t\0x"), repeated=True)
        for _ in range(2):
            write(store, row, Ingested("segment", 1))
        assert states(store) == (RUNNING, [RUNNING])

    def test_a_refused_message_is_rejected_unless_it_got_further(self, store: Store) -> None:
        outcome = Outcome(REJECTED, 5, "publisher", error_type="full", error_message="queue is full")
        write(store, RecordQueued(execution(), span("producer"), "p", 1))
        sent = AddSpans(recorded=((span("producer"), b"producer"),), execution_id="e", process_id="p")
        assert write(store, RefuseQueued("e", outcome, sent)) == [None]
        found = record(store)
        assert (found.state, found.ended_unix_ns, found.error_type, found.error_message) == (REJECTED, 5, "full", "queue is full")
        assert outbox(store) == [b"producer"]
        write(store, RecordQueued(execution("e2"), None, "p", 1))
        opened(store, opening("t2", "e2"))
        write(store, RefuseQueued("e2", outcome))
        assert states(store, "e2")[0] == RUNNING

    def test_an_attempt_after_a_refusal_leaves_nothing_of_it(self, store: Store) -> None:
        write(store, RecordQueued(execution(), None, "p", 1))
        write(store, RefuseQueued("e", Outcome(REJECTED, 5, "publisher", error_type="full", error_message="queue is full")))
        opened(store, opening())
        found = record(store)
        assert (found.state, found.ended_unix_ns, found.error_type, found.error_message) == (RUNNING, None, None, None)

    def test_a_cancellation_that_was_asked_for_is_not_retried(self, store: Store) -> None:
        row = opening()
        opened(store, row)
        closed(store, closing(row, CANCELLED, sticky=True, retrying=True, ended=5))
        assert (states(store)[0], record(store).ended_unix_ns) == (CANCELLED, 5)

    def test_progress_stands_on_a_running_attempt_only(self, store: Store) -> None:
        row = opening()
        opened(store, row)
        write(store, RecordProgress("e", "t", '{"message":"half"}'))
        assert record(store).attempts[0].progress == '{"message":"half"}'
        (work,) = store.open_work(["p"], limit=10)
        assert work.progress == '{"message":"half"}'
        assert work.last_seen_unix_ns > 0
        closed(store, closing(row))
        write(store, RecordProgress("e", "t", '{"message":"late"}'))
        assert record(store).attempts[0].progress == '{"message":"half"}'

    def test_a_write_that_the_store_can_not_hold_does_not_take_the_others_with_it(self, store: Store) -> None:
        bad = changed(opening("t2", "bad"), started_unix_ns=2**70)
        results = write(store, opening("t1", "e1"), bad, opening("t3", "e3"), closing(opening("t1", "e1")))
        assert isinstance(results[1], StoreRejected)
        assert results[1].reason
        assert results[1].reason in str(results[1])
        assert store.url not in results[1].reason
        assert not any(isinstance(result, StoreError) for result in (results[0], *results[2:]))
        assert (states(store, "e1")[0], states(store, "e3")[0]) == (SUCCEEDED, RUNNING)
        assert store.execution("bad") is None

    def test_text_comes_back_as_it_went_in(self, store: Store) -> None:
        text = "\u00e9\u4f60\U0001f600 'quoted' \\ \"\n\t%s {x} ?"
        row = changed(opening(), execution=execution("e", text, parent=text))
        opened(store, row)
        closed(store, CloseAttempt(row, 1, Frozen(Outcome(FAILED, 3, error_message=text, output=text), b""), "n"))
        found = record(store)
        assert (found.name, found.parent_execution_id, found.attempts[0].error_message, found.attempts[0].output) == (text,) * 4
