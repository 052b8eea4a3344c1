"""
The embedded default: a `TriggerBackend` over the store itself, with nothing else to run but `otelexec trigger worker`.

For development and small loads: workers look for runs, and all of them share one queue. Beyond that Trigger.dev, Celery
or RQ run on engines of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from opentelemetry import context as otel_context

from otelexec.errors import StoreError, StoreRejected
from otelexec.publishing import Message, publish
from otelexec_trigger import engine, wire
from otelexec_trigger.asking import RunRequest
from otelexec_trigger.backend import AsyncTriggerBackend, Delay, Operations, Trigger, TriggerBackend
from otelexec_trigger.calls import Do, Steps, published
from otelexec_trigger.encoding import encode, options_of
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
