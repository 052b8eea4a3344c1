"""The relay against a real receiver: what is delivered, kept, parked and never sent twice."""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext
from requests.adapters import HTTPAdapter

from otelexec import otlp, relay
from otelexec.decoded import decode
from otelexec.delivery import SUSPECT
from otelexec.errors import SettingsError, StoreRejected, StoreUnavailable
from otelexec.receiver import Answer, OtlpReceiver
from otelexec.relay import Relay
from otelexec.settings import Settings
from otelexec.store.sqlite import SqliteStore
from otelexec.store.upkeep import ClaimOutbox, OutboxRow, ReleaseClaims, RetryParked, SettleOutbox
from otelexec.store.writes import AddSpans
from otelexec.transport import Reply, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from otelexec.store.writes import Write

RESOURCE = otlp.encode_resource(Resource({"service.name": "tests"}))
PROTOCOLS = ["http", "grpc"]


class Outbox:
    """An outbox in memory that claims and settles as the stores do, and can be made unusable."""

    def __init__(self) -> None:
        self.rows: dict[int, OutboxRow] = {}
        self.claims: dict[int, tuple[str, float]] = {}
        self.parked: dict[int, str] = {}
        self.kept: dict[int, OutboxRow] = {}
        self.settled: list[SettleOutbox] = []
        self.fault: Callable[[Write], Exception | None] = lambda _: None
        self._lock = threading.Lock()

    def add(self, *names: str, count: int = 1, size: int = 0) -> None:
        for name in names:
            number = len(self.rows) + len(self.parked) + len(self.settled) + 1
            while number in self.rows or number in self.parked:
                number += 1
            spans = [span_bytes(name, size) for _ in range(count)]
            self.rows[number] = OutboxRow(number, otlp.wrap(RESOURCE, {b"\x0a\x00": spans}), count)

    def commit(self, writes: Sequence[Write]) -> list[Any]:
        with self._lock:
            return [self._apply(write) for write in writes]

    def _apply(self, write: Write) -> Any:
        if (error := self.fault(write)) is not None:
            raise error
        if isinstance(write, ClaimOutbox):
            return self._claim(write)
        if isinstance(write, ReleaseClaims):
            held = [row_id for row_id, (owner, _) in self.claims.items() if owner in write.owners]
            for row_id in held:
                del self.claims[row_id]
            return len(held)
        assert isinstance(write, SettleOutbox)
        self.settled.append(write)
        self.rows |= {row_id: OutboxRow(row_id, request, count, self.rows[row_id].failures) for row_id, request, count in write.reduced}
        for row_id in write.delivered:
            del self.rows[row_id]
        for row_id in write.failed:
            row = self.rows[row_id]
            self.rows[row_id] = OutboxRow(row.id, row.request, row.count, row.failures + 1)
        for row_id, reason in write.parked:
            self.kept[row_id] = self.rows.pop(row_id)
            self.parked[row_id] = reason
        for row_id in (*write.delivered, *write.released, *write.failed, *(row_id for row_id, _ in write.parked)):
            if self.claims.get(row_id, ("", 0))[0] == write.owner:
                del self.claims[row_id]
        return None

    def _claim(self, write: ClaimOutbox) -> list[OutboxRow]:
        now, size = time.monotonic(), 0
        claimed: list[OutboxRow] = []
        for row in sorted(self.rows.values(), key=lambda row: row.id):
            if self.claims.get(row.id, ("", 0.0))[1] > now:
                continue
            size += len(row.request)
            if len(claimed) == write.max_rows or (claimed and size > write.max_bytes):
                break
            claimed.append(row)
            self.claims[row.id] = (write.owner, now + write.lease_seconds)
        return claimed


_spans_made = iter(range(1, 1_000_000))


def span_bytes(name: str, size: int = 0) -> bytes:
    number = next(_spans_made)
    attributes = {"filler": "x" * size} if size else {}
    context = SpanContext(number, number, is_remote=False)
    return otlp.encode_span(ReadableSpan(name, context=context, attributes=attributes, start_time=1, end_time=2))


@pytest.fixture
def outbox() -> Outbox:
    return Outbox()


@pytest.fixture(params=PROTOCOLS)
def receiver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[OtlpReceiver]:
    with OtlpReceiver(request.param) as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc" if request.param == "grpc" else "http/protobuf")
        yield receiver


@pytest.fixture
def http(monkeypatch: pytest.MonkeyPatch) -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        yield receiver


@pytest.fixture
def make(outbox: Outbox) -> Iterator[Callable[..., Relay]]:
    """Make relays of this outbox, and end them."""
    made: list[Relay] = []

    def one(owner: str = "p-1", **options: Any) -> Relay:
        settings = Settings(store="none", relay_interval_seconds=0.02)
        made.append(Relay(outbox.commit, settings, owner, waiting=lambda: len(outbox.rows), **options))
        return made[-1]

    yield one
    for each in made:
        each.stop(0)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let backoff cost no time; how long it would be is tested on its own."""
    monkeypatch.setattr(relay, "_FIRST_PAUSE", 0.0)


def names(receiver: OtlpReceiver) -> list[str]:
    return [span.name for span in receiver.spans]


def sent_once(receiver: OtlpReceiver) -> bool:
    return all(len(copies) == 1 for copies in receiver.deliveries.values())


def test_rows_are_delivered_in_order_as_they_are_and_deleted(outbox: Outbox, receiver: OtlpReceiver, make: Callable[..., Relay]) -> None:
    """One request is the concatenation of the rows' bytes, oldest first, and what was accepted is gone."""
    outbox.add("a", "b", "c", count=2)
    bodies = [row.request for row in outbox.rows.values()]
    progress = make().run_once()
    assert names(receiver) == ["a", "a", "b", "b", "c", "c"]
    assert receiver.requests[0].body == b"".join(bodies)
    assert (progress.spans, progress.rows, progress.pause) == (6, 3, None)
    assert not outbox.rows
    assert not outbox.claims


def test_a_request_has_at_most_512_rows_and_4_mebibytes(outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay]) -> None:
    """A backlog goes out in portions that any receiver takes, and a row too large for one goes alone."""
    outbox.add(*["small"] * 600)
    outbox.add(*["large"] * 5, size=1_500_000)
    outbox.add("huge", size=5_000_000)
    assert make().drain(30)
    assert all(len(request.body) <= 4 * 1024 * 1024 or len(request.spans) == 1 for request in http.requests)
    assert max(len(request.spans) for request in http.requests) == 512
    assert len(http.spans) == 606
    assert sent_once(http)


def test_nothing_to_send_costs_no_request(outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay]) -> None:
    """An empty outbox is drained at once."""
    assert make().run_once() == relay.Progress()
    assert make().drain(5)
    assert http.requests == []
    assert outbox.settled == []


def test_an_endpoint_that_is_down_keeps_the_rows_unblamed(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Relay], no_pauses: None
) -> None:
    """Nobody listening says nothing about the rows: no failure is counted, the claim is given back, then all arrives."""
    receiver = OtlpReceiver()
    with receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    outbox.add("a", "b")
    sender = make()
    for _ in range(5):
        assert sender.run_once().pause is not None
        assert not outbox.claims
    assert [row.failures for row in outbox.rows.values()] == [0, 0]
    with receiver:
        assert sender.drain(10)
    assert names(receiver) == ["a", "b"]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_transient_refusal_is_tried_again_within_seconds(
    status: int, outbox: Outbox, receiver: OtlpReceiver, make: Callable[..., Relay]
) -> None:
    """The drain goes on until the endpoint takes the rows, and each arrives once."""
    outbox.add("a", "b")
    receiver.script(Answer(status), Answer(status))
    assert make().drain(10)
    assert names(receiver) == ["a", "b"]
    assert sent_once(receiver)
    assert not outbox.parked


def test_the_backoff_grows_with_full_jitter_and_ends_with_a_success(
    outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each refusal doubles the longest pause up to 8 s; the pause itself lies anywhere below it."""
    longest: list[float] = []

    class Jitter:
        def uniform(self, low: float, high: float) -> float:
            longest.append(high)
            return low

    monkeypatch.setattr(relay, "_jitter", Jitter())
    outbox.add("a")
    sender = make()
    http.script(*[Answer(503)] * 7, Answer(), Answer(503))
    for _ in range(8):
        sender.run_once()
    outbox.add("b")
    sender.run_once()
    assert longest == [0.5, 1, 2, 4, 8, 8, 8, 0.5]


def test_jitter_neither_uses_nor_disturbs_the_random_module(outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay]) -> None:
    """`random.seed(0)` in the user's function stays the user's."""
    outbox.add("a")
    sender = make()
    http.script(Answer(503), Answer(503))
    pauses = []
    for _ in range(2):
        random.seed(0)
        before = random.getstate()
        pauses.append(sender.run_once().pause)
        assert random.getstate() == before
    assert pauses[0] != pauses[1]


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_in_seconds_is_the_pause(status: int, outbox: Outbox, receiver: OtlpReceiver, make: Callable[..., Relay]) -> None:
    """What the endpoint asks for is waited for, over HTTP and as gRPC's RetryInfo, and blames no row."""
    outbox.add("a")
    receiver.script(Answer(status, "slow down", retry_after="7"))
    progress = make().run_once()
    assert (progress.pause, progress.asked) == (7, True)
    assert "slow down" in progress.reason
    assert outbox.rows[1].failures == 0


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        ("in 600 s", 500, 600),
        ("Fri, 01 Jan 2021 00:00:00 GMT", 0, 0.5),
        ("0", 0, 0.5),
        ("999999999999", 3_600, 3_600),
        ("soon", 0, 0.5),
        ("-5", 0, 0.5),
        ("Fri, 99 Jan 2021", 0, 0.5),
    ],
)
def test_retry_after_may_be_a_date_or_nonsense(  # noqa: PLR0917
    header: str, low: float, high: float, outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay]
) -> None:
    """An HTTP date counts from now, a mistake of years is cut, and the past, nothing and nonsense are ordinary backoff."""
    if header == "in 600 s":  # from now, not from when the tests were collected
        header = format_datetime(datetime.now(UTC) + timedelta(seconds=600), usegmt=True)
    outbox.add("a")
    http.script(Answer(429, retry_after=header))
    pause = make().run_once().pause
    assert pause is not None
    assert low <= pause <= high


def test_an_endpoint_that_asks_for_no_pause_is_not_asked_without_one(
    outbox: Outbox, receiver: OtlpReceiver, make: Callable[..., Relay]
) -> None:
    """A 503 with `Retry-After: 0` for an hour would be five hundred requests a second in the user's worker."""
    outbox.add("a")
    receiver.script(*[Answer(503, retry_after="0")] * 40)
    relay = make()
    pauses = [relay.run_once().pause or 0.0 for _ in range(40)]
    assert sum(pauses[5:]) > 35  # half of 8 s each, were they all as long as they may be


@pytest.mark.parametrize("poisoned", [["p3"], ["p0", "p9"], ["p4", "p5", "p6"]])
def test_a_poisoned_row_is_parked_and_the_rest_delivered(
    poisoned: list[str], outbox: Outbox, receiver: OtlpReceiver, make: Callable[..., Relay]
) -> None:
    """A 400 bisects the request until each culprit is alone; nobody else is parked or sent twice."""
    outbox.add(*[f"p{number}" for number in range(10)])
    ids = {f"p{number}": number + 1 for number in range(10)}
    receiver.poison = lambda span: span.name in poisoned
    assert make().drain(10)
    assert set(outbox.parked) == {ids[name] for name in poisoned}
    assert all("a span in this request is not acceptable" in reason for reason in outbox.parked.values())
    assert sorted(names(receiver)) == sorted(set(ids) - set(poisoned))
    assert sent_once(receiver)


def test_one_span_that_is_refused_keeps_none_of_its_row_back(outbox: Outbox, receiver: OtlpReceiver, make: Callable[..., Relay]) -> None:
    """An execution's span is in one row with its children: what is wrong with one of them is not its fault."""
    spans = [span_bytes(f"c{number}") for number in range(6)]
    children = otlp.wrap(RESOURCE, {b"\x0a\x03\x0a\x01s": spans[:2], b"\x0a\x00": spans[2:5]})
    outbox.rows[1] = OutboxRow(1, children + otlp.wrap(RESOURCE, {b"\x0a\x00": spans[5:]}), 6)
    receiver.poison = lambda span: span.name == "c3"
    assert make().drain(10)
    assert outbox.parked[1].startswith("1 of 6 spans refused: ")
    assert (outbox.kept[1].count, [span.encoded for span in decode(outbox.kept[1].request)]) == (1, [spans[3]])
    assert {span.encoded for span in receiver.spans} == {*spans} - {spans[3]}
    assert {span.name: span.scope for span in receiver.spans} == {"c0": "s", "c1": "s", "c2": "", "c4": "", "c5": ""}
    assert {span.resource["service.name"] for span in receiver.spans} == {"tests"}
    assert sent_once(receiver)


def test_a_row_that_nobody_can_read_is_parked_as_it_is(outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay]) -> None:
    outbox.rows[1] = OutboxRow(1, b"\x0a", 2)
    assert make().drain(10)
    assert outbox.parked[1].startswith("HTTP 400")
    assert outbox.kept[1].request == b"\x0a"


def test_a_row_of_which_nothing_is_taken_does_not_block_the_others(outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay]) -> None:
    """Each of its 400 spans by itself would take longer than a claim holds, and the next claim would begin with the first one again."""
    outbox.add("poison", count=400)
    outbox.add("good")
    http.poison = lambda span: span.name == "poison"
    assert make().drain(10)
    assert outbox.parked[1].startswith("400 of 400 spans refused: ")
    assert (names(http), len(http.requests) < 100) == (["good"], True)


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("failures", [0, SUSPECT])
@pytest.mark.parametrize("trouble", [None, Answer(429), Answer(500)])
def test_a_row_that_is_too_large_goes_in_parts(
    failures: int, trouble: Answer | None, outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay]
) -> None:
    """A gRPC receiver takes 4 MiB, and a proxy perhaps 1 MB. What was accepted is not sent again because the rest has to wait."""
    outbox.add("a", count=20)
    outbox.rows[1] = replace(outbox.rows[1], failures=failures)  # as after an outage
    outbox.add("b")
    answers = iter([None, None, trouble])
    http.answer = lambda spans: Answer(413, "too large") if len(spans) > 3 else next(answers, None)
    assert make().drain(20)
    assert not outbox.parked
    assert sorted(names(http)) == ["a"] * 20 + ["b"]
    assert sent_once(http)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(400, "bad trace id"), "HTTP 400: bad trace id"),
        (Answer(400, "<p>no</p>\n" + "x" * 1_000, text=True), "HTTP 400: <p>no</p> " + "x" * 490),
        (Answer(413), "HTTP 413"),
    ],
)
def test_a_parked_row_keeps_status_and_text_of_the_answer(
    answer: Answer, reason: str, outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay]
) -> None:
    """The reason is what the endpoint said, as a google.rpc.Status or as text, in one line of bounded length."""
    outbox.add("a")
    http.script(answer)
    make().run_once()
    assert outbox.parked == {1: reason}


@pytest.mark.parametrize("answer", [Answer(500, "crash"), Answer(503), Answer(refused=True), Answer(lost=True)])
def test_a_row_that_breaks_the_endpoint_is_found_among_the_others(
    answer: Answer, outbox: Outbox, receiver: OtlpReceiver, make: Callable[..., Relay], no_pauses: None
) -> None:
    """Failing three times while others get through, it is isolated and parked, and the others are delivered."""
    outbox.add(*[f"s{number}" for number in range(20)], "bad", *[f"t{number}" for number in range(20)])
    receiver.answer = lambda spans: answer if any(span.name == "bad" for span in spans) else None
    assert make().drain(20)
    assert len(outbox.parked) == 1
    good = [span for span in receiver.spans if span.name != "bad"]
    if not answer.lost:
        assert sorted(span.name for span in good) == sorted([f"{kind}{number}" for kind in "st" for number in range(20)])
        assert sent_once(receiver)


@pytest.mark.parametrize("count", [2, 3, 7, 600])
def test_several_rows_that_break_the_endpoint_never_block_the_rest(
    count: int, outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay], no_pauses: None
) -> None:
    """Two culprits in two halves of a request are found as well, however many rows there are."""
    outbox.add("bad", *[f"good{number}" for number in range(count)], "bad")
    http.answer = lambda spans: Answer(500) if any(span.name == "bad" for span in spans) else None
    assert make().drain(30)
    assert len(outbox.parked) == 2
    assert len(http.spans) == count
    assert sent_once(http)


def test_new_rows_go_past_suspects(outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay], no_pauses: None) -> None:
    """A row that nobody else got past stays, unparked, until others get through; they are not held up by it."""
    outbox.add("bad")
    http.answer = lambda spans: Answer(500) if any(span.name == "bad" for span in spans) else None
    sender = make()
    for _ in range(8):
        sender.run_once()
    assert not outbox.parked, "the endpoint may just as well be broken"
    outbox.add("good")
    sender.run_once()
    assert names(http) == ["good"]
    for _ in range(2):
        sender.run_once()
    assert outbox.parked == {1: "HTTP 500"}


def test_an_outage_parks_nothing_however_long_it_lasts(
    outbox: Outbox, receiver: OtlpReceiver, make: Callable[..., Relay], no_pauses: None
) -> None:
    """Every row fails many times while nothing gets through; afterwards each arrives, once."""
    outbox.add(*[f"s{number}" for number in range(30)])
    receiver.answer = lambda _: Answer(500)
    sender = make()
    for _ in range(100):
        sender.run_once()
    receiver.answer = None
    assert sender.drain(10)
    assert not outbox.parked
    assert len(receiver.spans) == 30
    assert sent_once(receiver)


def test_an_endpoint_that_answers_every_second_request_parks_nothing(
    outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay], no_pauses: None
) -> None:
    """Failures that strike without regard to content never make a row a culprit."""
    outbox.add(*[f"s{number}" for number in range(2_000)])
    turns = iter(range(10**6))
    http.answer = lambda _: Answer(503) if next(turns) % 2 == 0 else None
    assert make().drain(30)
    assert not outbox.parked
    assert len(http.spans) == 2_000
    assert sent_once(http)


@pytest.mark.parametrize("seed", range(10))
def test_failures_by_chance_park_nothing(seed: int, outbox: Outbox, make: Callable[..., Relay], no_pauses: None) -> None:
    """At three failures in ten, without regard to content, every row gets through in the end."""
    outbox.add(*["a"] * 200)
    chance = random.Random(seed)
    sender = make()
    reply = {True: Reply(Verdict.FAILED, "HTTP 500"), False: Reply(Verdict.ACCEPTED)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sender._transport, "send", lambda _: reply[chance.random() < 0.3])
        assert sender.drain(20)
    assert not outbox.parked


def test_a_partial_success_without_rejections_is_a_success(
    outbox: Outbox, receiver: OtlpReceiver, make: Callable[..., Relay], caplog: pytest.LogCaptureFixture
) -> None:
    """Its message is a hint, logged once, however often it comes."""
    sender = make()
    for _ in range(3):
        outbox.add("a")
        receiver.script(Answer(message="use a newer schema"))
        sender.run_once()
    assert not outbox.rows
    assert not outbox.parked
    assert caplog.text.count("use a newer schema") == 1


def test_rejected_spans_park_the_rows_of_their_request(outbox: Outbox, receiver: OtlpReceiver, make: Callable[..., Relay]) -> None:
    """OTLP forbids to send a partly rejected request again, and nobody can tell which spans it was."""
    outbox.add("a", "b", count=2)
    receiver.script(Answer(rejected_spans=1, message="too old"))
    assert make().drain(5)
    assert outbox.parked == dict.fromkeys((1, 2), "1 of 4 spans rejected: too old")
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_wrong_credentials_or_address_keep_everything_and_are_said_once(  # noqa: PLR0917
    status: int, outbox: Outbox, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Relay], caplog: Any
) -> None:
    """The rows are fine: they stay unblamed, the pause is long, the log has one line, and never a header's value."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20s3cret")
    outbox.add("a", "b")
    receiver.answer = lambda _: Answer(status, "who are you")
    sender = make()
    for _ in range(5):
        assert sender.run_once().pause == 30
    assert caplog.text.count("who are you") == 1
    assert "s3cret" not in caplog.text
    assert [row.failures for row in outbox.rows.values()] == [0, 0]
    assert not outbox.claims
    receiver.answer = None
    assert sender.drain(10)
    assert receiver.requests[-1].headers["authorization"] == "Bearer s3cret"
    assert "takes spans again" in caplog.text


@pytest.mark.parametrize("status", [301, 302, 307, 405, 415])
def test_an_address_that_is_no_otlp_endpoint_parks_nothing(
    status: int, outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay]
) -> None:
    """A web page at the wrong port is a matter of configuration; redirects are not followed."""
    outbox.add("a")
    http.script(Answer(status, "not here", text=True))
    progress = make().run_once()
    assert progress.pause == 30
    assert progress.reason == f"HTTP {status}: not here"
    assert len(outbox.rows) == 1


def test_a_connection_lost_before_the_answer_sends_equal_bytes_again(
    outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay], no_pauses: None
) -> None:
    """Nobody can know whether the first copy arrived; the second one is byte for byte the same."""
    outbox.add("a")
    http.script(Answer(lost=True))
    assert make().drain(10)
    [copies] = http.deliveries.values()
    assert len(copies) == 2
    assert copies[0] == copies[1]


def test_an_answer_that_takes_too_long_is_a_failure(
    outbox: Outbox, receiver: OtlpReceiver, make: Callable[..., Relay], monkeypatch: pytest.MonkeyPatch
) -> None:
    """OTEL_EXPORTER_OTLP_TIMEOUT bounds the wait; the row is kept and counted."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    outbox.add("a")
    receiver.script(Answer(delay_seconds=60))
    assert make().run_once().pause is not None
    assert outbox.rows[1].failures == 1


def test_what_was_accepted_is_deleted_when_the_store_is_back(
    outbox: Outbox, receiver: OtlpReceiver, make: Callable[..., Relay], no_pauses: None
) -> None:
    """A store that is away between answer and deletion delays the deletion, and nothing is claimed or sent before it."""
    outbox.add("a")
    sender = make()
    outbox.fault = lambda write: StoreUnavailable("busy") if isinstance(write, SettleOutbox) else None
    for _ in range(3):
        assert sender.run_once().pause is not None
    outbox.claims.clear()  # even if the claim has lapsed
    outbox.fault = lambda _: None
    assert sender.drain(10)
    assert names(receiver) == ["a"]


def test_a_stop_finishes_the_deletion_of_what_was_accepted(outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay]) -> None:
    """`stop` waits for the answer under way and for the store to take the deletion."""
    outbox.add("a")
    asked = threading.Event()
    attempts: list[Write] = []

    def slow(_: object) -> Answer:
        asked.set()
        return Answer(delay_seconds=0.5)

    def busy(write: Write) -> Exception | None:
        if isinstance(write, SettleOutbox) and write.delivered and len(attempts) < 3:
            attempts.append(write)
            return StoreUnavailable("busy")
        return None

    http.answer, outbox.fault = slow, busy
    sender = make()
    sender.start()
    assert asked.wait(10)
    sender.stop(5)
    assert names(http) == ["a"]
    assert not outbox.rows
    assert len(attempts) == 3


def test_a_stop_waits_for_an_answer_beyond_its_own_timeout(outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay]) -> None:
    """With no time left for sending, the request under way is still awaited: its spans are not sent twice."""
    outbox.add("a")
    asked = threading.Event()

    def slow(_: object) -> Answer:
        asked.set()
        return Answer(delay_seconds=0.5)

    http.answer = slow
    sender = make()
    sender.start()
    assert asked.wait(10)
    sender.stop(0)
    assert not outbox.rows
    assert names(http) == ["a"]


def test_a_stop_sends_what_is_left_if_all_goes_well(outbox: Outbox, receiver: OtlpReceiver, make: Callable[..., Relay]) -> None:
    """Rows written just before the exit still go out."""
    sender = make()
    sender.start()
    outbox.add(*["late"] * 2_000)
    sender.stop(20)
    assert len(receiver.spans) == 2_000
    assert not outbox.rows


def test_a_stop_while_the_endpoint_refuses_is_quick(outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay]) -> None:
    """In an outage an exit waits for nothing: the rows stay, unclaimed, for another relay."""
    outbox.add("a")
    http.answer = lambda _: Answer(503, retry_after="600")
    sender = make()
    sender.start()
    http.wait_for(lambda receiver: len(receiver.requests) == 1)
    before = time.monotonic()
    sender.stop(60)
    assert time.monotonic() - before < 30
    assert len(outbox.rows) == 1
    assert not outbox.claims


def test_the_thread_sends_new_rows_when_woken_and_by_itself(outbox: Outbox, receiver: OtlpReceiver, make: Callable[..., Relay]) -> None:
    """Own rows go out at once, those of other processes within the interval; starting twice is starting once."""
    sender = make()
    sender.start()
    sender.start()
    outbox.add("own")
    sender.wake()
    receiver.wait_for(1)
    outbox.add("other")
    receiver.wait_for(2)
    sender.stop(5)
    assert sent_once(receiver)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_request_that_is_begun_at_the_end_is_waited_for_no_longer_than_the_end_may_take(
    outbox: Outbox, make: Callable[..., Relay], monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    """The endpoint takes connections and never answers."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc" if protocol == "grpc" else "http/protobuf")
        outbox.add("a")
        sender = make()
        begun = time.monotonic()
        sender.send_rest(begun + 0.2)
        assert time.monotonic() - begun < sender.endpoint.timeout_seconds / 2
    assert len(outbox.rows) == 1
    assert not outbox.claims


def test_a_backoff_is_not_cut_short_by_new_rows(outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay]) -> None:
    """An endpoint that asked for a pause gets it, however much work is done meanwhile."""
    rounds: list[relay.Progress] = []
    outbox.add("a")
    http.answer = lambda _: Answer(429, retry_after="600")
    sender = make(on_progress=rounds.append)
    sender.start()
    http.wait_for(lambda receiver: len(receiver.requests) == 1)
    for _ in range(10):
        outbox.add("b")
        sender.wake()
    sender.stop(1)
    assert len(http.requests) == 1
    assert [(each.pause, each.asked) for each in rounds] == [(600, True)]


def test_a_drain_ends_at_its_timeout_while_the_endpoint_refuses(outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay]) -> None:
    """It says that something is left, and leaves it unclaimed."""
    outbox.add("a")
    http.answer = lambda _: Answer(503)
    assert not make().drain(0.3)
    assert not outbox.claims
    assert http.requests


def test_a_drain_waits_for_rows_that_another_relay_has_in_hand(outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay]) -> None:
    """The outbox is empty only when nobody has anything left to deliver."""
    outbox.add("a")
    outbox.commit([ClaimOutbox("p-2", 600)])
    assert not make().drain(0.3)
    outbox.commit([SettleOutbox("p-2", released=[1])])
    assert make().drain(10)
    assert names(http) == ["a"]


def test_what_a_dead_relay_had_in_hand_goes_out_before_its_lease_ends(
    outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay]
) -> None:
    """The thread takes it back by itself, and so does a drain; what a living relay holds stays with it."""
    outbox.add("dead", "living")
    outbox.commit([ClaimOutbox("p-2", 600, max_rows=1)])
    outbox.commit([ClaimOutbox("p-3", 600)])
    assert not make(dead=tuple).drain(0.3)
    serving = make(dead=lambda: ["p-2"])
    serving.start()
    http.wait_for(1, timeout=10)
    serving.stop(5)
    assert names(http) == ["dead"]
    assert make(dead=lambda: ["p-3"]).drain(10)
    assert names(http) == ["dead", "living"]


def test_a_drain_can_be_ended_from_outside(outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay]) -> None:
    """A signal handler sets the event; what is under way is finished and settled, the rest is given back."""
    outbox.add(*["a"] * 2_000)
    ended = threading.Event()

    def end(_: object) -> None:
        ended.set()

    http.answer = end
    assert not make().drain(600, ended)
    assert len(http.requests) == 1
    assert len(outbox.rows) == 2_000 - 512
    assert not outbox.claims


def test_two_relays_share_an_outbox_without_repeats(outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay]) -> None:
    """Claims keep them apart."""
    outbox.add(*["a"] * 3_000)
    both = [make("p-1"), make("p-2")]
    for each in both:
        each.start()
    http.wait_for(3_000, timeout=30)
    for each in both:
        each.stop(5)
    assert sent_once(http)
    assert not outbox.rows


def test_rows_that_can_not_be_sent_within_the_claim_are_given_back(
    outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request is begun whose answer could come after another relay has taken the rows over."""
    outbox.add("a", "b")
    monkeypatch.setattr(relay, "LEASE_SECONDS", 5.0)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "10")
    progress = make().run_once()
    assert (progress.seen, progress.rows) == (2, 0)
    assert http.requests == []
    assert not outbox.claims


def test_a_store_that_is_away_pauses_the_relay(outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay], no_pauses: None) -> None:
    """It comes back by itself."""
    outbox.add("a")
    outbox.fault = lambda _: StoreUnavailable("busy")
    sender = make()
    assert sender.run_once().pause is not None
    outbox.fault = lambda _: None
    assert sender.drain(10)


def test_a_settlement_that_the_store_refuses_does_not_stop_the_relay(
    outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay], caplog: pytest.LogCaptureFixture
) -> None:
    """A refusal would be the same next time, so it is logged, and the other rows go on."""
    outbox.add("a")
    outbox.fault = lambda write: StoreRejected("no such row") if isinstance(write, SettleOutbox) else None
    sender = make()
    sender.run_once()
    outbox.fault = lambda _: None
    outbox.add("b")
    assert sender.run_once().rows == 1
    assert "otelexec.relay.unsettled" in caplog.text


def test_a_defect_gives_the_rows_back_and_the_thread_goes_on(
    outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay], caplog: pytest.LogCaptureFixture, no_pauses: None
) -> None:
    """An exception that nobody foresaw costs neither rows nor the relay."""
    outbox.add("a")
    sender = make()
    real, calls = sender._transport.send, []

    def broken(body: bytes) -> Any:
        calls.append(body)
        if len(calls) == 1:
            raise KeyError(body)
        return real(body)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sender._transport, "send", broken)
        sender.start()
        http.wait_for(1)
    sender.stop(5)
    assert not outbox.rows
    assert "otelexec.relay.defect" in caplog.text


@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_headers_and_compression_of_the_standard_variables_are_used(
    compression: str, outbox: Outbox, receiver: OtlpReceiver, make: Callable[..., Relay], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request carries the headers, and the receiver reads it compressed or not."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "X-Tenant=a%20b")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", compression)
    outbox.add("a", size=10_000)
    assert make().drain(10)
    assert names(receiver) == ["a"]
    assert receiver.requests[0].headers["x-tenant"] == "a b"
    if receiver.protocol == "http":
        assert receiver.requests[0].headers.get("content-encoding", "none") == compression
        assert (int(receiver.requests[0].headers["content-length"]) < 5_000) == (compression == "gzip")


def test_a_netrc_entry_never_replaces_the_configured_authorization(
    outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """The HTTP library would prefer a matching line of ~/.netrc to the header."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login other password other\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20ours")
    outbox.add("a")
    assert make().drain(10)
    assert http.requests[0].headers["authorization"] == "Bearer ours"


def test_the_relay_traces_nothing_of_its_own(
    outbox: Outbox, http: OtlpReceiver, make: Callable[..., Relay], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An instrumented HTTP library would make a span of each delivery, which would have to be delivered in turn."""
    seen: list[object] = []
    real = HTTPAdapter.send

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(otel_context.get_value(otel_context._SUPPRESS_INSTRUMENTATION_KEY))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(HTTPAdapter, "send", watched)
    outbox.add("a")
    assert make().drain(10)
    assert seen == [True]
    assert otel_context.get_value(otel_context._SUPPRESS_INSTRUMENTATION_KEY) is None


def test_a_wrong_variable_is_an_error_when_the_relay_is_made(make: Callable[..., Relay], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing starts with an endpoint that can't be used."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(SettingsError, match="OTEL_EXPORTER_OTLP_PROTOCOL"):
        make()


def test_errors_never_show_the_credentials_of_the_url(
    outbox: Outbox, make: Callable[..., Relay], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An unreachable endpoint is named by host, whatever its URL holds."""
    caplog.set_level(logging.DEBUG, logger="otelexec")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://user:s3cret@127.0.0.1:1/base?token=s3cret")
    outbox.add("a")
    progress = make().run_once()
    assert "s3cret" not in progress.reason + caplog.text
    assert "127.0.0.1:1" in caplog.text


def test_it_delivers_parks_and_settles_in_a_real_store(
    receiver: OtlpReceiver, make_on_sqlite: Callable[[], tuple[SqliteStore, Relay]]
) -> None:
    """On SQLite as on the fake: the rest is delivered once, the culprit is parked with its reason, no claim is left."""
    store, sender = make_on_sqlite()
    rows = [otlp.wrap(RESOURCE, {b"\x0a\x00": [span_bytes(name)]}) for name in ("a", "bad", *"bcdefg")]
    store.commit([AddSpans(request=row, count=1, process_id="p") for row in rows], durable=False, timeout_seconds=5)
    receiver.poison = lambda span: span.name == "bad"
    assert sender.drain(10)
    assert names(receiver) == list("abcdefg")
    assert sent_once(receiver)
    statistics = store.statistics()
    assert (statistics.outbox_rows, statistics.claimed_rows) == (0, 0)
    assert [row.reason for row in statistics.parked] == [receiver_reason(receiver)]
    store.commit([RetryParked()], durable=False, timeout_seconds=5)
    receiver.poison = None
    assert sender.drain(10)
    assert names(receiver) == [*"abcdefg", "bad"]


def receiver_reason(receiver: OtlpReceiver) -> str:
    return f"{'INVALID_ARGUMENT' if receiver.protocol == 'grpc' else 'HTTP 400'}: a span in this request is not acceptable"


@pytest.fixture
def make_on_sqlite(tmp_path: Path) -> Iterator[Callable[[], tuple[SqliteStore, Relay]]]:
    store = SqliteStore(tmp_path / "otelexec.db")
    made: list[Relay] = []

    def one() -> tuple[SqliteStore, Relay]:
        def commit(writes: Sequence[Write]) -> list[object]:
            return store.commit(writes, durable=False, timeout_seconds=5)

        made.append(Relay(commit, Settings(store="none"), "p-1", waiting=lambda: store.statistics().outbox_rows))
        return store, made[0]

    yield one
    for each in made:
        each.stop(0)
    store.close()
