"""Deliveries: verified first, run once, answered so that the backend delivers again exactly when it should."""

from __future__ import annotations

import asyncio
import functools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from otelexec_trigger import PermanentFailure, QStash, Receiver, Reply, StandardWebhooks, TimestampedHmac, TriggerDevAlert
from otelexec_trigger.verifiers import Verifier

import otelexec
from otelexec import semconv
from otelexec.store.records import ExecutionRecord
from tests.integrations.stage import ROOT
from tests.integrations.trigger.signing import (
    BODY,
    SECRET,
    URL,
    clock,
    pushed,
    signed_alert,
    signed_by_time,
    standard,
)
from tests.records import Records, until


class Hook:
    """An executor that counts its calls, and does what it is told."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.raises: BaseException | None = None

    def __call__(self, payload: Any) -> str:
        self.calls.append(payload)
        if self.raises is not None:
            raise self.raises
        return "done"


@pytest.fixture
def hook() -> Hook:
    return Hook()


@pytest.fixture
def path(isolated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("OTELEXEC_STORE", f"sqlite:///{tmp_path / 'hooks.db'}")
    monkeypatch.setenv("OTELEXEC_RELAY", "false")
    yield tmp_path / "hooks.db"
    otelexec.shutdown()


def records(path: Path) -> list[ExecutionRecord]:
    if not path.exists():
        return []
    found = Records(path)
    try:
        return found.all()
    finally:
        found.close()


def receiver(hook: Any, verifier: Verifier | None = None, **options: Any) -> Receiver:
    return Receiver(hook, verifier=verifier or StandardWebhooks(SECRET, clock=clock), name="hook", **options)


def test_a_delivery_is_an_execution_with_its_record_and_span(path: Path, hook: Hook) -> None:
    headers = standard(BODY) | {
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "baggage": "otelexec.execution_id=stolen,otelexec.request_id=stolen,tenant=one",
    }
    assert receiver(hook).deliver(headers, BODY).status == 200
    assert hook.calls == [{"id": "alert-1", "n": 1}]
    (record,) = records(path)
    assert (record.name, record.state, record.source) == ("hook", "succeeded", "webhook")
    assert json.loads(record.correlation) == {"webhook_id": "msg_2", "provider": "standard-webhooks", "messaging.message.id": "msg_2"}
    assert "stolen" not in (record.execution_id, record.request_id)
    (span,) = Records(path).spans()
    assert span.kind == "consumer"
    assert span.parent_span_id in (None, "")
    assert [link.trace_id for link in span.links] == ["0af7651916cd43dd8448eb211c80319c"]
    assert span.attributes[semconv.MESSAGING_MESSAGE_ID] == "msg_2"


def test_a_redelivery_after_success_is_recorded_and_does_not_run(path: Path, hook: Hook) -> None:
    made = receiver(hook)
    assert [made.deliver(standard(BODY), BODY).status for _ in range(3)] == [200, 200, 200]
    assert len(hook.calls) == 1
    otelexec.shutdown()  # as a restart
    assert receiver(hook).deliver(standard(BODY, at=1_790_000_100), BODY).status == 200
    assert len(hook.calls) == 1
    (record,) = records(path)
    assert record.state == "succeeded"
    assert [(attempt.state, attempt.duplicate, attempt.classification) for attempt in record.attempts] == [
        ("succeeded", False, None),
        *[("cancelled", True, "duplicate")] * 3,
    ]
    otelexec.shutdown()
    Records(path).check_agreement()


def test_a_failure_is_answered_with_a_5xx_and_its_redelivery_is_the_next_attempt(path: Path, hook: Hook) -> None:
    hook.raises = ValueError("not now")
    made = receiver(hook)
    assert made.deliver(standard(BODY), BODY).status == 500
    hook.raises = None
    assert made.deliver(standard(BODY), BODY).status == 200
    (record,) = records(path)
    assert [attempt.state for attempt in record.attempts] == ["failed", "succeeded"]
    assert record.state == "succeeded"


def test_a_permanent_failure_is_not_to_come_again(path: Path, hook: Hook) -> None:
    hook.raises = PermanentFailure("no such order")
    reply = receiver(hook).deliver(standard(BODY), BODY)
    assert (reply.status, json.loads(reply.body)) == (422, {"error": "no such order"})
    (record,) = records(path)
    assert record.state == "failed"


def test_a_permanent_failure_without_a_text_is_answered_as_well(path: Path, hook: Hook) -> None:
    class OfNoText(PermanentFailure):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    hook.raises = OfNoText()
    reply = receiver(hook).deliver(standard(BODY), BODY)
    assert (reply.status, json.loads(reply.body)) == (422, {"error": "<its text could not be made: RuntimeError>"})


def test_one_that_comes_while_the_first_runs_is_to_come_again(path: Path) -> None:
    entered, leave = threading.Event(), threading.Event()
    calls: list[Any] = []

    def slow(payload: Any) -> None:
        calls.append(payload)
        entered.set()
        assert leave.wait(30)

    made = receiver(slow)
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(made.deliver(standard(BODY), BODY)))
    thread.start()
    assert entered.wait(30)
    busy = made.deliver(standard(BODY), BODY)
    assert busy.status == 409
    assert int(busy.headers["retry-after"]) > 0
    leave.set()
    thread.join(30)
    assert [reply.status for reply in replies] == [200]
    assert made.deliver(standard(BODY), BODY).status == 200
    assert len(calls) == 1
    (record,) = records(path)
    assert [attempt.duplicate for attempt in record.attempts] == [False, True]


KILLED = """
import sys, time
sys.path[:0] = ["integrations"]
from otelexec_trigger import Receiver, StandardWebhooks
from tests.integrations.trigger.signing import BODY, SECRET, clock, standard

def hang(payload):
    print("running", flush=True)
    time.sleep(600)

Receiver(hang, verifier=StandardWebhooks(SECRET, clock=clock), name="hook").deliver(standard(BODY), BODY)
"""


def test_a_delivery_whose_process_was_killed_runs_again(path: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTELEXEC_RECONCILE", "true")
    with subprocess.Popen([sys.executable, "-c", KILLED], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        process.kill()
    made = receiver(hook)
    assert made.deliver(standard(BODY), BODY).status == 409  # nobody has noticed, and this process has had nothing else to do yet
    until(lambda: made.deliver(standard(BODY), BODY).status == 200, 30)
    assert len(hook.calls) == 1
    (record,) = records(path)
    assert [attempt.state for attempt in record.attempts] == ["lost", "succeeded"]


@pytest.mark.parametrize(("code", "status", "state"), [(3, 500, "failed"), (0, 200, "succeeded")])
async def test_an_executor_that_exits_does_not_end_the_server(path: Path, hook: Hook, code: int, status: int, state: str) -> None:
    hook.raises = SystemExit(code)

    async def executor(payload: Any) -> None:
        hook(payload)

    for number, function in enumerate((hook, executor)):
        assert (await receiver(function).deliver_async(standard(BODY, message=f"m{number}"), BODY)).status == status
    assert [record.state for record in records(path)] == [state, state]


async def cancel_itself(payload: Any) -> None:
    otelexec.request_cancel(str(otelexec.current_execution().id), terminate=True)
    await asyncio.sleep(30)


async def test_what_is_cancelled_while_it_runs_is_not_to_come_again(path: Path) -> None:
    made = receiver(cancel_itself)
    assert (await made.deliver_async(standard(BODY), BODY)).status == 200
    assert (await asyncio.to_thread(made.deliver, standard(BODY, message="m"), BODY)).status == 200
    assert [record.state for record in records(path)] == ["cancelled", "cancelled"]


async def test_what_the_server_cancels_is_to_come_again(path: Path) -> None:
    began, leave = asyncio.Event(), asyncio.Event()

    async def executor(payload: Any) -> None:
        began.set()
        await leave.wait()

    made = receiver(executor)
    request = asyncio.create_task(made.deliver_async(standard(BODY), BODY))
    await began.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    leave.set()
    assert (await made.deliver_async(standard(BODY), BODY)).status == 200
    assert [attempt.state for attempt in records(path)[0].attempts] == ["cancelled", "succeeded"]


def test_the_cancellation_of_another_execution_is_a_failure(path: Path, hook: Hook) -> None:
    hook.raises = otelexec.ExecutionCancelled("another", execution_id="another")
    assert receiver(hook).deliver(standard(BODY), BODY).status == 500


def test_forged_and_stale_deliveries_leave_nothing(path: Path, hook: Hook) -> None:
    made = receiver(hook)
    for headers, body in ((standard(BODY), BODY + b"x"), ({}, BODY), (standard(BODY, at=1), BODY), (None, b"")):
        assert made.deliver(headers, body).status == 401
    assert not hook.calls
    assert not records(path)


def test_a_byte_equal_replay_does_not_run_and_a_delivery_signed_anew_does(path: Path, hook: Hook) -> None:
    made = receiver(hook, TimestampedHmac("secret", clock=clock))
    assert made.deliver(signed_by_time(BODY), BODY).status == 200
    assert made.deliver(signed_by_time(BODY), BODY).status == 200
    assert made.deliver(signed_by_time(BODY, at=clock() + 1), BODY).status == 200
    assert len(hook.calls) == 2
    assert len(records(path)) == 2


def test_one_token_never_serves_two_message_ids(path: Path, hook: Hook) -> None:
    made = receiver(hook, QStash(["current"], url=URL, clock=clock))
    assert made.deliver(pushed(BODY), BODY).status == 200
    assert made.deliver(pushed(BODY, None), BODY).status == 401
    assert made.deliver(pushed(BODY, "msg_other"), BODY).status == 401
    otelexec.shutdown()
    assert made.deliver(pushed(BODY, "msg_other"), BODY).status == 401
    assert made.deliver(pushed(BODY), BODY).status == 200
    assert made.deliver(pushed(BODY, "msg_other", jti="jwt_2"), BODY).status == 200
    assert len(hook.calls) == 2


def test_an_alert_is_named_by_the_id_in_its_body(path: Path, hook: Hook) -> None:
    made = receiver(hook, TriggerDevAlert("key"))
    changed = BODY.replace(b'"n": 1', b'"n": 2')
    assert [made.deliver(signed_alert(body), body).status for body in (BODY, changed)] == [200, 200]
    assert len(hook.calls) == 1


def test_identity_names_deliveries_as_it_is_told(path: Path, hook: Hook) -> None:
    made = receiver(hook, TimestampedHmac("secret", clock=clock), identity=lambda _, body: json.loads(body)["id"])
    for second in range(2):
        assert made.deliver(signed_by_time(BODY, at=clock() + second), BODY).status == 200
    assert len(hook.calls) == 1
    assert made.deliver(signed_by_time(b"[]"), b"[]").status == 400


def test_a_delivery_that_identity_has_no_name_for_is_named_by_its_verifier(path: Path, hook: Hook) -> None:
    made = receiver(hook, identity=lambda headers, _: headers.get("X-Job"))
    for message, job in (("m1", {}), ("m2", {}), ("m3", {"x-job": "j"}), ("m4", {"X-JOB": "j"})):
        assert made.deliver(standard(BODY, message=message) | job, BODY).status == 200
    assert [json.loads(record.correlation)["webhook_id"] for record in records(path)] == ["m1", "m2", "j"]
    assert len(hook.calls) == 3


def test_two_receivers_may_get_a_message_each_under_one_id(path: Path, hook: Hook) -> None:
    verifier = StandardWebhooks(SECRET, clock=clock)
    for name in ("one", "two"):
        assert Receiver(hook, verifier=verifier, name=name).deliver(standard(BODY), BODY).status == 200
    assert len(hook.calls) == 2


def test_a_cancelled_delivery_is_not_to_come_again(path: Path, hook: Hook) -> None:
    hook.raises = ValueError("not now")
    made = receiver(hook)
    made.deliver(standard(BODY), BODY)
    (record,) = records(path)
    otelexec.request_cancel(record.execution_id)
    assert made.deliver(standard(BODY), BODY).status == 200
    assert len(hook.calls) == 1


def test_without_a_store_it_verifies_and_runs(path: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTELEXEC_STORE", "none")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")  # no exporter's retries, which go on beside the tests that follow
    made = receiver(hook)
    assert made.deliver(standard(BODY), BODY).status == 200
    assert made.deliver({}, BODY).status == 401
    assert len(hook.calls) == 1


def test_a_store_that_is_away_is_told(isolated: None, hook: Hook, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("OTELEXEC_STORE", f"sqlite:///{tmp_path}/file/x.db")
    monkeypatch.setenv("OTELEXEC_OPEN_TIMEOUT_SECONDS", "0.2")
    monkeypatch.setenv("OTELEXEC_SPOOL", str(tmp_path / "spool"))
    assert receiver(hook).deliver(standard(BODY), BODY).status == 503
    assert not hook.calls
    otelexec.shutdown()


@pytest.mark.parametrize("body", [b"plain text", b"\xff\xfe", b"[1, 2]", b""])
def test_bodies_that_are_no_object_get_there(path: Path, hook: Hook, body: bytes) -> None:
    made = receiver(hook, TriggerDevAlert("key"))
    assert made.deliver(signed_alert(body), body).status == 200
    assert hook.calls == [{b"plain text": "plain text", b"\xff\xfe": b"\xff\xfe", b"[1, 2]": [1, 2], b"": ""}[body]]


NAMES = st.sampled_from(["webhook-id", "Webhook-Timestamp", "webhook-signature", "content-length", "traceparent", "baggage"])
ODD = st.sampled_from("aZ019 .,=&-_+/%{}[]\0\n\x7f\xa0\xe9\u2028\ud800\udc80\U0001f600")
ANY = st.text(ODD, max_size=30) | st.binary(max_size=30)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    headers=st.lists(st.tuples(NAMES | ANY, ANY), max_size=6) | st.none() | st.integers(),
    body=st.binary(max_size=50) | st.text(ODD) | st.none() | st.lists(st.integers()),
)
def test_nothing_unsigned_gets_anywhere(path: Path, hook: Hook, headers: Any, body: Any) -> None:
    reply = receiver(hook).deliver(headers, body)
    assert 400 <= reply.status < 500
    assert not hook.calls
    assert not path.exists()


class Asynchronous:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def __call__(self, payload: Any, *_: Any) -> None:
        await asyncio.sleep(0)
        self.calls.append(payload)


def wrapped(executor: Any) -> Any:
    def call(payload: Any) -> Any:
        return executor(payload)

    return call


@pytest.mark.parametrize("wrap", [lambda executor: executor, wrapped, functools.partial])
@pytest.mark.parametrize("how", ["plain", "in a loop", "awaited"])
async def test_what_can_be_awaited_is(path: Path, wrap: Any, how: str) -> None:
    executor = Asynchronous()
    made = Receiver(wrap(executor), verifier=StandardWebhooks(SECRET, clock=clock))
    if how == "plain":
        reply = await asyncio.to_thread(made.deliver, standard(BODY), BODY)
    elif how == "in a loop":
        reply = made.deliver(standard(BODY), BODY)
    else:
        reply = await made.deliver_async(standard(BODY), BODY)
    assert (reply.status, len(executor.calls)) == (200, 1)
    assert records(path)[0].state == "succeeded"


# --- ASGI --------------------------------------------------------------------------------------------------------


async def serve(app: Any, headers: dict[str, str], chunks: list[bytes], *, method: str = "POST", gone: bool = False) -> tuple[Any, int]:
    """Serve one request; gives the status (None without an answer), and how many of its messages were read."""
    messages = [{"type": "http.request", "body": chunk, "more_body": index < len(chunks) - 1} for index, chunk in enumerate(chunks)]
    if gone:
        messages = [*messages[:-1], {"type": "http.disconnect"}]
    read = 0
    sent: list[Any] = []

    async def receive() -> Any:
        nonlocal read
        read += 1
        return messages[read - 1]

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await app({"type": "http", "method": method, "path": "/", "headers": raw}, receive, send)
    return (sent[0]["status"] if sent else None), read


async def test_the_application_takes_a_delivery_in_pieces(path: Path, hook: Hook) -> None:
    app = receiver(hook)
    assert await serve(app, standard(BODY), [BODY[:5], BODY[5:]]) == (200, 2)
    assert await serve(app, {}, [BODY]) == (401, 1)
    assert len(hook.calls) == 1


async def test_a_coroutine_runs_in_the_loop(path: Path) -> None:
    loops: list[Any] = []

    async def executor(payload: Any) -> None:
        loops.append(asyncio.get_running_loop())
        if payload["n"] != 1:
            raise ValueError

    app = receiver(executor)
    assert await serve(app, standard(BODY), [BODY]) == (200, 1)
    assert loops == [asyncio.get_running_loop()]
    other = BODY.replace(b'"n": 1', b'"n": 2')
    assert await serve(app, standard(other, message="m"), [other]) == (500, 1)
    assert [record.state for record in records(path)] == ["succeeded", "failed"]


async def test_what_is_too_large_is_not_read_to_its_end(path: Path, hook: Hook) -> None:
    app = receiver(hook, max_body_bytes=100)
    assert await serve(app, {"content-length": "101"}, [b"x" * 101]) == (413, 0)
    assert await serve(app, {"content-length": "9" * 5000}, [b"x"]) == (413, 0)
    assert await serve(app, {}, [b"x" * 60] * 10) == (413, 2)
    assert app.deliver({}, b"x" * 101).status == 413
    assert not hook.calls


@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD", "DELETE", "OPTIONS"])
async def test_a_delivery_is_a_post(path: Path, hook: Hook, method: str) -> None:
    assert await serve(receiver(hook), standard(BODY), [BODY], method=method) == (405, 0)


async def test_a_client_that_is_gone_has_delivered_nothing(path: Path, hook: Hook) -> None:
    assert await serve(receiver(hook), standard(BODY), [BODY, b""], gone=True) == (None, 2)
    assert not hook.calls
