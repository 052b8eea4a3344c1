"""What every `TriggerBackend` promises: the local one, the Trigger.dev client against `otelexec trigger serve`, and both with await."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextvars import copy_context
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from otelexec_trigger import (
    AsyncLocalBackend,
    AsyncTriggerDevBackend,
    EnqueueError,
    InvalidRequest,
    LocalBackend,
    Run,
    RunNotFound,
    TriggerDevBackend,
    TriggerError,
)

import otelexec
from otelexec import semconv
from tests.integrations.trigger.stage import Stage
from tests.records import until

MISSING = "run_" + "0" * 25


class Awaited:
    """An asynchronous backend, called synchronously."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._runner = asyncio.Runner()
        self._backend = self._runner.run(self._call(make))

    async def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        value = function(*args, **kwargs)
        if inspect.isasyncgen(value):
            return [item async for item in value]
        return await value if inspect.isawaitable(value) else value

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._backend, name)
        # In the caller's context, as an awaiting caller's would be.
        return lambda *args, **kwargs: self._runner.run(self._call(method, *args, **kwargs), context=copy_context())

    def close(self) -> None:
        self._runner.run(self._backend.close())
        self._runner.close()


@pytest.fixture(params=["local", "local, async", "trigger.dev", "trigger.dev, async"])
def backend(request: pytest.FixtureRequest, common: Stage, url: str) -> Iterator[Any]:
    makers: dict[str, Callable[[], Any]] = {
        "local": LocalBackend,
        "local, async": lambda: Awaited(AsyncLocalBackend),
        "trigger.dev": lambda: TriggerDevBackend(url),
        "trigger.dev, async": lambda: Awaited(lambda: AsyncTriggerDevBackend(url)),
    }
    made = makers[request.param]()
    yield made
    made.close()


def ended(backend: Any, run_id: str, seconds: float = 25) -> Run:
    until(lambda: backend.get(run_id).has_ended, seconds)
    run: Run = backend.get(run_id)
    return run


def test_a_triggered_task_runs_with_its_payload(common: Stage, backend: Any) -> None:
    for payload in ({"order": 42, "when": "now"}, [1, 2.5, None], "text, as it is", 7, None):
        run = ended(backend, backend.trigger("echo", payload))
        assert (run.state, run.output, run.error, run.attempts) == ("succeeded", payload, None, 1)
    assert ended(backend, backend.trigger("kind", "text")).output == "str"
    assert ended(backend, backend.trigger("kind")).output == "NoneType"
    assert run.task == "echo"
    assert run.started_at is not None
    assert run.finished_at is not None


def test_what_can_be_awaited_is(backend: Any) -> None:
    for name in ("later", "passed on"):
        assert ended(backend, backend.trigger(name, 7)).output == 7


def test_every_run_is_an_execution_from_the_call_to_the_task(common: Stage, backend: Any) -> None:
    with otelexec.correlate(source="webhook", webhook_id="w-1", attributes={"shop": "one"}) as correlation:
        run_id = backend.trigger("who", {})
    told = ended(backend, run_id).output
    assert (told["id"], told["request"], told["attempt"]) == (correlation.execution_id, correlation.request_id, 1)
    assert told["fields"] == {"webhook_id": "w-1", "shop": "one", "run_id": run_id}
    seen = common.ended(run_id, "succeeded")
    assert seen.record.execution_id == correlation.execution_id
    assert seen.record.name == "who"
    (producer,) = seen.producers
    assert seen.consumer().parent_span_id == producer.span_id
    assert seen.consumer().trace_id == producer.trace_id
    assert producer.attributes[semconv.MESSAGING_OPERATION_NAME] == "trigger"


def test_a_failing_task_has_its_attempts_and_its_error(common: Stage, backend: Any) -> None:
    run_id = backend.trigger("fail", {}, max_attempts=2)
    run = ended(backend, run_id)
    assert (run.state, run.attempts) == ("failed", 2)
    assert run.error is not None
    assert (run.error["name"], run.error["message"]) == ("LookupError", "no such thing")
    seen = common.ended(run_id, "failed", "failed")
    assert [attempt.classification for attempt in seen.attempts] == ["retry", None]
    assert seen.record.state == "failed"


def test_a_failure_is_retried(common: Stage, backend: Any) -> None:
    run_id = backend.trigger("flaky", common.mark())
    run = ended(backend, run_id)
    assert (run.state, run.output, run.attempts) == ("succeeded", "the second time", 2)
    seen = common.ended(run_id, "failed", "succeeded")
    first, second = seen.attempts
    between = (second.started_unix_ns - (first.ended_unix_ns or 0)) / 1e9
    assert between < 3
    # Neither the first attempt nor the second between the two is time that it waited for a worker.
    assert seen.consumer(2).attributes[semconv.QUEUE_LATENCY] < between - 0.99


def test_a_timeout_of_somebody_elses_is_a_failure_that_is_retried(common: Stage, backend: Any) -> None:
    run = ended(backend, backend.trigger("slow server", common.mark()))
    assert (run.state, run.output, run.attempts) == ("succeeded", "the second time", 2)


def test_a_process_that_a_task_starts_finds_nothing_to_read(backend: Any) -> None:
    assert ended(backend, backend.trigger("reads")).output == ""


def test_a_core_takes_the_runs_attempt_over(common: Stage, backend: Any) -> None:
    run_id = backend.trigger("cored", 21)
    assert ended(backend, run_id).output == {"twice": 42}
    seen = common.ended(run_id)
    assert seen.record.name == "the.core"
    assert (seen.record.state, seen.attempt.outer_outcome) == ("succeeded", "succeeded")


def test_a_run_goes_on_until_the_code_around_its_core_has_ended(common: Stage, backend: Any) -> None:
    payload = {"mark": common.mark(), "go": common.mark()}
    run_id = backend.trigger("cored, and more", payload)
    common.wait_for_run(payload["mark"])
    run = backend.get(run_id)
    assert (run.state, run.output, run.finished_at) == ("running", None, None)
    Path(payload["go"]).touch()
    run = ended(backend, run_id)
    assert (run.state, run.output) == ("succeeded", "more")
    common.ended(run_id)


def test_a_key_asks_for_one_run(common: Stage, backend: Any) -> None:
    key = common.mark()
    first = backend.trigger("echo", {"n": 1}, key=key)
    assert backend.trigger("echo", {"n": 2}, key=key) == first
    assert ended(backend, first).output == {"n": 1}
    assert backend.trigger("echo", {"n": 3}, key=key) == first, "a run that succeeded keeps its key"
    assert backend.trigger("kind", {"n": 3}, key=key) != first, "another task's key is another one"


def test_a_failed_run_frees_its_key(common: Stage, backend: Any) -> None:
    key = common.mark()
    first = backend.trigger("fail", {}, key=key, max_attempts=1)
    assert ended(backend, first).state == "failed"
    second = backend.trigger("fail", {}, key=key, max_attempts=1)
    assert second != first
    assert ended(backend, second).state == "failed"


def test_equal_payloads_are_two_runs(common: Stage, backend: Any) -> None:
    runs = [backend.trigger("who", {"same": True}) for _ in range(3)]
    assert len({ended(backend, run).output["id"] for run in runs}) == 3


def test_a_delayed_run_waits_and_can_be_rescheduled(common: Stage, backend: Any) -> None:
    run_id = backend.trigger("echo", 1, delay="2h30m")
    run = backend.get(run_id)
    assert (run.state, (run.raw or {})["status"]) == ("pending", "DELAYED")
    assert backend.reschedule(run_id, datetime.now(UTC) + timedelta(hours=1)).state == "pending"
    backend.reschedule(run_id, 1)
    assert ended(backend, run_id).state == "succeeded"
    with pytest.raises(TriggerError):
        backend.reschedule(run_id, "1h")


def test_a_run_that_nobody_begins_in_time_expires(common: Stage, backend: Any) -> None:
    run_id = backend.trigger("nobody knows it", 1, ttl=1)
    run = ended(backend, run_id)
    assert run.state == "expired"
    assert run.finished_at is not None
    seen = common.ended(run_id, "cancelled")
    assert (seen.record.state, seen.attempt.classification) == ("cancelled", "expired")


def test_cancelling_a_waiting_run(common: Stage, backend: Any) -> None:
    run_id = backend.trigger("echo", 1, delay="1h")
    assert backend.cancel(run_id) is True
    run = ended(backend, run_id)
    assert run.state == "cancelled"
    assert run.finished_at is not None
    assert run.duration_ms >= 0
    assert common.ended(run_id, "cancelled").record.state == "cancelled"
    assert backend.cancel(run_id) is True
    assert backend.get(run_id).state == "cancelled"


def test_cancelling_a_running_task_counts_although_it_returns(common: Stage, backend: Any) -> None:
    mark = common.mark()
    run_id = backend.trigger("heeds", mark)
    common.wait_for_run(mark)
    assert backend.get(run_id).state == "running"
    assert backend.cancel(run_id) is True
    run = ended(backend, run_id)
    assert (run.state, run.output) == ("cancelled", None)
    assert run.duration_ms > 0
    assert common.ended(run_id, "cancelled").record.state == "cancelled"


@pytest.mark.parametrize("exits", [True, False])
def test_a_task_that_gives_up_when_it_is_cancelled_is_cancelled(common: Stage, exits: bool) -> None:
    backend, mark = LocalBackend(), common.mark()
    run_id = backend.trigger("gives up", {"mark": mark, "exits": exits})
    common.wait_for_run(mark)
    backend.cancel(run_id)
    assert ended(backend, run_id).state == "cancelled"
    attempt = common.ended(run_id, "cancelled").attempt
    assert (attempt.classification, attempt.error_type) == (None, "SystemExit" if exits else "RuntimeError")


@pytest.mark.parametrize(
    ("task", "error"),
    [("waits for a cancelled one", "CancelledError"), ("interrupts", "KeyboardInterrupt"), ("is closed", "GeneratorExit")],
)
def test_a_run_that_nobody_cancelled_has_failed_and_is_retried(common: Stage, task: str, error: str) -> None:
    backend = LocalBackend()
    run_id = backend.trigger(task, max_attempts=2)
    run = ended(backend, run_id)
    assert run.error is not None
    assert (run.state, run.attempts, run.error["name"]) == ("failed", 2, error)
    seen = common.ended(run_id, "failed", "failed")
    assert [attempt.classification for attempt in seen.attempts] == ["retry", None]


def test_a_run_that_a_signal_ended_is_retried_and_has_failed_in_the_end(common: Stage) -> None:
    backend = LocalBackend()
    run_id = backend.trigger("exits on a signal", max_attempts=2)
    assert ended(backend, run_id).state == "failed"
    seen = common.ended(run_id, "cancelled", "failed")
    assert [attempt.classification for attempt in seen.attempts] == ["interrupted"] * 2


def test_a_missing_run_is_quiet_to_cancel_and_loud_to_ask_for(backend: Any) -> None:
    assert backend.cancel(MISSING) is False
    for ask in (backend.get, backend.replay, lambda run: backend.reschedule(run, "1h"), lambda run: backend.add_tags(run, "x")):
        with pytest.raises(RunNotFound):
            ask(MISSING)


def test_a_replay_is_an_execution_of_its_own_for_the_same_request(common: Stage, backend: Any) -> None:
    first = backend.trigger("who", {"a": 1})
    before = ended(backend, first).output
    second = backend.replay(first)
    after = ended(backend, second).output
    assert second != first
    assert after["id"] != before["id"]
    assert after["request"] == before["request"]
    assert after["fields"]["run_id"] == second
    assert common.ended(first, "succeeded").record.state == "succeeded"


def test_tags_are_added_up_to_ten(common: Stage, backend: Any) -> None:
    run_id = backend.trigger("echo", 1, delay="1h", tags=["user_1", "org:2"])
    assert backend.get(run_id).tags[:2] == ("user_1", "org:2")
    backend.add_tags(run_id, ["more", "user_1"])
    tags = backend.get(run_id).tags
    assert {"user_1", "org:2", "more"} <= set(tags)
    with pytest.raises(TriggerError):
        backend.add_tags(run_id, [f"t{number}" for number in range(10)])
    assert backend.get(run_id).tags == tags
    with pytest.raises(InvalidRequest, match="128"):
        backend.trigger("echo", 1, tags="x" * 129)
    with pytest.raises(InvalidRequest, match="10"):
        backend.trigger("echo", 1, tags=[str(number) for number in range(11)])
    backend.cancel(run_id)


def test_metadata_is_kept(backend: Any) -> None:
    run_id = backend.trigger("echo", 1, delay="1h", metadata={"a": {"b": [1]}})
    metadata = backend.get(run_id).metadata
    assert metadata["a"] == {"b": [1]}
    with pytest.raises(InvalidRequest, match="metadata"):
        backend.trigger("echo", 1, metadata={"a": "x" * 300_000})
    backend.cancel(run_id)


def test_a_batch_is_one_run_for_each_item(common: Stage, backend: Any) -> None:
    batch = backend.batch_trigger([{"task": "echo", "payload": {"n": number}, "tags": [f"n{number}"]} for number in range(5)])
    assert batch.startswith("batch_")
    runs = [run for run in backend.list(tasks=["echo"]) if (run.raw or {}).get("batchId") == batch]
    assert len(runs) == 5
    assert sorted(ended(backend, run.id).output["n"] for run in runs) == list(range(5))
    for run in runs:
        seen = common.ended(run.id, "succeeded")
        assert seen.consumer().trace_id == seen.record.producer_trace_id


def test_every_run_is_in_the_list_once(common: Stage, backend: Any) -> None:
    made = [backend.trigger("listed", number, delay="1h", queue="q") for number in range(3)]
    found = [run.id for run in backend.list(tasks=["listed"])]
    assert found[:3] == made[::-1]
    assert len(found) == len(set(found))
    for run in made:
        backend.cancel(run)


def test_runs_of_one_concurrency_key_do_not_run_at_the_same_time(common: Stage, backend: Any) -> None:
    payload = {"mark": common.mark(), "held": common.mark()}
    runs = [backend.trigger("alone", payload, queue="q", concurrency_key="k") for _ in range(4)]
    assert [ended(backend, run).output for run in runs] == [True] * 4


@pytest.mark.parametrize("bad", [{"delay": "soon"}, {"ttl": "-1"}, {"max_attempts": 0}, {"key": "k" * 2049}])
def test_what_is_over_a_limit_is_refused_before_anything_is_sent(common: Stage, backend: Any, bad: dict[str, Any]) -> None:
    before = len(common.records())
    with pytest.raises(InvalidRequest) as caught:
        backend.trigger("echo", {}, **bad)
    assert caught.value.acceptance == "rejected"
    assert isinstance(caught.value, EnqueueError)
    assert len(common.records()) == before


def test_an_item_of_a_batch_that_is_none_is_refused(common: Stage, backend: Any) -> None:
    before = len(common.records())
    for items in ([], [{"payload": 1}], [{"task": "echo", "tag": "x"}], [{"task": "echo"}, {"task": "echo", "delay": "soon"}]):
        with pytest.raises(InvalidRequest):
            backend.batch_trigger(items)
    assert len(common.records()) == before


def test_a_payload_that_is_no_json_is_refused(backend: Any) -> None:
    with pytest.raises(InvalidRequest, match="JSON"):
        backend.trigger("echo", {"a": object()})


def test_a_large_payload_gets_there(common: Stage, backend: Any) -> None:
    text = "ü" * 200_000
    assert ended(backend, backend.trigger("echo", {"text": text})).output == {"text": text}
