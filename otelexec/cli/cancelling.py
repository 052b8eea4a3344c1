"""`otelexec cancel`: ask for an execution to be cancelled."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from otelexec.cli import console, options
from otelexec.errors import StoreError
from otelexec.store.rows import CANCELLED, ENDED_STATES, RUNNING, Cancellation
from otelexec.store.writes import RequestCancel

if TYPE_CHECKING:
    from otelexec.settings import Settings
    from otelexec.store.records import ExecutionRecord


def cancel(
    execution_id: options.ExecutionArgument,
    *,
    terminate: Annotated[
        bool | None,
        typer.Option(
            "--terminate/--no-terminate",
            help="Stop it where it can be stopped, or only tell it. Default: what its backend usually does.",
            show_default=False,
        ),
    ] = None,
    store: options.StoreOption = None,
) -> None:
    """
    Ask for an execution to be cancelled.

    The wish is durable when this returns. A running attempt is told, one that has not started is not called. Exits with 1
    when there is no such execution, or it has ended otherwise.
    """
    settings = options.load(store=store)
    with options.opened(settings) as opened:
        record = options.find(opened.store, execution_id)
        if record.state in ENDED_STATES - {CANCELLED}:
            raise options.Failure(f"execution {record.execution_id} has already ended: {record.state}")
        wish = Cancellation(time.time_ns(), terminate)
        [state] = opened.store.commit([RequestCancel(record.execution_id, wish)], durable=True, timeout_seconds=5.0)
        if isinstance(state, StoreError):
            raise state
        if state in ENDED_STATES - {CANCELLED}:
            raise options.Failure(f"execution {record.execution_id} has ended before it was told: {state}")
        console.say(_told(record, str(state), settings))


def _told(record: ExecutionRecord, state: str, settings: Settings) -> str:
    if state == CANCELLED:
        return f"Execution {record.execution_id} is cancelled already."
    if state == RUNNING:
        return f"Execution {record.execution_id} is told to stop: its worker sees it within {settings.cancel_poll_seconds:g} s."
    return f"Execution {record.execution_id} is {state} and will not be called again."
