"""The Trigger.dev client against a server that misbehaves: what is sent again, what is said of it, and what stands on record."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from otelexec_trigger import (
    AsyncTriggerDevBackend,
    BackendError,
    EnqueueError,
    InvalidRequest,
    LocalBackend,
    Run,
    RunNotFound,
    TriggerDevBackend,
    wire,
)
from otelexec_trigger.calls import Http
from otelexec_trigger.rendering import run_of

import otelexec
from otelexec import semconv
from otelexec.decoded import DecodedSpan
from otelexec.errors import SettingsError
from otelexec.store.records import ExecutionRecord
from tests.integrations.trigger.scripted import CUT, Served
from tests.records import Records


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "client.db"


@pytest.fixture
def records(isolated: None, path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[ExecutionRecord]]]:
    monkeypatch.setenv("OTELEXEC_STORE", f"sqlite:///{path}")
    monkeypatch.setenv("OTELEXEC_RELAY", "false")

    def read() -> list[ExecutionRecord]:
        if not path.exists():
            return []
        found = Records(path)
        try:
            return found.all()
        finally:
            found.close()

    yield read
    otelexec.shutdown()


@pytest.fixture
def backend(served: Served, records: Any) -> Iterator[TriggerDevBackend]:
    with TriggerDevBackend(served.url, "tr_dev_secret", first_wait_seconds=0.001, timeout_seconds=10) as made:
        yield made


@pytest.fixture
def read(records: Callable[[], list[ExecutionRecord]], path: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    return records, lambda: Records(path).spans()


OK = {"id": "run_1", "isCached": False}


def test_a_call_that_is_repeated_has_one_uuid_and_another_call_another(served: Served, backend: TriggerDevBackend) -> None:
    for answer in (500, 503, 429, 408, 409):
        served.answers = []
        served.answer(answer, {"error": "later"}, retry_after="0")
        served.answer(answer, {"error": "later"}, retry_after="0")
        served.answer(200, OK)
        served.requests.clear()
        assert backend.trigger("task", {"a": 1}) == "run_1"
        uuids = {headers["x-trigger-request-idempotency-key"] for _, _, headers, _ in served.requests}
        assert (len(served.requests), len(uuids)) == (3, 1)
        assert len({body for _, _, _, body in served.requests}) == 1
    backend.trigger("task")
    assert served.requests[-1][2]["x-trigger-request-idempotency-key"] not in uuids


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([422], ("rejected", False, "rejected", 1)),
        ([400], ("rejected", False, "rejected", 1)),
        ([401], ("rejected", False, "rejected", 1)),
        ([413], ("rejected", False, "rejected", 1)),
        ([500], ("unknown", True, "queued", 5)),
        ([503], ("unknown", True, "queued", 5)),
        ([CUT], ("unknown", True, "queued", 5)),
        ([500, 422], ("unknown", True, "queued", 2)),
        ([CUT, 422], ("unknown", True, "queued", 2)),
        ([200], ("unknown", True, "queued", 1)),
    ],
)
def test_what_is_known_of_a_failed_call_and_what_stands_on_record(
    served: Served,
    backend: TriggerDevBackend,
    read: tuple[Callable[[], list[ExecutionRecord]], Callable[[], list[DecodedSpan]]],
    answers: list[int],
    expected: tuple[str, bool, str, int],
) -> None:
    acceptance, retryable, state, requests = expected
    records, spans = read
    for status in answers:
        served.answer(status, {"error": "no"} if status != 200 else {"isCached": False})
    with pytest.raises(EnqueueError) as caught:
        backend.trigger("task", {"a": 1})
    error = caught.value
    assert (error.acceptance, error.retryable) == (acceptance, retryable)
    assert len(served.requests) == requests
    assert "tr_dev_secret" not in str(error)
    (record,) = records()
    assert (record.name, record.state) == ("task", state)
    otelexec.shutdown()
    (span,) = spans()
    assert span.kind == "producer"
    assert span.status == "error"
    assert span.attributes[semconv.EXECUTION_ID] == record.execution_id


class Soft(Exception):
    pass


@pytest.fixture
def soft_limit() -> Iterator[Callable[[], None]]:
    """Let SIGUSR1 raise in the main thread; gives what sends it."""

    def strike(*_: object) -> None:
        raise Soft

    before = signal.signal(signal.SIGUSR1, strike)
    yield lambda: os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def test_what_a_signal_handler_raises_into_a_call_says_nothing_of_the_backend(
    served: Served, backend: TriggerDevBackend, records: Callable[[], list[ExecutionRecord]], soft_limit: Callable[[], None]
) -> None:
    served.answer(202, {"id": "batch_1"})
    served.before = lambda: soft_limit() if not served.requests[-1][1].endswith("batches") else None
    asks: list[Callable[[], str]] = [lambda: backend.trigger("one"), lambda: backend.batch_trigger([{"task": "two"}, {"task": "three"}])]
    for ask in asks:
        with pytest.raises(Soft):
            ask()
    assert {record.name: record.state for record in records()} == {"one": "queued", "two": "queued", "three": "queued"}


def test_what_a_signal_handler_raises_between_attempts_is_no_acceptance_where_none_was_possible(
    records: Callable[[], list[ExecutionRecord]], soft_limit: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("otelexec_trigger.calls.time.sleep", lambda _: soft_limit())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with TriggerDevBackend(f"http://127.0.0.1:{free.getsockname()[1]}", "k") as backend, pytest.raises(Soft):
            backend.trigger("task")
    assert [record.state for record in records()] == ["rejected"]


@pytest.mark.parametrize("errors", [(RuntimeError, EnqueueError), (RecursionError, RecursionError), (OSError, OSError)])
def test_a_call_whose_client_breaks_down_may_have_been_accepted(
    served: Served,
    backend: TriggerDevBackend,
    records: Callable[[], list[ExecutionRecord]],
    monkeypatch: pytest.MonkeyPatch,
    errors: tuple[type[Exception], type[Exception]],
) -> None:
    raised, expected = errors
    request = httpx.Client.request

    def broken(*args: Any, **kwargs: Any) -> None:
        request(*args, **kwargs)
        raise raised("Event loop is closed")

    monkeypatch.setattr(httpx.Client, "request", broken)
    served.answer(200, OK)
    with pytest.raises(expected, match="Event loop is closed") as caught:
        backend.trigger("task")
    assert getattr(caught.value, "acceptance", "unknown") == "unknown"
    assert len(served.requests) == 1
    assert [record.state for record in records()] == ["queued"]


def test_where_nothing_listens_nothing_was_accepted(records: Callable[[], list[ExecutionRecord]]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    backend = TriggerDevBackend(f"http://127.0.0.1:{port}", "k", max_attempts=2, first_wait_seconds=0.001)
    with pytest.raises(EnqueueError) as caught:
        backend.trigger("task")
    assert (caught.value.acceptance, caught.value.retryable) == ("rejected", True)
    assert [record.state for record in records()] == ["rejected"]
    backend.close()


def test_the_servers_word_on_retrying_wins(served: Served, backend: TriggerDevBackend) -> None:
    served.answer(500, {"error": "no"}, x_should_retry="false")
    with pytest.raises(EnqueueError):
        backend.trigger("task")
    assert len(served.requests) == 1
    served.answers = []
    served.answer(404, {"error": "not yet"}, x_should_retry="true")
    served.answer(200, {"id": "run_1", "status": "QUEUED"})
    assert backend.get("run_1").state == "pending"


@pytest.mark.parametrize("unit", [1, 1000])
def test_a_rate_limits_end_is_awaited_in_either_unit(served: Served, backend: TriggerDevBackend, unit: int) -> None:
    reset = int(time.time() + 1.2) + 1
    served.answer(429, {"title": "Rate Limit Exceeded"}, x_ratelimit_reset=str(reset * unit))
    served.answer(200, OK)
    assert backend.trigger("task") == "run_1"
    assert time.time() >= reset - 0.1


NOON = "Sat, 01 Aug 2026 12:00:00 GMT"
NOON_UNIX = 1_785_585_600


@pytest.mark.parametrize(
    ("status", "headers", "waits"),
    [
        (429, {"retry-after": "7"}, [7.0, 7.0]),
        (429, {"retry-after": "Sat, 01 Aug 2026 12:00:09 GMT", "date": NOON}, [9.0, 9.0]),
        (429, {"retry-after": "Sat, 01 Aug 2026 11:59:00 GMT", "date": NOON}, [1.0, 1.6]),
        (429, {"retry-after": "0"}, [1.0, 1.6]),
        (429, {"retry-after": "-5"}, [1.0, 1.6]),
        (429, {"retry-after": "nan"}, [1.0, 1.6]),
        (429, {"retry-after": "1.3"}, [1.3, 1.6]),
        (429, {"retry-after": "3600"}, [30.0, 30.0]),
        (429, {"retry-after": "soon"}, [1.0, 1.6]),
        (429, {"retry-after": "Sat, 99 Aug 99999 12:00:00 GMT"}, [1.0, 1.6]),
        (429, {"retry-after": "soon", "x-ratelimit-reset": str(NOON_UNIX + 9), "date": NOON}, [9.0, 9.0]),
        (429, {"x-ratelimit-reset": str((NOON_UNIX + 9) * 1000), "date": NOON}, [9.0, 9.0]),
        (429, {"x-ratelimit-reset": str(NOON_UNIX - 9), "date": NOON}, [1.0, 1.6]),
        (429, {"x-ratelimit-reset": "nan"}, [1.0, 1.6]),
        (503, {"retry-after": "7"}, [7.0, 7.0]),
        (503, {"x-ratelimit-reset": str(NOON_UNIX + 9), "date": NOON}, [1.0, 1.6]),
        (500, {"retry-after": "7"}, [1.0, 1.6]),
    ],
)
def test_an_answer_s_word_on_when_counts_by_its_own_clock_and_never_for_less_than_the_usual_wait(
    served: Served, records: Any, monkeypatch: pytest.MonkeyPatch, *, status: int, headers: dict[str, str], waits: list[float]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("otelexec_trigger.calls.time.sleep", waited.append)
    served.answer(status, {"error": "later"}, **headers)
    with TriggerDevBackend(served.url, "k", max_attempts=3) as backend, pytest.raises(BackendError):
        backend.get("run_1")
    assert waited == waits


def test_an_outcome_that_is_unknown_is_repeated_under_the_same_id(served: Served, backend: TriggerDevBackend) -> None:
    served.answer(200, {})
    with otelexec.correlate(source="webhook", execution_id="e-1"), pytest.raises(EnqueueError):
        backend.trigger("task", {"a": 1})
    served.answers = []
    served.answer(200, OK)
    with otelexec.correlate(source="webhook", execution_id="e-1"):
        assert backend.trigger("task", {"a": 1}) == "run_1"
    first, second = (json.loads(body)["options"]["idempotencyKey"] for _, _, _, body in served.requests)
    assert first == second == wire.idempotency_hash("e-1")


def test_a_batch_is_sent_again_until_it_is_whole(served: Served, backend: TriggerDevBackend, records: Any) -> None:
    served.answer(202, {"id": "batch_1", "runCount": 2, "isCached": False})
    served.answer(200, {"id": "batch_1", "sealed": False})
    served.answer(200, {"id": "batch_1", "sealed": True})
    assert backend.batch_trigger([{"task": "a", "payload": {"n": 1}}, {"task": "b"}]) == "batch_1"
    assert [path for _, path, _, _ in served.requests] == ["/api/v3/batches", *["/api/v3/batches/batch_1/items"] * 2]
    assert served.requests[1][3] == served.requests[2][3]
    items = [json.loads(line) for line in served.requests[1][3].splitlines()]
    assert [(item["index"], item["task"]) for item in items] == [(0, "a"), (1, "b")]
    assert len({item["options"]["idempotencyKey"] for item in items}) == 2
    assert [record.state for record in records()] == ["queued", "queued"]


def test_more_than_a_thousand_items_are_several_batches(served: Served, backend: TriggerDevBackend) -> None:
    for number in (1, 2):
        served.answer(202, {"id": f"batch_{number}", "isCached": False})
        served.answer(200, {"sealed": True})
    assert backend.batch_trigger([{"task": "t"}] * 1001) == "batch_1"
    assert [json.loads(body)["runCount"] for _, path, _, body in served.requests if path.endswith("batches")] == [1000, 1]


def test_a_batch_that_is_refused_leaves_rejected_records(served: Served, backend: TriggerDevBackend, records: Any) -> None:
    served.answer(422, {"error": "too many"})
    with pytest.raises(EnqueueError) as caught:
        backend.batch_trigger([{"task": "a"}, {"task": "b"}])
    assert caught.value.acceptance == "rejected"
    assert {record.state for record in records()} == {"rejected"}


@pytest.mark.parametrize(
    ("status", "answer", "requests"),
    [
        (422, {"error": "the queue is full after one item"}, 1),
        (413, {"error": "too large"}, 1),
        (200, b"<html>", 1),
        (200, {"id": "batch_1", "itemsAccepted": 1}, 1),
        (200, {"sealed": "true"}, 1),
        (200, {"sealed": False}, 5),
    ],
)
def test_a_batch_of_which_some_items_may_be_taken_is_unknown_as_a_whole(
    served: Served, backend: TriggerDevBackend, records: Any, *, status: int, answer: Any, requests: int
) -> None:
    served.answer(202, {"id": "batch_1", "runCount": 2, "isCached": False})
    served.answer(status, answer)
    with pytest.raises(EnqueueError) as caught:
        backend.batch_trigger([{"task": "a"}, {"task": "b"}])
    assert (caught.value.acceptance, caught.value.retryable) == ("unknown", True)
    assert len(served.requests) == 1 + requests
    assert [record.state for record in records()] == ["queued", "queued"]


def test_a_batch_whose_items_were_not_sent_is_rejected(served: Served, records: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    request = httpx.Client.request

    def unconnected(client: httpx.Client, method: str, url: httpx.URL, **kwargs: Any) -> httpx.Response:
        if url.path.endswith("/items"):
            raise httpx.ConnectError("refused")
        return request(client, method, url, **kwargs)

    monkeypatch.setattr(httpx.Client, "request", unconnected)
    served.answer(202, {"id": "batch_1"})
    with TriggerDevBackend(served.url, "k", first_wait_seconds=0) as backend, pytest.raises(EnqueueError) as caught:
        backend.batch_trigger([{"task": "a"}])
    assert caught.value.acceptance == "rejected"
    assert [record.state for record in records()] == ["rejected"]


def test_too_many_tags_lose_the_correlations_and_say_so(
    served: Served, backend: TriggerDevBackend, caplog: pytest.LogCaptureFixture
) -> None:
    served.answer(200, OK)
    backend.trigger("task", tags=[f"t{number}" for number in range(9)])
    tags = json.loads(served.requests[-1][3])["options"]["tags"]
    assert len(tags) == 10
    assert tags[:9] == [f"t{number}" for number in range(9)]
    assert "no room for otelexec.request_id" in caplog.text
    with otelexec.correlate(source="webhook", path="/" + "x" * 200):
        backend.trigger("task")
    assert all(len(tag) <= 128 for tag in json.loads(served.requests[-1][3])["options"]["tags"])


def test_cancelling_asks_for_it_first_then_the_backend_then_closes_the_record(
    served: Served, backend: TriggerDevBackend, records: Callable[[], list[ExecutionRecord]]
) -> None:
    served.answer(200, OK)
    backend.trigger("task", {"a": 1})
    (record,) = records()
    served.answers = []
    served.answer(200, {"id": "run_1", "status": "QUEUED", "metadata": {"otelexec": {"execution_id": record.execution_id}}})
    served.answer(409, {"error": "busy"}, x_should_retry="false")
    with pytest.raises(BackendError):
        backend.cancel("run_1")
    (wanted,) = records()
    assert wanted.cancellation is not None
    assert wanted.state == "queued"
    served.answers = []
    served.answer(200, {"id": "run_1", "status": "QUEUED", "metadata": {"otelexec": {"execution_id": record.execution_id}}})
    served.answer(200, {"id": "run_1"})
    assert backend.cancel("run_1") is True
    (cancelled,) = records()
    assert cancelled.state == "cancelled"
    assert cancelled.ended_unix_ns is not None
    served.answers = []
    served.answer(404, {"error": "none"})
    assert backend.cancel("run_2") is False


def test_a_run_that_has_ended_is_not_cancelled(
    served: Served, backend: TriggerDevBackend, records: Callable[[], list[ExecutionRecord]]
) -> None:
    served.answer(200, OK)
    backend.trigger("task", {"a": 1})
    (record,) = records()
    served.answers = []
    served.answer(200, {"id": "run_1", "status": "COMPLETED", "metadata": {"otelexec": {"execution_id": record.execution_id}}})
    assert backend.cancel("run_1") is True
    (after,) = records()
    assert (after.state, after.cancellation) == ("queued", None)


def test_a_run_whose_metadata_has_no_room_for_its_id_is_cancelled_on_the_record(
    served: Served, backend: TriggerDevBackend, records: Callable[[], list[ExecutionRecord]]
) -> None:
    served.answer(200, OK)
    backend.trigger("task", {"a": 1}, metadata=["mine"])
    tags = json.loads(served.requests[-1][3])["options"]["tags"]
    served.answers = []
    served.answer(200, {"id": "run_1", "status": "QUEUED", "metadata": ["mine"], "tags": tags})
    served.answer(200, {"id": "run_1"})
    assert backend.cancel("run_1") is True
    assert [record.state for record in records()] == ["cancelled"]


@pytest.mark.parametrize(
    "garbage", [b"<html>", b"[]", b"{}", b"\xff", b'{"id": 5}', b"[" * 100_000, b'{"error":' + b"[" * 100_000], ids=lambda text: text[:12]
)
def test_a_success_that_says_nothing_is_no_run(
    served: Served, backend: TriggerDevBackend, records: Callable[[], list[ExecutionRecord]], garbage: bytes
) -> None:
    served.answer(200, garbage)
    for ask in (backend.get, backend.replay, backend.cancel, lambda run: backend.reschedule(run, "1h"), lambda _: list(backend.list())):
        with pytest.raises(BackendError):
            ask("run_1")
    with pytest.raises(EnqueueError) as caught:
        backend.trigger("task", {"a": 1})
    assert caught.value.acceptance == "unknown"
    assert [record.state for record in records()] == ["queued"]


def test_a_payload_that_can_not_be_uploaded_is_no_run(served: Served, backend: TriggerDevBackend, records: Any) -> None:
    large = {"text": "x" * wire.OFFLOAD_BYTES}
    asks: list[Callable[[], str]] = [
        lambda: backend.trigger("task", large),
        lambda: backend.batch_trigger([{"task": "task", "payload": large}]),
    ]
    for status, answer in ((403, {"error": "no"}), (200, {}), (200, {"presignedUrl": "http://a:x"}), (500, {})):
        served.answers = [(status, {}, answer)]
        for ask in asks:
            with pytest.raises(EnqueueError) as caught:
                ask()
            assert caught.value.acceptance == "rejected"
    assert {record.state for record in records()} == {"rejected"}


def test_an_output_that_is_kept_apart_is_fetched(served: Served, backend: TriggerDevBackend) -> None:
    for content, kind, output in (
        (b'{"json": [1]}', wire.SUPERJSON, [1]),
        (b"[1]", "binary/octet-stream", [1]),
        (b"it was so", "binary/octet-stream", "it was so"),
    ):
        served.answers = []
        served.answer(200, {"id": "run_1", "status": "COMPLETED", "outputPresignedUrl": f"{served.url}/output"})
        served.answer(200, content, content_type=kind)
        assert backend.get("run_1").output == output
        assert "authorization" not in served.requests[-1][2]


def test_what_was_accepted_before_a_later_batch_was_refused_is_told(
    served: Served, backend: TriggerDevBackend, records: Callable[[], list[ExecutionRecord]]
) -> None:
    served.answer(202, {"id": "batch_1", "isCached": False})
    served.answer(200, {"sealed": True})
    served.answer(422, {"error": "enough"})
    with pytest.raises(EnqueueError, match="the first 1000 of 1002 items were accepted") as caught:
        backend.batch_trigger([{"task": "t"}] * 1002)
    assert (caught.value.acceptance, caught.value.retryable, caught.value.status) == ("unknown", False, 422)
    states = [record.state for record in records()]
    assert (states.count("queued"), states.count("rejected")) == (1000, 2)


@pytest.mark.parametrize(
    "bad",
    [
        {"task": None},
        {"task": "\ud800"},
        {"payload": "\ud800"},
        {"key": 5},
        {"key": ""},
        {"queue": 5},
        {"concurrency_key": ["k"]},
        {"max_attempts": "3"},
        {"max_attempts": 2.5},
        {"delay": object()},
        {"delay": 10**400},
        {"ttl": datetime(2030, 1, 1, tzinfo=UTC)},
        {"tags": {"a": 1}},
    ],
)
def test_what_is_of_a_wrong_kind_is_refused_at_once(
    served: Served, backend: TriggerDevBackend, records: Callable[[], list[ExecutionRecord]], bad: dict[str, Any]
) -> None:
    call: dict[str, Any] = {"task": "t"} | bad
    asks: list[Callable[[], str]] = [
        lambda: backend.trigger(**call),
        lambda: backend.batch_trigger([call]),
        lambda: LocalBackend().trigger(**call),
    ]
    for ask in asks:
        with pytest.raises(InvalidRequest):
            ask()
    assert not served.requests
    assert not records()


def test_lists_follow_their_pages(served: Served, backend: TriggerDevBackend) -> None:
    served.answer(200, {"data": [{"id": "run_3"}, {"id": "run_2"}], "pagination": {"next": "run_2"}})
    served.answer(200, {"data": [{"id": "run_1"}], "pagination": {"previous": "run_1"}})
    assert [run.id for run in backend.list()] == ["run_3", "run_2", "run_1"]
    assert "page%5Bafter%5D=run_2" in served.requests[1][1]


async def test_a_list_whose_cursor_comes_again_ends(served: Served, backend: TriggerDevBackend) -> None:
    for cursor in ("a", "b", "a"):
        served.answer(200, {"data": [{"id": cursor}], "pagination": {"next": cursor}})
    assert [run.id for run in backend.list()] == ["a", "b", "a"]
    assert len(served.requests) == 3
    async with AsyncTriggerDevBackend(served.url, "k") as awaited:
        assert [run.id async for run in awaited.list()] == ["a", "a"]


@pytest.mark.parametrize("name", ["", ".", "..", "\ud800", None, 7])
def test_what_is_no_id_is_refused_and_leads_nowhere(
    served: Served, backend: TriggerDevBackend, records: Callable[[], list[ExecutionRecord]], name: Any
) -> None:
    asks: list[Callable[[], object]] = [
        lambda: backend.get(name),
        lambda: backend.cancel(name),
        lambda: backend.replay(name),
        lambda: backend.reschedule(name, "1h"),
        lambda: backend.add_tags(name, "tag"),
        lambda: backend.trigger(name),
    ]
    for ask in asks:
        with pytest.raises(InvalidRequest):
            ask()
    assert not served.requests
    assert not records()


@pytest.mark.parametrize("name", ["..", "batch_\ud800"])
def test_a_batch_that_is_announced_under_no_id_is_rejected(served: Served, backend: TriggerDevBackend, records: Any, name: str) -> None:
    served.answer(202, {"id": name})
    with pytest.raises(EnqueueError, match="announced") as caught:
        backend.batch_trigger([{"task": "a"}])
    assert caught.value.acceptance == "rejected"
    assert len(served.requests) == 1
    assert [record.state for record in records()] == ["rejected"]


def test_metadata_under_the_correlations_key_is_left_out_and_that_is_said(
    served: Served, backend: TriggerDevBackend, records: Callable[[], list[ExecutionRecord]], caplog: pytest.LogCaptureFixture
) -> None:
    served.answer(200, OK)
    backend.trigger("task", metadata={"otelexec": "mine", "a": 1})
    sent = json.loads(json.loads(served.requests[-1][3])["options"]["metadata"])
    (record,) = records()
    assert (sent["a"], sent["otelexec"]["execution_id"]) == (1, record.execution_id)
    assert caplog.text.count("otelexec.trigger.metadata") == 1
    backend.trigger("task", metadata=sent)
    assert caplog.text.count("otelexec.trigger.metadata") == 1, "a run's own metadata may be passed on"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "foo://user:hunter2@h:1"),
        ("HTTP_PROXY", "http://user:hunter2@h:port"),
        ("HTTPS_PROXY", "http://user:hunter2#@h"),
        ("SSL_CERT_FILE", "/nowhere/at/all.pem"),
    ],
)
@pytest.mark.parametrize("kind", [TriggerDevBackend, AsyncTriggerDevBackend])
def test_a_proxy_or_certificates_that_can_not_be_used_are_named(
    isolated: None, monkeypatch: pytest.MonkeyPatch, kind: type[Any], name: str, *, value: str
) -> None:
    if name == "SSL_CERT_FILE" and httpx.__version__ < "0.28":
        pytest.skip("httpx before 0.28 takes its own certificates where the file is not there")
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name) as caught:
        kind("http://127.0.0.1:1", "k")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_proxy_that_needs_another_package_says_which(isolated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(SettingsError, match=r"ALL_PROXY.*httpx\[socks\]"):
        TriggerDevBackend("http://127.0.0.1:1", "k")


@pytest.mark.parametrize(
    ("status", "state", "ended"),
    [
        ("COMPLETED", "succeeded", True),
        ("CRASHED", "failed", True),
        ("SYSTEM_FAILURE", "failed", True),
        ("EXPIRED", "expired", True),
        ("TIMED_OUT", "timed_out", True),
        ("CANCELED", "cancelled", True),
        ("WAITING", "waiting", False),
        ("PENDING_VERSION", "pending", False),
        ("A_NEW_ONE", "A_NEW_ONE", False),
    ],
)
def test_a_status_has_one_state_whatever_the_booleans_say(status: str, state: str, ended: bool) -> None:
    run = run_of({"id": "run_1", "status": status, "isCompleted": False})
    assert (run.state, run.has_ended) == (state, ended)


def test_answers_of_any_shape_are_a_run() -> None:
    assert run_of({}) == Run("", "", raw={})
    assert run_of({"tags": 5, "durationMs": "long"}) == Run("", "", raw={"tags": 5, "durationMs": "long"})
    assert run_of({"id": 3, "status": None, "error": "text", "attemptCount": "2", "tags": None}).error == {"message": "text"}


def test_a_missing_run_is_told(served: Served, backend: TriggerDevBackend) -> None:
    served.answer(404, {"error": "Not found"})
    with pytest.raises(RunNotFound) as caught:
        backend.get("run_1")
    assert caught.value.status == 404


def test_without_a_key_it_says_what_to_set(isolated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIGGER_SECRET_KEY", raising=False)
    with pytest.raises(SettingsError, match="TRIGGER_SECRET_KEY"):
        TriggerDevBackend("http://127.0.0.1:1")
    with pytest.raises(SettingsError, match="TRIGGER_API_URL"):
        TriggerDevBackend("127.0.0.1:1", "k")
    for url in ("http://", "http://a:x", "ftp://a"):
        with pytest.raises(SettingsError, match="TRIGGER_API_URL"):
            TriggerDevBackend(url, "k")
    for options in ({"max_attempts": 0}, {"timeout_seconds": 0}, {"first_wait_seconds": -1}):
        with pytest.raises(SettingsError, match=next(iter(options))):
            TriggerDevBackend("http://127.0.0.1:1", "k", **options)
    with pytest.raises(SettingsError, match="TRIGGER_SECRET_KEY") as caught:
        TriggerDevBackend("http://127.0.0.1:1", "tr_dev_\nsecret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["http://user:hunter2@h", "http://:hunter2@h", "http://hunter2@h", "ftp://user:hunter2@h", "http://user:hunter2@h:x", "u:hunter2@"],
)
def test_a_url_with_a_password_is_refused_and_not_repeated(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIGGER_API_URL", url)
    with pytest.raises(SettingsError, match="TRIGGER_API_URL") as caught:
        TriggerDevBackend(secret_key="k")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_what_is_logged_of_presigned_urls_has_no_signature(
    served: Served, backend: TriggerDevBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = f"{served.url}/bucket/a%20b?X-Signature=a%2Fb"
    served.answer(200, {"presignedUrl": url})
    served.answer(200, b"")
    served.answer(200, OK)
    backend.trigger("task", "x" * wire.OFFLOAD_BYTES)
    served.answers = []
    served.answer(200, {"id": "run_1", "status": "COMPLETED", "outputPresignedUrl": url})
    served.answer(200, [1])
    assert backend.get("run_1").output == [1]
    asked = [(method, path) for method, path, _, _ in served.requests if path.startswith("/bucket")]
    assert asked == [("PUT", "/bucket/a%20b?X-Signature=a%2Fb"), ("GET", "/bucket/a%20b?X-Signature=a%2Fb")]
    assert caplog.text.count("/bucket/a%20b") == 2
    assert "X-Signature" not in caplog.text


def test_the_text_of_a_request_shows_neither_key_nor_signature_nor_payload() -> None:
    request = Http("PUT", "http://h/?X-Signature=secret", {"authorization": "Bearer secret"}, b"secret")
    assert "secret" not in repr(request)


def test_a_key_out_of_a_file_has_no_line_behind_it(served: Served, records: Any) -> None:
    served.answer(200, OK)
    with TriggerDevBackend(served.url, "tr_dev_secret\n") as backend:
        backend.trigger("task")
    assert served.requests[-1][2]["authorization"] == "Bearer tr_dev_secret"


async def test_the_asynchronous_client_does_the_same(served: Served, records: Callable[[], list[ExecutionRecord]]) -> None:
    served.answer(500, {"error": "later"})
    served.answer(200, OK)
    async with AsyncTriggerDevBackend(served.url, "k", first_wait_seconds=0.001) as backend:
        assert await backend.trigger("task", {"a": 1}) == "run_1"
        served.answers = []
        served.answer(422, {"error": "no"})
        with pytest.raises(EnqueueError):
            await backend.trigger("other", {"a": 1})
        served.answers = []
        served.answer(200, {"data": [{"id": "run_1"}], "pagination": {}})
        assert [run.id async for run in backend.list()] == ["run_1"]
    assert {record.name: record.state for record in records()} == {"task": "queued", "other": "rejected"}
