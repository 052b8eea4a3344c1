"""`otelexec list`: the executions in the store, the newest first."""

from __future__ import annotations

import functools
from enum import StrEnum
from typing import Annotated, Final

import typer

from otelexec import records, semconv
from otelexec.cli import console, options
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
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Only executions with this name.", show_default=False)] = None,
    request: Annotated[str | None, typer.Option(metavar="REQUEST_ID", help="Only executions of this request.", show_default=False)] = None,
    source: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Only executions from this source, such as `webhook`.", show_default=False)
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Only executions with this field of the source's, such as `webhook_id=wh_1`, or `message_id=...`; may be repeated.",
            show_default=False,
        ),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="Only executions that were queued, began or ended within this time: 90m, 12h, 30d, 4w (s, m, h, d, w).",
            show_default=False,
        ),
    ] = None,
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
    fields = dict(map(_field, where or ()))
    age = None if since is None else options.duration("--since", since)
    settings = options.load(store=store)
    with options.opened(settings) as opened:
        find = functools.partial(
            opened.store.executions,
            state=None if state is None else state.value,
            name=name,
            request_id=request,
            source=source,
            fields=fields,
            since_unix_ns=None if age is None else opened.store.now_unix_ns() - int(age * 1e9),
        )
        if as_json:
            for record in find(limit=limit):
                console.print_json(records.execution_json(record))
            return
        rows = TABLE_ROWS if limit is None else limit
        found = list(find(limit=rows + 1))
        if not found:
            asked = any((state, name, request, source, fields, since))
            console.say(f"No such execution in {opened.store.url}." if asked else f"No execution in {opened.store.url}.")
            return
        out = console.out()
        out.print(executions_table(found[:rows], width=out.width), soft_wrap=True)
        if len(found) > rows:
            console.complain(f"the newest {rows:,} are shown; --limit N shows more, --json all", kind="note")


def _field(given: str) -> tuple[str, str]:
    key, equals, value = given.partition("=")
    if not equals or not key:
        raise options.Failure(f"--where: must be KEY=VALUE, such as webhook_id=wh_1, not {given!r}", 2)
    return semconv.MESSAGING_MESSAGE_ID if key == "message_id" else key, value
