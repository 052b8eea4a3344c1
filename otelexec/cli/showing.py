"""`otelexec show`: everything about one execution, with its spans on a time line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from otelexec import records
from otelexec.cli import console, options, waterfall
from otelexec.cli.table import error_text, state_text, took, worker
from otelexec.decoded import decode

if TYPE_CHECKING:
    from rich.console import Console

    from otelexec.decoded import DecodedSpan
    from otelexec.store.base import Store
    from otelexec.store.records import AttemptRecord, ExecutionRecord


def show(
    execution_id: options.ExecutionArgument,
    *,
    as_json: options.JsonOption = False,
    store: options.StoreOption = None,
    jaeger_url: options.JaegerOption = None,
) -> None:
    """
    Show one execution: its record, its attempts, its spans on a time line, and where Jaeger has its trace.

    Spans that were delivered already are in Jaeger; of those the line shows what the record knows, the attempts.
    """
    settings = options.load(store=store, jaeger_url=jaeger_url)
    with options.opened(settings) as opened:
        record = options.find(opened.store, execution_id)
        held = _held(opened.store, record)
        links = [f"{settings.jaeger_url}/trace/{trace_id}" for trace_id in records.traces(record)]
        if as_json:
            spans = [records.span_json(span) for span in held]
            console.print_json({**records.execution_json(record), "trace_urls": links, "held_spans": spans})
        else:
            print_execution(console.out(), record, held, links)


def _held(store: Store, record: ExecutionRecord) -> list[DecodedSpan]:
    """Give the spans that wait in the store, each once, the earliest first."""
    spans = {span.span_id: span for request in store.held_requests(record) for span in decode(request)}
    return sorted(spans.values(), key=lambda span: span.start_unix_ns)


def print_execution(out: Console, record: ExecutionRecord, held: list[DecodedSpan], links: list[str]) -> None:
    """
    Print an execution for people.

    Args:
        out: Where.
        record: The execution.
        held: Its spans that have not been delivered.
        links: Where Jaeger shows its traces.
    """
    started, ended = records.started_unix_ns(record), records.ended_unix_ns(record)
    time_taken = took(started, ended, goes_on=record.state == "running")
    head = Text.assemble((console.clean(record.name), "bold"), "  ", state_text(record.state))
    out.print(head.append(f"  {time_taken}" if time_taken else ""), soft_wrap=True)
    cancellation = record.cancellation
    parent = record.parent_execution_id
    known = records.execution_json(record)
    facts = {
        "execution": record.execution_id,
        "request": console.clean(record.request_id),
        "message": None if known["message_id"] is None else console.clean(str(known["message_id"])),
        "source": _with_fields(record.source, known["correlation"]),
        "parent": None if parent is None else console.clean(parent),
        "queued": console.local_time(record.queued_unix_ns),
        "started": console.local_time(started),
        "ended": console.local_time(ended),
        "cancel": None
        if cancellation is None
        else f"asked for at {console.local_time(cancellation.requested_unix_ns)}{', with --terminate' if cancellation.terminate else ''}",
        "error": error_text(record.error_type, record.error_message),
    }
    _print_facts(out, facts, links)
    for attempt in reversed(record.attempts):
        _print_attempt(out, attempt)
    roots = waterfall.bars(record, held)
    if roots:
        out.print()
        out.print(waterfall.draw(roots, width=min(out.width, 160)))
    delivered = any(attempt.span_id and attempt.span_id not in {span.span_id for span in held} for attempt in record.attempts)
    if delivered and record.state != "running":
        out.print(Text("Spans below a delivered one are in Jaeger.", style="dim"))


def _print_facts(out: Console, facts: dict[str, str | None], links: list[str]) -> None:
    for name, value in facts.items():
        if value:
            out.print(Text.assemble(("  " + name.ljust(11), "dim"), value), soft_wrap=True)
    for link in links:
        out.print(Text.assemble(("  " + "trace".ljust(11), "dim"), Text(link, style=f"link {link}")), soft_wrap=True)


def _with_fields(source: str, correlation: Any) -> str:
    fields = ", ".join(f"{name}={value}" for name, value in correlation.items()) if isinstance(correlation, dict) else ""
    return console.clean(f"{source} ({fields})" if fields else source)


def _print_attempt(out: Console, attempt: AttemptRecord) -> None:
    head = Text.assemble(("\nattempt " + str(attempt.attempt), "bold"), "  ", state_text(attempt.state, attempt.classification))
    if attempt.duplicate:
        head.append("  duplicate, after the success", style="yellow")
    out.print(head, soft_wrap=True)
    progress, output, observed = (records.attempt_json(attempt)[name] for name in ("progress", "output", "observed"))
    time_taken = took(attempt.started_unix_ns, attempt.ended_unix_ns, goes_on=True)
    reconciled = attempt.reconciled_unix_ns
    facts = {
        "started": f"{console.local_time(attempt.started_unix_ns)}, {'ran' if attempt.ended_unix_ns else 'runs for'} {time_taken}",
        "worker": worker(attempt),
        "deadline": console.local_time(attempt.deadline_unix_ns),
        "closed by": f"{attempt.finalized_by or ''}{'' if reconciled is None else ' at ' + console.local_time(reconciled)}",
        "error": error_text(attempt.error_type, attempt.error_message),
        "progress": _progress(progress),
        "output": _shown(output),
        "observed": _shown(observed),
        "outer": " ".join(filter(None, (attempt.outer_outcome, error_text(attempt.outer_error_type, attempt.outer_error_message)))),
        "span": f"{attempt.trace_id} {attempt.span_id}" if attempt.span_id else "none, the trace is not sampled",
    }
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", no_wrap=True, min_width=12)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value:
            table.add_row(Text("  " + name), Text(value))
    out.print(table)


def _shown(value: Any) -> str:
    return "" if value is None else console.clean(json.dumps(value, ensure_ascii=False))


def _progress(marker: Any) -> str:
    """Write a marker as `block 3 (3 of 9) at 2026-...`; one of another shape as it is."""
    if not isinstance(marker, dict) or "message" not in marker:
        return _shown(marker)
    done, total, at = (marker.get(name) for name in ("done", "total", "at_unix_ns"))
    count = "" if done is None else f" ({done} of {total})" if total is not None else f" ({done})"
    return console.clean(f"{marker['message']}{count}") + (f" at {console.local_time(at)}" if isinstance(at, int) else "")
