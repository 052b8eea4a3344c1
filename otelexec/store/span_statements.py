"""The statements about spans that are open or have ended; as in `sql.py`."""

from __future__ import annotations

from collections.abc import Iterable

from otelexec.store.outbox_statements import add_row
from otelexec.store.rows import SpanRow
from otelexec.store.schema import Transaction
from otelexec.store.writes import NO_SPANS, AddSpans


def columns_of(span: SpanRow | None) -> tuple[str | None, str | None, bytes | None]:
    """Give trace id, span id and start of a span; None for each of one that is not sampled."""
    return (None, None, None) if span is None else (span.trace_id, span.span_id, span.start)


def record_open(tx: Transaction, spans: Iterable[SpanRow], process_id: str, execution_id: str | None) -> None:
    """Record spans as open, for whoever ends those of a process that has died."""
    for span in spans:
        tx.execute(
            """INSERT INTO open_span (trace_id, span_id, process_id, execution_id, start) VALUES (?, ?, ?, ?, ?)
               ON CONFLICT (trace_id, span_id) DO NOTHING""",
            (span.trace_id, span.span_id, process_id, execution_id, span.start),
        )


def add_spans(tx: Transaction, write: AddSpans, *, counted: bool = False) -> None:
    """Put ended spans into the outbox; `counted` when the plain ones went in with their execution."""
    if write is NO_SPANS:
        return
    first = counted or _is_first(tx, write.nonce)
    if write.count and not counted and first:
        add_row(tx, write.request, write.count, write.execution_id)
    for span, request in write.recorded:
        if tx.execute("DELETE FROM open_span WHERE trace_id = ? AND span_id = ?", (span.trace_id, span.span_id)).rowcount:
            add_row(tx, request, 1, write.execution_id)
    if first:
        record_open(tx, write.opened, write.process_id, write.execution_id)
    if write.last_end_unix_ns and write.execution_id is not None:
        tx.execute(
            """UPDATE attempt SET last_seen_unix_ns = ?
               WHERE execution_id = ? AND process_id = ? AND state = 'running' AND last_seen_unix_ns < ?""",
            (write.last_end_unix_ns, write.execution_id, write.process_id, write.last_end_unix_ns),
        )


def _is_first(tx: Transaction, nonce: str) -> bool:
    return not nonce or bool(tx.execute("INSERT INTO written (nonce) VALUES (?) ON CONFLICT (nonce) DO NOTHING", (nonce,)).rowcount)
