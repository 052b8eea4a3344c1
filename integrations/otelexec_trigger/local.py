"""
The embedded default: a `TriggerBackend` over the store itself, with nothing else to run but `otelexec trigger worker`.

For development and small loads: workers look for runs, and all of them share one queue. Beyond that Trigger.dev, Celery
or RQ run on engines of their own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from opentelemetry import context as otel_context

from otelexec.errors import StoreError, StoreRejected
from otelexec.publishing import Message, publish
from otelexec_trigger import engine, wire
from otelexec_trigger.asking import RunRequest
from otelexec_trigger.backend import AsyncTriggerBackend, Delay, Operations, Trigger, TriggerBackend
from otelexec_trigger.calls import Do, Steps, published
from otelexec_trigger.rendering import as_json, run_of
from otelexec_trigger.runs import EnqueueError, InvalidRequest, Run, RunNotFound
from otelexec_trigger.settings import SYSTEM

_PAGE: Final = 100


class LocalOperations(Operations):
    """What the local engine does."""

    def trigger(self, wanted: Trigger) -> Steps[str]:
        """Ask for a run; a key that has one needs no message."""
        options = options_of(wanted)
        payload, payload_type = encode(wanted.payload)
        if wanted.key is not None:
            held = yield Do(lambda: _held(wanted.task, options["idempotencyKey"]))
            if held is not None:
                run_id: str = held.run_id
                return run_id
        new_id = engine.new_run_id()

        def send(message: Message) -> Steps[str]:
            context = otel_context.get_current()
            # Who calls again after an unknown answer does so with the same execution, and gets the same run.
            request = RunRequest(wanted.task, payload, payload_type, options, request_key=message.correlation.execution_id)
            enqueued = yield Do(lambda: _enqueue(request, message, context, new_id))
            found: str = enqueued.run_id
            message.set_message_id(found)
            return found

        return (yield from published(_block(wanted), send))

    def batch_trigger(self, wanted: Sequence[Trigger]) -> Steps[str]:
        """Ask for several runs."""
        if not wanted:
            raise InvalidRequest("A batch has at least one item.")
        prepared = [(each, options_of(each), *encode(each.payload)) for each in wanted]
        batch_id, _ = yield Do(lambda: engine.create_batch(len(wanted), {}))
        for index, (each, options, payload, payload_type) in enumerate(prepared):
            request = RunRequest(each.task, payload, payload_type, options, batch_id=batch_id, batch_index=index)

            def send(message: Message, request: RunRequest = request) -> Steps[str]:
                context = otel_context.get_current()
                enqueued = yield Do(lambda: _enqueue(request, message, context, engine.new_run_id()))
                message.set_message_id(enqueued.run_id)
                return str(enqueued.run_id)

            yield from published(_block(each), send)
        return str(batch_id)

    def get(self, run_id: str) -> Steps[Run]:
        """Give a run."""
        found = yield Do(lambda: engine.find(run_id))
        if found is None:
            raise RunNotFound(f"There is no run {run_id}.", status=404)
        return run_of(as_json(found))

    def cancel(self, run_id: str) -> Steps[bool]:
        """Cancel a run."""
        try:
            yield Do(lambda: engine.cancel(run_id))
        except RunNotFound:
            return False
        return True

    def page(self, cursor: str | None, tasks: Sequence[str]) -> Steps[tuple[list[Run], str | None]]:
        """Give a page of runs; the cursor is the last one's place."""
        before = None if cursor is None else int(cursor)
        found = yield Do(lambda: engine.list_runs(limit=_PAGE, before=before, tasks=tasks))
        return [run_of(as_json(run, whole=False)) for run in found], str(found[-1].seq) if len(found) == _PAGE else None

    def replay(self, run_id: str) -> Steps[str]:
        """Ask for the same once more."""
        enqueued = yield Do(lambda: engine.replay(run_id))
        return str(enqueued.run_id)

    def reschedule(self, run_id: str, delay: Delay) -> Steps[Run]:
        """Give a delayed run another time."""
        text = wire.delay_text(delay)
        found = yield Do(lambda: engine.reschedule(run_id, text))
        return run_of(as_json(found))

    def add_tags(self, run_id: str, tags: str | Sequence[str]) -> Steps[None]:
        """Add tags to a run."""
        yield Do(lambda: engine.add_tags(run_id, tags))


def _held(task: str, key: str) -> Any:
    try:
        return engine.find_by_key(task, key)
    except StoreError as error:
        raise EnqueueError(f"The store did not answer: {error}", retryable=True) from error


def _block(wanted: Trigger) -> publish:
    return publish(wanted.task, destination=wanted.queue or wanted.task, system=SYSTEM, operation="trigger")


def _enqueue(request: RunRequest, message: Message, context: Any, run_id: str) -> Any:
    try:
        return engine.enqueue(request, message.correlation, context, run_id=run_id)
    except StoreRejected as error:
        raise EnqueueError(f"The store refused it: {error}", acceptance="rejected") from error
    except StoreError as error:
        # The commit may have got through: only a call with the same key is safe.
        message.acceptance_unknown()
        raise EnqueueError(f"The store did not answer: {error}", acceptance="unknown", retryable=True) from error


def options_of(wanted: Trigger) -> dict[str, Any]:
    """
    Give the options of a call as the wire contract has them.

    Args:
        wanted: The call.

    Raises:
        InvalidRequest: One is over a limit.
    """
    given: Any = wanted  # whatever the caller's types say
    if not isinstance(given.task, str) or not given.task:
        raise InvalidRequest("A run is of a task: give the task's id.")
    check_text(given.task, "a task's id")
    attempts = given.max_attempts
    if attempts is not None and (not isinstance(attempts, int) or isinstance(attempts, bool) or attempts < 1):
        raise InvalidRequest(f"max_attempts is a whole number, 1 or more, not {attempts!r}")
    if given.key is not None and (not isinstance(given.key, str) or not 0 < len(given.key) <= wire.MAX_KEY_CHARS):
        raise InvalidRequest(f"a key is text of 1 to {wire.MAX_KEY_CHARS} characters, not {str(given.key)[:32]!r}")
    if given.queue is not None and (not isinstance(given.queue, str) or not given.queue):
        raise InvalidRequest(f"a queue has a name, not {given.queue!r}")
    if given.concurrency_key is not None and not isinstance(given.concurrency_key, str | int | float):
        raise InvalidRequest(f"a concurrency key is text or a number, not {given.concurrency_key!r}")
    if wanted.metadata is not None and len(json_text(wanted.metadata, "metadata").encode()) > wire.MAX_METADATA_BYTES:
        raise InvalidRequest(f"metadata has at most {wire.MAX_METADATA_BYTES} bytes of JSON")
    options = {
        "idempotencyKey": None if wanted.key is None else wire.idempotency_hash(wanted.key),
        "tags": wire.checked_tags(wanted.tags) or None,
        "delay": None if wanted.delay is None else wire.delay_text(wanted.delay),
        "ttl": None if wanted.ttl is None else wire.duration_text(wanted.ttl),
        "metadata": wanted.metadata,
        "queue": None if wanted.queue is None else {"name": wanted.queue},
        "concurrencyKey": wanted.concurrency_key,
        "maxAttempts": wanted.max_attempts,
    }
    return {name: value for name, value in options.items() if value is not None}


def encode(payload: Any) -> tuple[str | None, str]:
    """
    Give the text of a payload and its media type.

    Args:
        payload: Text, None, or anything that JSON can hold.

    Raises:
        InvalidRequest: JSON can't hold it, or it is too large.
    """
    if payload is None or isinstance(payload, str):
        text, kind = payload, wire.TEXT if isinstance(payload, str) else wire.JSON
    else:
        text, kind = json_text(payload, "the payload"), wire.JSON
    if text is not None and check_text(text, "a payload that is text") > wire.MAX_BODY_BYTES:
        raise InvalidRequest(f"a payload has at most {wire.MAX_BODY_BYTES} bytes")
    return text, kind


def check_text(text: str, what: str) -> int:
    """
    Give how many bytes a text has.

    Args:
        text: It.
        what: Names it in the error.

    Raises:
        InvalidRequest: UTF-8 can't hold it.
    """
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{what} must be text that UTF-8 can hold: {error}") from None


def json_text(value: Any, what: str) -> str:
    """Give the JSON text of a value; `what` names it in the error."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what} can't be written as JSON: {error}") from None


class LocalBackend(TriggerBackend):
    """
    The local engine: runs in this process's store (`OTELEXEC_STORE`), which `otelexec trigger worker` attempts.

    It needs no configuration, and no connection but the store's.
    """

    def __init__(self) -> None:
        super().__init__(LocalOperations())


class AsyncLocalBackend(AsyncTriggerBackend):
    """The same, with `await`."""

    def __init__(self) -> None:
        super().__init__(LocalOperations())
