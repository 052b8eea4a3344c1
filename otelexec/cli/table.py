"""Executions as a table, for terminals of any width."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from rich.table import Table
from rich.text import Text

from otelexec.cli import console, records

if TYPE_CHECKING:
    from collections.abc import Sequence

    from otelexec.store.base import AttemptRecord, ExecutionRecord

WIDE: Final = 120
"""From so many columns on there is room for whole ids, the source and the error."""
_SHORT_ID: Final = 18  # a minted id's first 60 bits: its millisecond and 12 random bits
_ID_WIDTH: Final = 40
_ERROR_WIDTH: Final = 200


def executions_table(found: Sequence[ExecutionRecord], *, width: int) -> Table:
    """
    Make the table.

    Args:
        found: What to show, in this order.
        width: Columns of the console. In a narrow one ids are cut to what tells them apart; `show` takes them so.
    """
    wide = width >= WIDE
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("STARTED", no_wrap=True)
    table.add_column("STATE", no_wrap=True)
    table.add_column("TOOK", no_wrap=True, justify="right")
    table.add_column("TRIES", no_wrap=True, justify="right")
    table.add_column("NAME", no_wrap=True, overflow="ellipsis", ratio=None if wide else 1)
    if wide:
        table.add_column("SOURCE", no_wrap=True, overflow="ellipsis", max_width=16)
    table.add_column("EXECUTION", no_wrap=True, overflow="ellipsis")
    if wide:
        table.add_column("ERROR", no_wrap=True, overflow="ellipsis")
    shown = _short_ids([record.execution_id for record in found], _ID_WIDTH if wide else _SHORT_ID)
    for record, shown_id in zip(found, shown, strict=True):
        started = records.started_unix_ns(record)
        cells = [
            Text(console.local_time(started or record.queued_unix_ns, short=True)),
            state_text(record.state),
            Text(took(started, records.ended_unix_ns(record), goes_on=record.state == "running")),
            Text(str(len(record.attempts))),
            Text(console.clean(record.name)),
            Text(shown_id),
        ]
        if wide:
            cells.insert(5, Text(console.clean(record.source)))
            cells.append(Text(_error(record), style="red"))
        table.add_row(*cells)
    return table


def state_text(state: str, classification: str | None = None) -> Text:
    """Give a state in its colour, with its classification where that says more: `lost (killed)`."""
    return Text(f"{state} ({console.clean(classification)})" if classification else state, style=console.STYLES.get(state, ""))


def took(started_unix_ns: int | None, ended_unix_ns: int | None, *, goes_on: bool) -> str:
    """Give how long something took, or has taken by now; empty for what waits."""
    if started_unix_ns is None or (ended_unix_ns is None and not goes_on):
        return ""
    return console.duration((ended_unix_ns or time.time_ns()) - started_unix_ns) + ("" if ended_unix_ns else "…")


def error_text(error_type: str | None, error_message: str | None) -> str:
    """Give an error in one line, its class without the module."""
    message = console.clean(error_message or "")
    short = console.clean((error_type or "").rpartition(".")[2])
    return f"{short}: {message}" if short and message and short != message else short or message


def worker(attempt: AttemptRecord) -> str:
    """Give who ran an attempt: `4711 on host`."""
    return "unknown" if attempt.pid is None else f"{attempt.pid} on {console.clean(attempt.host or 'unknown')}"


def _error(record: ExecutionRecord) -> str:
    if record.state in {"succeeded", "running"}:
        return ""
    text = error_text(*records.error(record))
    return text if len(text) <= _ERROR_WIDTH else text[: _ERROR_WIDTH - 1] + "…"


def _short_ids(ids: Sequence[str], width: int) -> list[str]:
    """Cut ids to `width` characters, or to as many more as tell the listed ones apart."""
    ordered = sorted(set(ids))
    for one, other in pairwise(ordered):
        common = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        width = max(width, common + 1)
    return [each if len(each) <= width + 1 else each[:width] + "…" for each in ids]
