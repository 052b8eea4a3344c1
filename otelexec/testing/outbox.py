"""Contract: the outbox gives each encoded span out once, the oldest first, and loses none."""

from __future__ import annotations

from collections.abc import Sequence

from otelexec.store.base import Store
from otelexec.store.outbox_statements import last_parked
from otelexec.store.upkeep import ClaimOutbox, DiscardParked, ForgetNonces, ReleaseClaims, RetryParked, SettleOutbox
from otelexec.store.writes import AddSpans
from otelexec.testing.rows import (
    OpenStore,
    claim,
    closed,
    closing,
    losing,
    opened,
    opening,
    outbox,
    record,
    span,
    write,
)


def fill(store: Store, *requests: bytes, execution_id: str | None = None) -> None:
    """Put requests of one span each into the outbox."""
    write(store, *(AddSpans(request, 1, execution_id=execution_id, process_id="p") for request in requests))


def deliver_all(store: Store, *, but: bytes = b"") -> None:
    """Have a relay deliver what waits, except for one request."""
    rows = claim(store, "deliverer")
    keep: Sequence[int] = [row.id for row in rows if row.request == but]
    write(store, SettleOutbox("deliverer", delivered=[row.id for row in rows if row.id not in keep], released=keep))


def park_all(store: Store, *, but: bytes = b"") -> None:
    """Have a relay park what waits, except for one request."""
    rows = claim(store, "parker")
    parked = [(row.id, "no") for row in rows if row.request != but]
    write(store, SettleOutbox("parker", parked=parked, released=[row.id for row in rows]))


class OutboxContract:
    """Spans on their way: written once, claimed, settled, parked, released."""

    def test_spans_are_put_in_with_their_count(self, store: Store) -> None:
        write(store, AddSpans(b"three", 3), AddSpans(), AddSpans(b"one", 1))
        assert [(row.request, row.count, row.failures) for row in claim(store)] == [(b"three", 3, 0), (b"one", 1, 0)]

    def test_a_recorded_span_is_written_by_the_first_who_ends_it(self, store: Store) -> None:
        write(store, AddSpans(opened=(span("a"), span("b")), process_id="p", execution_id="e"))
        write(store, AddSpans(opened=(span("a"),), process_id="other", execution_id="e"))
        assert {(work.kind, work.process_id) for work in store.open_work(["p", "other"], limit=10)} == {("span", "p")}
        write(store, AddSpans(recorded=((span("a"), b"a ended"),), execution_id="e"))
        write(store, AddSpans(recorded=((span("a"), b"a again"), (span("b"), b"b ended")), execution_id="e"))
        write(store, AddSpans(recorded=((span("unknown"), b"never opened"),)))
        assert outbox(store) == [b"a ended", b"b ended"]
        assert store.open_work(["p"], limit=10) == []

    def test_a_repeated_write_is_known_by_its_nonce(self, store: Store) -> None:
        spans = AddSpans(b"plain", 1, recorded=((span("a"), b"a ended"),), opened=(span("b"),), process_id="p", nonce="0001")
        write(store, AddSpans(opened=(span("a"),), process_id="p"), spans)
        write(store, AddSpans(recorded=((span("b"), b"b ended"),)))
        write(store, spans, spans)
        assert outbox(store) == [b"plain", b"a ended", b"b ended"]
        assert store.open_work(["p"], limit=10) == []
        write(store, ForgetNonces("0001"), spans)
        assert len(outbox(store)) == 3
        write(store, ForgetNonces("0002"), AddSpans(b"plain", 1, nonce="0001"))
        assert outbox(store) == [b"plain", b"a ended", b"b ended", b"plain"]

    def test_nonces_are_forgotten_in_steps(self, store: Store) -> None:
        write(store, *(AddSpans(b"plain", 1, nonce=f"000{number}") for number in range(1, 6)))
        assert write(store, ForgetNonces("0004", limit=2)) == [2]
        assert write(store, ForgetNonces("0004", limit=2)) == [1]
        assert write(store, ForgetNonces("0004", limit=2)) == [0]
        write(store, AddSpans(b"plain", 1, nonce="0003"), AddSpans(b"plain", 1, nonce="0004"))
        assert len(outbox(store)) == 6

    def test_the_children_of_a_close_that_lost_are_written_once(self, store: Store) -> None:
        row = opening()
        opened(store, row)
        write(store, losing(row))
        close = closing(row, spans=AddSpans(b"child", 1, execution_id="e", process_id="p", nonce="0001"))
        for _ in range(2):
            assert not closed(store, close).won
        assert outbox(store) == [b"lost t", b"child"]

    def test_claims_are_the_oldest_and_nobody_else_gets_them(self, store: Store) -> None:
        fill(store, *(b"%d" % number for number in range(6)))
        first, second = claim(store, "one", max_rows=2), claim(store, "two", max_rows=3)
        assert [row.request for row in first] == [b"0", b"1"]
        assert [row.request for row in second] == [b"2", b"3", b"4"]
        assert [row.request for row in claim(store, "one")] == [b"5"]
        assert claim(store, "two") == []
        assert sorted(store.claim_owners()) == ["one", "two"]

    def test_a_claim_stops_at_its_bytes_but_takes_one_row_at_least(self, store: Store) -> None:
        fill(store, b"x" * 100, b"y" * 40, b"z" * 40, b"w" * 40)
        assert [len(row.request) for row in claim(store, max_bytes=10)] == [100]
        assert [len(row.request) for row in claim(store, max_bytes=80)] == [40, 40]
        assert [len(row.request) for row in claim(store, max_bytes=80)] == [40]

    def test_a_claim_can_end_at_a_row(self, store: Store) -> None:
        fill(store, b"0", b"1", b"2")
        ids = [row.id for row in claim(store)]
        assert ids == sorted(ids)
        write(store, ReleaseClaims(["relay"]))
        (rows,) = write(store, ClaimOutbox("relay", 60.0, not_after=ids[1]))
        assert isinstance(rows, list)
        assert [row.id for row in rows] == ids[:2]

    def test_a_lapsed_claim_is_taken_by_another(self, store: Store) -> None:
        fill(store, b"0")
        assert [row.request for row in claim(store, "dead", lease=-1.0)] == [b"0"]
        assert [row.request for row in claim(store, "alive")] == [b"0"]
        assert claim(store, "late") == []

    def test_claims_of_the_dead_are_released(self, store: Store) -> None:
        fill(store, b"0", b"1", b"2")
        claim(store, "dead", max_rows=2)
        claim(store, "alive", max_rows=1)
        assert write(store, ReleaseClaims(["dead", "unknown"])) == [2]
        assert [row.request for row in claim(store, "next")] == [b"0", b"1"]

    def test_settled_rows_go_or_come_back_as_they_were_told_to(self, store: Store) -> None:
        fill(store, b"delivered", b"released", b"failed", b"parked")
        ids = {row.request: row.id for row in claim(store)}
        settle = SettleOutbox("relay", [ids[b"delivered"]], [ids[b"released"]], [ids[b"failed"]], [(ids[b"parked"], "poisoned: 400")])
        assert write(store, settle) == [None]
        assert [(row.request, row.failures) for row in claim(store)] == [(b"released", 0), (b"failed", 1)]
        (parked,) = store.statistics().parked
        assert (parked.id, parked.count, parked.reason) == (ids[b"parked"], 1, "poisoned: 400")
        assert parked.parked_unix_ns > 0

    def test_a_row_can_keep_what_was_not_delivered_of_it(self, store: Store) -> None:
        fill(store, b"parked+", b"released+", b"failed+")
        rows = claim(store)
        ids = [row.id for row in rows]
        reduced = [(row.id, row.request.rstrip(b"+"), 1) for row in rows]
        write(store, SettleOutbox("relay", released=[ids[1]], failed=[ids[2]], parked=[(ids[0], "no")], reduced=reduced))
        assert [(row.request, row.count, row.failures) for row in claim(store)] == [(b"released", 1, 0), (b"failed", 1, 1)]
        write(store, ReleaseClaims(["relay"]))
        assert write(store, RetryParked()) == [1]
        assert outbox(store) == [b"released", b"failed", b"parked"]

    def test_parked_rows_go_out_again_on_request_only(self, store: Store) -> None:
        fill(store, b"bad", b"good")
        rows = claim(store)
        write(store, SettleOutbox("relay", parked=[(rows[0].id, "no")], released=[rows[1].id]))
        assert outbox(store) == [b"good"]
        assert write(store, RetryParked()) == [1]
        assert write(store, RetryParked()) == [0]
        assert outbox(store) == [b"good", b"bad"]
        assert store.statistics().parked == []

    def test_all_parked_rows_are_counted_and_the_oldest_named(self, store: Store) -> None:
        fill(store, *(b"%d" % number for number in range(120)))
        park_all(store)
        found = store.statistics()
        assert (found.parked_rows, found.parked_spans, len(found.parked)) == (120, 120, 100)

    def test_parked_rows_are_retried_in_steps_and_those_that_are_parked_anew_are_not(self, store: Store) -> None:
        fill(store, *(b"%d" % number for number in range(5)))
        park_all(store)
        upto = store.read(last_parked)
        assert write(store, RetryParked(upto, limit=2)) == [2]
        park_all(store)
        assert [write(store, RetryParked(upto, limit=2)) for _ in range(3)] == [[2], [1], [0]]
        assert outbox(store) == [b"2", b"3", b"4"]
        deliver_all(store)
        assert write(store, RetryParked()) == [2]
        assert store.read(last_parked) is None

    def test_parked_rows_are_discarded_in_steps(self, store: Store) -> None:
        fill(store, *(b"%d" % number for number in range(5)))
        park_all(store)
        upto = store.read(last_parked)
        fill(store, b"new")
        park_all(store)
        assert [write(store, DiscardParked(upto, limit=3)) for _ in range(3)] == [[3], [2], [0]]
        assert (store.statistics().parked_rows, outbox(store)) == (1, [])
        assert write(store, DiscardParked()) == [1]

    def test_an_id_is_never_given_twice(self, store: Store) -> None:
        fill(store, b"0", b"1")
        first = claim(store)
        write(store, SettleOutbox("relay", delivered=[row.id for row in first]))
        fill(store, b"2")
        assert claim(store)[0].id > max(row.id for row in first)

    def test_held_requests_of_an_execution_are_found_until_they_are_delivered(self, store: Store) -> None:
        row = opening()
        opened(store, row)
        fill(store, b"child", execution_id="e")
        park_all(store)
        closed(store, closing(row))
        fill(store, b"somebody else's", execution_id="x")
        assert sorted(store.held_requests(record(store))) == [b"child", b"succeeded t"]
        deliver_all(store)
        assert store.held_requests(record(store)) == [b"child"]

    def test_what_is_in_hand_is_kept_by_another_connection_too(self, store: Store, other_store: OpenStore) -> None:
        fill(store, b"0", b"1")
        other = other_store()
        claim(store, "one", max_rows=1)
        assert [row.request for row in claim(other, "two")] == [b"1"]
        other.close()
