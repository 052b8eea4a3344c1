"""`otelexec list`: the executions in the store, the newest first."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

import typer

from otelexec.cli import console, options, records
from otelexec.cli.table import executions_table

TABLE_ROWS: Final = 50
"""As many fill a screen or two; `--json` is for those who want all."""


class State(StrEnum):
    """States of an execution."""

    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    LOST = "lost"


def list_executions(
    *,
    state: Annotated[State | None, typer.Option(help="Only executions in this state. Default: any.", show_default=False)] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help=f"At most N executions. Default: {TABLE_ROWS} in the table, all with --json.", show_default=False
        ),
    ] = None,
    as_json: options.JsonOption = False,
    store: options.StoreOption = None,
) -> None:
    """
    List the executions, the newest first.

    A table in local time; with --json one object a line. Ids that are cut off at the end can be given to `show` as they are.
    """
    settings = options.load(store=store)
    with options.opened(settings) as opened:
        wanted = None if state is None else state.value
        if as_json:
            for record in opened.store.executions(limit=limit, state=wanted):
                console.print_json(records.execution_json(record))
            return
        rows = TABLE_ROWS if limit is None else limit
        found = list(opened.store.executions(limit=rows + 1, state=wanted))
        if not found:
            console.say(f"No execution {'is ' + wanted if wanted else 'yet'} in {opened.store.url}.")
            return
        out = console.out()
        out.print(executions_table(found[:rows], width=out.width), soft_wrap=True)
        if len(found) > rows:
            console.complain(f"the newest {rows:,} are shown; --limit N shows more, --json all", kind="note")
