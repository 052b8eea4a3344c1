"""The spans of an execution as bars on one time line: those that the store still holds, and what the record knows of the others."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from otelexec import semconv
from otelexec.cli import console

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from otelexec.decoded import DecodedSpan
    from otelexec.store.records import AttemptRecord, ExecutionRecord

MAX_BARS: Final = 200
"""A screen is no place for more; Jaeger is."""
_LEAST_LINE: Final = 16
_BLOCKS: Final = "▏▎▍▌▋▊▉█"


@dataclass(slots=True)
class Bar:
    """
    One span.

    Attributes:
        key: Span id, or a name of its own where the span is unsampled.
        parent: Key of its parent; None for a root.
        label: What it is called.
        started_unix_ns: Start.
        ended_unix_ns: End; None while it is running.
        style: Colour.
        note: Where it is, if not here: `delivered`; empty otherwise.
        children: Filled by `bars`.
    """

    key: str
    parent: str | None
    label: str
    started_unix_ns: int
    ended_unix_ns: int | None
    style: str
    note: str = ""
    children: list[Bar] = field(default_factory=list)


def bars(record: ExecutionRecord, held: Iterable[DecodedSpan]) -> list[Bar]:
    """
    Give the roots of the execution's spans, the earliest first, with their children.

    Args:
        record: The execution.
        held: The spans that have not been delivered yet.
    """
    found: dict[str, Bar] = {}
    for attempt in record.attempts:
        for bar in _recorded(record, attempt):
            found.setdefault(bar.key, bar)
    if record.producer_span_id is not None and record.queued_unix_ns is not None:
        key, at = record.producer_span_id, record.queued_unix_ns
        found.setdefault(key, Bar(key, None, "publish", at, at, "blue", "delivered"))
    for span in held:
        known = found.get(span.span_id)
        style = known.style if known else "red" if span.status == "error" else "white"
        number = span.attributes.get(semconv.ATTEMPT) if semconv.OUTCOME in span.attributes else None
        label = console.clean(span.name) + (f" #{number}" if number is not None else "")
        found[span.span_id] = Bar(span.span_id, span.parent_span_id, label, span.start_unix_ns, span.end_unix_ns, style)
    return _tree(found)


def _recorded(record: ExecutionRecord, attempt: AttemptRecord) -> Iterator[Bar]:
    """Give the bars that the record alone knows of: the outer executor's, once for all its cores, and the attempt's."""
    number = attempt.attempt
    producer = record.producer_span_id if attempt.trace_id == record.producer_trace_id else None
    outer = attempt.outer_span_id or (None if attempt.outer_started_unix_ns is None else f"outer {number}")
    if outer is not None and attempt.outer_started_unix_ns is not None:
        running = attempt.outer_ended_unix_ns is None
        style = console.STYLES.get(attempt.outer_outcome or "running", "")
        note = "running" if running else "delivered"
        yield Bar(outer, producer, f"outer #{number}", attempt.outer_started_unix_ns, attempt.outer_ended_unix_ns, style, note)
    running = attempt.ended_unix_ns is None
    note = "running" if running else "delivered" if attempt.span_id else "unsampled"
    yield Bar(
        attempt.span_id or f"attempt {number}",
        outer or producer,
        f"{console.clean(record.name)} #{number}",
        attempt.started_unix_ns,
        attempt.ended_unix_ns,
        console.STYLES.get(attempt.state, ""),
        note,
    )


def _tree(found: dict[str, Bar]) -> list[Bar]:
    roots: list[Bar] = []
    for bar in sorted(found.values(), key=lambda bar: bar.started_unix_ns):
        parent = found.get(bar.parent or "")
        (roots if parent is None or parent is bar else parent.children).append(bar)
    reached = {bar.key for root in roots for _, bar in _walk(root)}
    # Spans that are each other's parents, which no tracer makes, would otherwise be hidden.
    return roots + [bar for key, bar in found.items() if key not in reached]


def _walk(bar: Bar) -> Iterator[tuple[int, Bar]]:
    stack, seen = [(0, bar)], set()
    while stack:
        depth, each = stack.pop()
        if each.key not in seen:
            seen.add(each.key)
            yield depth, each
            stack.extend((depth + 1, child) for child in reversed(each.children))


def draw(roots: Sequence[Bar], *, width: int, now_unix_ns: int | None = None) -> RenderableType:
    """
    Draw the bars below each other.

    Args:
        roots: What `bars` gave.
        width: Columns there are.
        now_unix_ns: Where what runs ends for now; None: the present.
    """
    now = time.time_ns() if now_unix_ns is None else now_unix_ns
    every = [each for root in roots for each in _walk(root)]
    shown = every[:MAX_BARS]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    if not shown:
        return table
    start = min(bar.started_unix_ns for _, bar in every)
    end = max(max(bar.ended_unix_ns or now, bar.started_unix_ns) for _, bar in every)
    widest = max(16, width * 2 // 5)
    # Of a deep span's label the indentation leaves half the column, so that its name can be read.
    labels = [" " * min(2 * min(depth, 12), widest // 2) + bar.label for depth, bar in shown]
    label_width = min(max(map(cell_len, labels)), widest)
    notes = max(len(bar.note) for _, bar in shown)
    line = max(_LEAST_LINE, width - label_width - 2 - 2 - 8 - (notes + 2 if notes else 0))
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=label_width)
    table.add_column(no_wrap=True, width=line)
    table.add_column(no_wrap=True, justify="right")
    if notes:
        table.add_column(no_wrap=True, style="dim")
    for label, (_, bar) in zip(labels, shown, strict=True):
        ended = bar.ended_unix_ns or max(now, bar.started_unix_ns)
        cells = [
            Text(label),
            Text(_bar(bar.started_unix_ns - start, ended - start, max(1, end - start), line), style=bar.style),
            # A publish that was delivered left its start only.
            Text(
                "" if ended == bar.started_unix_ns else console.duration(ended - bar.started_unix_ns) + ("" if bar.ended_unix_ns else "…")
            ),
        ]
        table.add_row(*cells, *([Text(bar.note)] if notes else []))
    more = len(every) - len(shown)
    return Group(table, Text(f"... and {console.plural(more, 'span')} more", style="dim")) if more else table


def _bar(start: int, end: int, whole: int, line: int) -> str:
    """Draw one bar, at least an eighth of a character wide; its start is exact to a character, its end to an eighth."""
    first = min(line - 1, start * line // whole)
    eighths = max(1, min(line * 8, end * line * 8 // whole) - first * 8)
    full, rest = divmod(eighths, 8)
    return " " * first + "█" * full + (_BLOCKS[rest - 1] if rest else "")
