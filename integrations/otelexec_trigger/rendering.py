"""A run of the local engine as the Trigger.dev wire contract tells of it, and a run of that contract as `Run`."""

from __future__ import annotations

import json
import time
from typing import Any

from otelexec.store.runs import RunRecord
from otelexec_trigger import engine, wire
from otelexec_trigger.runs import ENDED, SUCCEEDED, Run

_FAILURES = frozenset({"FAILED", "CRASHED", "SYSTEM_FAILURE", "EXPIRED", "TIMED_OUT"})


def as_json(run: RunRecord, *, whole: bool = True) -> dict[str, Any]:
    """
    Give a run as `GET /api/v3/runs/{id}` does.

    Args:
        run: The run.
        whole: With payload, output, error and relations; a list has none of them.
    """
    options = json.loads(run.options)
    status = engine.status_of(run)
    ended = wire.state_of(status) in ENDED
    finished = (run.ended_unix_ns or run.updated_unix_ns) if ended else None
    started = run.started_unix_ns
    told: dict[str, Any] = {
        "id": run.run_id,
        "status": status,
        "taskIdentifier": run.task,
        "isTest": bool(options.get("test", False)),
        "isQueued": status in ("QUEUED", "DELAYED"),
        "isExecuting": status == "EXECUTING",
        "isWaiting": status == "WAITING",
        "isCompleted": ended,
        "isSuccess": wire.state_of(status) == SUCCEEDED,
        "isFailed": status in _FAILURES,
        "isCancelled": status == "CANCELED",
        "createdAt": wire.iso(run.created_unix_ns),
        "updatedAt": wire.iso(max(filter(None, (run.updated_unix_ns, started, finished)))),
        "tags": json.loads(run.tags),
        "costInCents": 0,
        "baseCostInCents": 0,
        "durationMs": _duration_ms(run, finished),
        "depth": 0,
        "attemptCount": run.attempts,
    }
    told["triggerFunction"] = "batchTrigger" if run.batch_id is not None else "trigger"
    if run.batch_id is not None:
        told["batchId"] = run.batch_id
    if "idempotencyKey" in options:
        told["idempotencyKey"] = options["idempotencyKey"]
    if started is not None:
        told["startedAt"] = wire.iso(started)
    if finished is not None:
        told["finishedAt"] = wire.iso(finished)
    if "delay" in options:
        told["delayedUntil"] = wire.iso(run.due_unix_ns)
    if "ttl" in options:
        told["ttl"] = options["ttl"] if isinstance(options["ttl"], str) else f"{options['ttl']}s"
    if status == "EXPIRED":
        told["expiredAt"] = told["finishedAt"]
    if run.metadata is not None:
        told["metadata"] = _object(json.loads(run.metadata))
    if whole:
        _tell_the_rest(run, told)
    return told


def _tell_the_rest(run: RunRecord, told: dict[str, Any]) -> None:
    if run.payload is not None:
        told["payload"] = wire.decode(run.payload, run.payload_type)
    if told["isSuccess"] and run.result is not None:
        told["output"] = json.loads(run.result)
    error = engine.error_of(run)
    if error is not None:
        told["error"] = error
    told["relatedRuns"] = {"children": []}


def _duration_ms(run: RunRecord, finished: int | None) -> float:
    if run.started_unix_ns is None:
        return 0
    return round(((finished or time.time_ns()) - run.started_unix_ns) / 1e6, 3)


def _object(metadata: Any) -> dict[str, Any]:
    return metadata if isinstance(metadata, dict) else {"value": metadata}


def run_of(told: dict[str, Any]) -> Run:
    """
    Give a run as it was told of.

    Args:
        told: What a server answered; what is missing or of a wrong kind is left out.
    """
    error, tags, duration = told.get("error"), told.get("tags"), told.get("durationMs")
    return Run(
        id=str(told.get("id", "")),
        state=wire.state_of(told.get("status", "")),
        task=str(told.get("taskIdentifier", "")),
        output=told.get("output"),
        error=error if isinstance(error, dict) else None if error is None else {"message": str(error)},
        attempts=told["attemptCount"] if isinstance(told.get("attemptCount"), int) else 0,
        tags=tuple(map(str, tags)) if isinstance(tags, list) else (),
        metadata=told.get("metadata"),
        created_at=told.get("createdAt"),
        started_at=told.get("startedAt"),
        finished_at=told.get("finishedAt"),
        duration_ms=float(duration) if isinstance(duration, int | float) else 0.0,
        raw=told,
    )
