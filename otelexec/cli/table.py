"""Executions as a table, for terminals of any width."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from rich.text import Text

from otelexec import records
from otelexec.cli import console
from otelexec.ids import MAX_ID_CHARS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from otelexec.store.records import AttemptRecord, ExecutionRecord

WIDE: Final = 130
"""From so many columns on there is room for whole ids, the source and the error."""
_SHORT_ID: Final = 18  # a minted id's first 60 bits: its millisecond and 12 random bits
_WIDE_ID: Final = 38  # a minted id, and an ellipsis
_VERY_WIDE: Final = 200  # also a pipe
_FIXED: Final = 102  # columns of all but name and error
_GAP: Final = 2
_LEAST: Final = 8
_NUMBERS: Final = frozenset({"TOOK", "TRIES", "#"})


def executions_table(found: Sequence[ExecutionRecord], *, width: int) -> Text:
    """
    Make the table; print it with `soft_wrap=True`.

    Args:
        found: What to show, in this order; at least one.
        width: Columns of the console. In a narrow one ids are cut to what tells them apart; `show` takes them so.
    """
    wide = width >= WIDE
    shown = _short_ids(
        [record.execution_id for record in found], (MAX_ID_CHARS if width >= _VERY_WIDE else _WIDE_ID) if wide else _SHORT_ID
    )
    columns: dict[str, list[Text]] = {
        "STARTED": [Text(console.local_time(records.started_unix_ns(each) or each.queued_unix_ns, short=True)) for each in found],
        "STATE": [state_text(each.state) for each in found],
        "TOOK": [Text(_took(each)) for each in found],
        "TRIES" if wide else "#": [Text(str(len(each.attempts))) for each in found],
        "NAME": [Text(console.clean(each.name)) for each in found],
        "SOURCE": [Text(console.clean(each.source)) for each in found],
        "EXECUTION": [Text(shown_id) for shown_id in shown],
        "ERROR": [Text(_error(each), style="red") for each in found],
    }
    if not wide:
        del columns["SOURCE"], columns["ERROR"]
    _fit(columns, "ERROR" if wide else "NAME", width)
    # By hand: a rich table of 10,000 rows takes seconds.
    widths = [max(len(name), *(cell.cell_len for cell in cells)) if cells else len(name) for name, cells in columns.items()]
    heads = [Text(name, style="dim") for name in columns]
    return Text("\n").join(_line(columns, row, widths) for row in (heads, *zip(*columns.values(), strict=True)))


def _line(names: Iterable[str], cells: Iterable[Text], widths: Iterable[int]) -> Text:
    line = Text()
    for name, cell, width in zip(names, cells, widths, strict=True):
        gap = " " * (width - cell.cell_len)
        line.append_text(Text.assemble(gap, cell) if name in _NUMBERS else Text.assemble(cell, gap)).append(" " * _GAP)
    line.rstrip()
    return line


def _fit(columns: dict[str, list[Text]], flexible: str, width: int) -> None:
    """Cut one column to what the others leave; rich would cut all of them, ids and states too."""
    for name, most in (("NAME", max(16, (width - _FIXED) // 2)), ("SOURCE", 12 if width < _VERY_WIDE else 40)):
        for cell in columns.get(name, ()) if name != flexible else ():
            cell.truncate(most, overflow="ellipsis")
    taken = sum(max(len(name), *(cell.cell_len for cell in cells)) + _GAP for name, cells in columns.items() if name != flexible)
    for cell in columns[flexible]:
        cell.truncate(max(_LEAST, width - taken), overflow="ellipsis")


def _took(record: ExecutionRecord) -> str:
    return took(records.started_unix_ns(record), records.ended_unix_ns(record), goes_on=record.state == "running")


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
    """Give who ran an attempt: `4711 on host, service billing`."""
    if attempt.pid is None:
        return "unknown"
    service = "" if attempt.service_name is None else f", service {console.clean(attempt.service_name)}"
    return f"{attempt.pid} on {console.clean(attempt.host or 'unknown')}{service}"


def _error(record: ExecutionRecord) -> str:
    if record.state in {"succeeded", "running"}:
        return ""
    return error_text(*records.error(record))


def _short_ids(ids: Sequence[str], width: int) -> list[str]:
    """Cut ids to `width` characters, or to as many more as tell the listed ones apart."""
    ordered = sorted(set(ids))
    for one, other in pairwise(ordered):
        common = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        width = max(width, common + 1)
    return [each if len(each) <= width + 1 else each[:width] + "…" for each in ids]
