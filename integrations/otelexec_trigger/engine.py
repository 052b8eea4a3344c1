"""
The local engine: runs in the store, asked for, found, changed and told about.

The embedded default for development and small loads. What is called here commits before it returns; the running is done
by `worker.py`. `local.py` offers it as a `TriggerBackend`, `serve.py` over the Trigger.dev wire contract.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from opentelemetry import trace
from opentelemetry.context import Context

from otelexec import request_cancel
from otelexec import runtime as _runtime
from otelexec.carrier import Carrier, read_headers
from otelexec.correlation import Correlation
from otelexec.errors import SettingsError, StoreUnavailable
from otelexec.ids import mint_id
from otelexec.lifecycle import execution_row
from otelexec.propagation import entries, incoming
from otelexec.store import run_queries
from otelexec.store.base import Store
from otelexec.store.rows import CANCELLED, FAILED, LOST, PAUSED, QUEUED, RETRYING, RUNNING, SUCCEEDED, TIMED_OUT
from otelexec.store.runs import (
    EXPIRED,
    AddTags,
    BatchRecord,
    CreateBatch,
    Enqueued,
    EnqueueRun,
    RescheduleRun,
    ResetKey,
    RunKey,
    RunRecord,
    RunRow,
    RunWrite,
    SetRunMetadata,
)
from otelexec.store.schema import Transaction
from otelexec.w3c import decode_trace
from otelexec_trigger import wire
from otelexec_trigger.asking import NANOSECONDS, RunRequest, checked_delay, key_name, keys_of, metadata_text, row_of
from otelexec_trigger.carried import received
from otelexec_trigger.runs import InvalidRequest, RunNotFound

RUN_ID: Final = "run_id"
"""The correlation field that names the run on its record, its spans and in its baggage."""

_PATIENCE_SECONDS: Final = 5.0
_ID_CHARS: Final = string.ascii_lowercase + string.digits
_ID_LENGTH: Final = 25
_CHANGES: Final = 20
_PAGE: Final = 200

Found = TypeVar("Found")


def new_run_id() -> str:
    """Make a run id."""
    return _mint("run_")


def new_batch_id() -> str:
    """Make a batch id."""
    return _mint("batch_")


def _mint(prefix: str) -> str:
    return prefix + "".join(secrets.choice(_ID_CHARS) for _ in range(_ID_LENGTH))


# --- Asking ------------------------------------------------------------------------------------------------------


def check(request: RunRequest) -> None:
    """
    Check what `enqueue` would.

    Raises:
        InvalidRequest: An option can't be used.
    """
    row_of(request, "")
    keys_of(request)


def enqueue(request: RunRequest, correlation: Correlation, context: Context, *, run_id: str | None = None) -> Enqueued:
    """
    Ask for a run; it is durable when this returns.

    Args:
        request: What to run.
        correlation: Who asks. Its execution id is the run's unless it has been run already; then the run gets a new one.
        context: Whose current span is the parent of what the run does.
        run_id: The run's id; None mints one.

    Raises:
        InvalidRequest: An option can't be used; nothing was written.
        StoreUnavailable: The store could not take it.
    """
    row = row_of(request, run_id or new_run_id())
    result = commit(EnqueueRun(row, _executions(row, correlation, context), keys_of(request)))
    if not isinstance(result, Enqueued):
        raise StoreUnavailable(f"the run of {request.task} was not written: {result}")
    return result


def _executions(row: RunRow, correlation: Correlation, context: Context) -> tuple[Any, ...]:
    own = correlation.model_copy(update={RUN_ID: row.run_id})
    # For a call with the ids of one that is done already: an expired key, a payload that was sent once before.
    spare = own.model_copy(update={"execution_id": mint_id()})
    return tuple(
        (execution_row(row.task, each, row.run_id), json.dumps(entries(context, each, message_id=row.run_id))) for each in (own, spare)
    )


def origin(headers: object, payload: Any) -> tuple[Correlation, Context]:
    """
    Find out who asks for a run: from the payload's reserved key, else from headers. Never raises.

    Args:
        headers: Those of the call, in any shape. The payload's own trace counts where it is a part of theirs.
        payload: The decoded payload.

    Returns:
        The correlation, and a context whose current span is the caller's.
    """
    carried = read_headers(headers)
    context, scope = received(payload, carried)
    remote = decode_trace(carried.traceparent, carried.tracestate) if carried.traceparent else None
    if remote is not None and remote.trace_id != trace.get_current_span(context).get_span_context().trace_id:
        context = trace.set_span_in_context(trace.NonRecordingSpan(remote), context)
    return scope.correlation, context


def create_batch(run_count: int, carrier: Mapping[str, str], *, key: str | None = None, request_key: str | None = None) -> tuple[str, bool]:
    """
    Announce a batch.

    Args:
        run_count: How many runs it will have.
        carrier: The caller's trace headers, which every run of it takes over.
        key: An idempotency key; None without one.
        request_key: As in `RunRequest`.

    Returns:
        The batch's id, and whether an earlier call with the same key had announced it.
    """
    keys = []
    if request_key is not None:
        keys.append(RunKey(f"batch-request/{request_key}", wire.REQUEST_KEY_SECONDS * NANOSECONDS, exact=True))
    if key is not None:
        keys.append(RunKey(f"batch/{key}", wire.KEY_SECONDS * NANOSECONDS))
    found: Any = commit(CreateBatch(new_batch_id(), run_count, json.dumps(dict(carrier)), tuple(keys)))
    return found[0], found[1]


# --- Finding -----------------------------------------------------------------------------------------------------


def find(run_id: str) -> RunRecord | None:
    """Give a run; None when there is none."""
    return read(lambda tx: run_queries.find_run(tx, run_id))


def find_by_key(task: str, key: str) -> RunRecord | None:
    """Give the run that holds a task's idempotency key; None when none does."""
    return read(lambda tx: run_queries.find_key(tx, key_name(task, key)))


def find_batch(batch_id: str) -> BatchRecord | None:
    """Give a batch; None when there is none."""
    return read(lambda tx: run_queries.find_batch(tx, batch_id))


def list_runs(
    *,
    limit: int,
    before: int | None = None,
    after: int | None = None,
    tasks: Sequence[str] = (),
    batch_id: str | None = None,
    wanted: Callable[[RunRecord], bool] = lambda _: True,
) -> list[RunRecord]:
    """
    Give runs without payload and output, the newest first.

    Args:
        limit: At most so many.
        before: Only runs older than the one with this `seq`; None: from the newest.
        after: Only runs newer than the one with this `seq`; None: no limit.
        tasks: Only runs of these tasks; empty: of any.
        batch_id: Only runs of this batch; None: of any and none.
        wanted: What else they must be like.
    """
    found: list[RunRecord] = []
    while len(found) < limit:
        page = read(lambda tx: run_queries.list_runs(tx, limit=_PAGE, before=before, after=after, tasks=tasks, batch_id=batch_id))  # noqa: B023 (called at once)
        among = [run for run in page if wanted(run)]
        found = found + among if after is None else among + found
        if len(page) < _PAGE:
            break
        if after is None:
            before = page[-1].seq
        else:
            after = page[0].seq
    return found[:limit] if after is None else found[-limit:]


def status_of(run: RunRecord) -> str:
    """Give the status that a run had when it was read, as the wire contract spells it."""
    if run.goes_on:
        return "EXECUTING"
    if run.state == QUEUED:
        return "DELAYED" if run.due_unix_ns > run.read_unix_ns else "QUEUED"
    if run.state == CANCELLED:
        return "EXPIRED" if run.classification == EXPIRED else "CANCELED"
    return _STATUSES.get(run.state, "FAILED")


_STATUSES: Final = {
    RUNNING: "EXECUTING",
    RETRYING: "QUEUED",
    PAUSED: "WAITING",
    SUCCEEDED: "COMPLETED",
    FAILED: "FAILED",
    TIMED_OUT: "TIMED_OUT",
    LOST: "CRASHED",
}


def is_ended(run: RunRecord) -> bool:
    """Tell whether a run will not change any more."""
    return not run.goes_on and run.state not in (QUEUED, RETRYING, RUNNING, PAUSED)


def error_of(run: RunRecord) -> dict[str, Any] | None:
    """Give what a run failed with; None while it has not."""
    if status_of(run) not in ("FAILED", "CRASHED", "TIMED_OUT"):
        return None
    return {"name": (run.error_type or run.state).rpartition(".")[2], "message": run.error_message or ""}


# --- Changing ----------------------------------------------------------------------------------------------------


def cancel(run_id: str) -> RunRecord:
    """
    Cancel a run: the wish is durable before anything else happens.

    A run that waits is closed at once, one that is being attempted ends when its worker has stopped it, and one that has
    ended stays as it is.

    Raises:
        RunNotFound: There is no such run.
    """
    run = _found(find(run_id), run_id)
    if is_ended(run):
        return run
    request_cancel(run.execution_id, terminate=True)
    from otelexec_trigger.consume import dismiss

    if run.state in (QUEUED, RETRYING, PAUSED):
        dismiss(run)
    return _found(find(run_id), run_id)


def replay(run_id: str, headers: object = None, *, request_key: str | None = None) -> Enqueued:
    """
    Ask for the same once more: a new run and a new execution, for the same request.

    Args:
        run_id: The run to repeat.
        headers: Those of the call; without a trace in them the new run belongs to the trace of the old one's call.
        request_key: As in `RunRequest`.

    Raises:
        RunNotFound: There is no such run.
    """
    run = _found(find(run_id), run_id)
    options = {
        name: value for name, value in json.loads(run.options).items() if name not in ("idempotencyKey", "idempotencyKeyTTL", "delay")
    }
    context, scope = incoming(carrier_of(run), message_id=run.run_id, context=Context())
    correlation = scope.correlation.model_copy(update={"execution_id": mint_id()})
    call = read_headers(headers)
    remote = decode_trace(call.traceparent, call.tracestate) if call.traceparent else None
    if remote is not None:
        context = trace.set_span_in_context(trace.NonRecordingSpan(remote), context)
    request = RunRequest(run.task, run.payload, run.payload_type, {**options, "replayedFrom": run.run_id}, request_key)
    return enqueue(request, correlation, context)


def reschedule(run_id: str, delay: str) -> RunRecord:
    """
    Give a delayed run another time.

    Args:
        run_id: The run.
        delay: A duration from now, or a date.

    Raises:
        RunNotFound: There is no such run.
        InvalidRequest: It does not wait for its time any more, or that is no delay.
    """
    answer = commit(RescheduleRun(run_id, *checked_delay(delay)))
    if answer is False:
        raise InvalidRequest(f"{run_id} is {status_of(_found(find(run_id), run_id))}: only a DELAYED run can be rescheduled", status=400)
    return _found(find(run_id) if answer else None, run_id)


def add_tags(run_id: str, tags: object) -> None:
    """
    Add tags to a run.

    Raises:
        RunNotFound: There is no such run.
        InvalidRequest: They would be too many, or one is too long; none was added.
    """
    given = wire.checked_tags(tags)
    answer = commit(AddTags(run_id, tuple(given), wire.MAX_TAGS))
    if answer is None:
        raise _missing(run_id)
    if not answer:
        raise InvalidRequest(f"a run has at most {wire.MAX_TAGS} tags, and with these {run_id} would have more", status=422)


def change_metadata(run_id: str, change: Callable[[Any], Any]) -> Any:
    """
    Change a run's metadata, also while others do.

    Args:
        run_id: The run.
        change: Takes the metadata and gives the new; may be called again with what somebody else made of it.

    Returns:
        The new metadata.

    Raises:
        RunNotFound: There is no such run.
        InvalidRequest: The new metadata is too large.
    """
    for _ in range(_CHANGES):
        run = _found(find(run_id), run_id)
        new = change(None if run.metadata is None else json.loads(run.metadata))
        if commit(SetRunMetadata(run_id, metadata_text(new), run.metadata)):
            return new
    raise StoreUnavailable(f"the metadata of {run_id} is being changed by others all the time")


def reset_key(task: str, key: str) -> bool:
    """Free a task's idempotency key; gives whether it was held."""
    return bool(commit(ResetKey(key_name(task, key))))


# --- The store ---------------------------------------------------------------------------------------------------


def store() -> Store:
    """
    Give this process's store.

    Raises:
        SettingsError: It has none.
    """
    found = _runtime.get().store
    if found is None:
        raise SettingsError("The local backend keeps its runs in the store: set OTELEXEC_STORE to sqlite:///PATH or postgresql://...")
    return found


def read(query: Callable[[Transaction], Found]) -> Found:
    """Run queries in one reading transaction."""
    return store().read(query)


def commit(write: RunWrite) -> object:
    """
    Commit a write durably.

    Raises:
        StoreError: It was not written.
    """
    store()
    return _runtime.get().journal.group.commit(write, durable=True, timeout_seconds=_PATIENCE_SECONDS)


def carrier_of(run: RunRecord) -> Carrier:
    """Give what a run carries to its worker."""
    return read_headers(json.loads(run.carrier))


def _found(run: RunRecord | None, run_id: str) -> RunRecord:
    if run is None:
        raise _missing(run_id)
    return run


def _missing(run_id: str) -> RunNotFound:
    return RunNotFound(f"There is no run {run_id}.", status=404)
