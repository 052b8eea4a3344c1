"""What the demo shows at its end: a table of its executions, and what is wrong with them, if anything is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from otelexec import semconv
from otelexec.cli.console import clean
from otelexec.cli.table import WIDE, error_text, state_text, took
from otelexec.decoded import DecodedSpan
from otelexec.store.records import AttemptRecord, ExecutionRecord
from otelexec.store.rows import ENDED_STATES


def table(records: Sequence[ExecutionRecord], found: Mapping[tuple[str, str], DecodedSpan], *, width: int) -> Table:
    """
    Make the table: one row an attempt, and under each execution those that it asked for.

    Args:
        records: The executions, the oldest first.
        found: The spans that are there, by trace id and span id.
        width: Columns of the console; a narrow one does without who asked and which process worked.
    """
    wide = width >= WIDE
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    shown.add_column("execution", no_wrap=True)
    if wide:
        shown.add_column("asked for by", no_wrap=True)
    shown.add_column("#", justify="right")
    shown.add_column("ended as", no_wrap=True)
    shown.add_column("took", justify="right", no_wrap=True)
    if wide:
        shown.add_column("pid", justify="right", no_wrap=True)
    shown.add_column("span", no_wrap=True)
    shown.add_column("what happened", overflow="fold", ratio=1)
    for depth, record in _family_order(records):
        name, asked_by = "  " * depth + record.name, "" if depth else _asked_by(record)
        for attempt in record.attempts:
            has_span = (attempt.trace_id or "", attempt.span_id or "") in found
            shown.add_row(
                Text(name),
                *([Text(asked_by)] if wide else []),
                str(attempt.attempt),
                state_text(attempt.state),
                took(attempt.started_unix_ns, attempt.ended_unix_ns, goes_on=True),
                *([str(attempt.pid or "")] if wide else []),
                Text(attempt.span_id or "none", "" if has_span else "red"),
                Text(_what_happened(attempt), "dim"),
            )
            name = asked_by = ""
        if not record.attempts:
            shown.add_row(Text(name), *([Text(asked_by)] if wide else []), "", state_text(record.state))
    return shown


def _family_order(records: Sequence[ExecutionRecord]) -> Iterator[tuple[int, ExecutionRecord]]:
    """Give each execution before those that it asked for, with its depth."""
    known = {record.execution_id for record in records}
    children: dict[str | None, list[ExecutionRecord]] = {}
    for record in records:
        parent = record.parent_execution_id if record.parent_execution_id in known else None
        children.setdefault(parent, []).append(record)
    waiting = [(0, record) for record in reversed(children.get(None, []))]
    while waiting:
        depth, record = waiting.pop()
        yield depth, record
        waiting += [(depth + 1, child) for child in reversed(children.get(record.execution_id, []))]


def _asked_by(record: ExecutionRecord) -> str:
    fields = json.loads(record.correlation)
    return f"{record.source} {fields.get('provider') or fields.get('schedule_id') or ''}".strip()


def _what_happened(attempt: AttemptRecord) -> str:
    if attempt.state == "lost":
        marker = json.loads(attempt.progress) if attempt.progress else {}
        at = f" after {marker['message']} of {marker['total']}" if "message" in marker and "total" in marker else ""
        return f"{attempt.classification}{at}; closed for it"
    if attempt.state == "rejected" and attempt.finalized_by == "reject":
        return f"at the webhook: {attempt.error_type}"
    if attempt.state == "paused":
        return f"{attempt.classification}, with a snapshot"
    if attempt.state == "cancelled":
        return "over HTTP, as it ran"
    error = error_text(attempt.error_type, attempt.error_message)
    return error or ("" if attempt.output is None else f"gave {clean(attempt.output)}")


def index(spans: Iterable[DecodedSpan]) -> dict[tuple[str, str], DecodedSpan]:
    """Give spans by trace id and span id."""
    return {(span.trace_id, span.span_id): span for span in spans}


def faults(records: Sequence[ExecutionRecord], spans: Sequence[DecodedSpan], *, complete: bool) -> list[str]:
    """
    Compare the records with the spans.

    Args:
        records: The executions.
        spans: The spans of their traces.
        complete: Whether these are all of them, so that a missing one is a fault.

    Returns:
        One line for each thing that is wrong; nothing when every execution is closed with its span.
    """
    found = index(spans)
    wrong: list[str] = []
    for record in records:
        if record.state not in ENDED_STATES:
            wrong.append(f"{record.name} {record.execution_id} is not closed: it is {record.state}")
        for attempt in record.attempts:
            what = f"attempt {attempt.attempt} of {record.name} {record.execution_id}"
            wrong += [f"{what} {fault}" for fault in _faults_of(attempt, found, complete=complete)]
    for span in spans:
        if complete and span.parent_span_id is not None and (span.trace_id, span.parent_span_id) not in found:
            wrong.append(f"span {span.name} {span.span_id} of trace {span.trace_id} lacks its parent {span.parent_span_id}")
    doubled = Counter((span.trace_id, span.span_id) for span in spans)
    wrong += [f"span {span_id} of trace {trace_id} is there {count} times" for (trace_id, span_id), count in doubled.items() if count > 1]
    return wrong


def _faults_of(attempt: AttemptRecord, found: Mapping[tuple[str, str], DecodedSpan], *, complete: bool) -> Iterable[str]:
    if attempt.ended_unix_ns is None:
        yield f"is not closed: it is {attempt.state}"
        return
    span = found.get((attempt.trace_id or "", attempt.span_id or ""))
    if span is None:
        if complete:
            yield f"is {attempt.state} and has no span"
        return
    if span.attributes.get(semconv.OUTCOME) != attempt.state:
        yield f"is {attempt.state}, and its span says {span.attributes.get(semconv.OUTCOME)}"
    if span.end_unix_ns != attempt.ended_unix_ns:
        yield f"ended at {attempt.ended_unix_ns} ns, and its span says {span.end_unix_ns} ns"
    if attempt.outer_span_id is not None:
        outer = found.get((attempt.trace_id or "", attempt.outer_span_id))
        if outer is None and complete:
            yield f"has no span for the code around it, which ended as {attempt.outer_outcome}"
        elif outer is not None and outer.end_unix_ns != attempt.outer_ended_unix_ns:
            yield f"has an outer end of {attempt.outer_ended_unix_ns} ns, and its outer span says {outer.end_unix_ns} ns"
