"""What tests read of a store: the records, and the spans that wait in its outbox."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from otelexec import runtime
from otelexec.decoded import DecodedSpan, decode
from otelexec.errors import StoreNotFound
from otelexec.store.records import AttemptRecord, ExecutionRecord
from tests import stores
from tests.patience import PATIENCE

T = TypeVar("T")

AMENDMENTS = {"result_not_stored", "callbacks_not_sent", "handler_failed"}
"""Classifications that a record gets after its span has left: the result is stored once the attempt is closed."""

ERRORS = {"failed", "timed_out", "lost", "rejected"}
"""States whose span has the status `error`."""


def until(condition: Callable[[], T], seconds: float = 10.0) -> T:
    """Wait until a condition is true and give its value; fails after `seconds`."""
    deadline = time.monotonic() + PATIENCE * seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            msg = f"not within {seconds:g} s"
            raise AssertionError(msg)
        time.sleep(0.005)
    return value


class Records:
    """
    The store of one test, read by a connection of its own.

    Args:
        store: The SQLite file, or a store's URL.
    """

    def __init__(self, store: Path | str) -> None:
        self.url = store if isinstance(store, str) else f"sqlite:///{store}"
        self._store = stores.opened(self.url, create=False)

    @property
    def path(self) -> Path:
        """The SQLite file."""
        return stores.sqlite_path(self.url)

    def all(self) -> list[ExecutionRecord]:
        """Give every record, the oldest first."""
        if runtime._current is not None:
            runtime._current.flush()
        try:
            return list(self._store.executions())[::-1]
        except StoreNotFound:
            return []

    def one(self) -> ExecutionRecord:
        """Give the only record."""
        (record,) = self.all()
        return record

    def named(self, name: str) -> ExecutionRecord:
        """Give the only record with this name."""
        (record,) = [record for record in self.all() if record.name == name]
        return record

    def attempt(self) -> AttemptRecord:
        """Give the only attempt of the only record."""
        (attempt,) = self.one().attempts
        return attempt

    def spans(self) -> list[DecodedSpan]:
        """Give every span in the outbox, in the order in which they got there."""
        if runtime._current is not None:
            runtime._current.flush()
        rows = stores.rows_or_none(self.url, "SELECT request FROM outbox ORDER BY id")
        return [span for (request,) in rows or () for span in decode(request)]

    def span(self, span_id: str | None) -> DecodedSpan:
        """Give the only span with this id."""
        (span,) = [span for span in self.spans() if span.span_id == span_id]
        return span

    def span_named(self, name: str) -> DecodedSpan:
        """Give the only span with this name."""
        (span,) = [span for span in self.spans() if span.name == name]
        return span

    def query(self, statement: str) -> list[tuple[object, ...]]:
        """Give the rows of a query."""
        return stores.rows(self.url, statement)

    def query_or_none(self, statement: str) -> list[tuple[object, ...]] | None:
        """Give the rows of a query; None while there is no store or no such table."""
        return stores.rows_or_none(self.url, statement)

    def check_agreement(self) -> None:
        """Check that every ended attempt has one span, that they say the same, and that no span is there twice."""
        spans = self.spans()
        twice = {span_id: count for span_id, count in Counter(span.span_id for span in spans).items() if count > 1}
        assert not twice
        by_id = {span.span_id: span for span in spans}
        told = set()
        for record in self.all():
            for attempt in record.attempts:
                if attempt.state == "running":
                    assert attempt.span_id not in by_id
                    continue
                assert attempt.ended_unix_ns is not None
                assert attempt.ended_unix_ns >= attempt.started_unix_ns
                if attempt.span_id is None:
                    continue
                span = by_id[attempt.span_id]
                told.add(attempt.span_id)
                assert span.attributes["otelexec.outcome"] == attempt.state
                assert span.attributes["otelexec.execution_id"] == record.execution_id
                assert (span.trace_id, span.start_unix_ns, span.end_unix_ns) == (
                    attempt.trace_id,
                    attempt.started_unix_ns,
                    attempt.ended_unix_ns,
                )
                assert span.status == ("error" if attempt.state in ERRORS else "unset")
                assert span.attributes.get("error.type") == attempt.error_type
                if attempt.classification not in AMENDMENTS:
                    assert span.attributes.get("otelexec.classification") == attempt.classification
                if attempt.outer_outcome is not None and attempt.outer_span_id is not None:
                    outer = by_id[attempt.outer_span_id]
                    assert "otelexec.outcome" not in outer.attributes
                    assert outer.attributes["otelexec.outer_outcome"] == attempt.outer_outcome
                    assert (outer.start_unix_ns, outer.end_unix_ns) == (attempt.outer_started_unix_ns, attempt.outer_ended_unix_ns)
        orphans = {
            span.span_id for span in spans if "otelexec.outcome" in span.attributes and "otelexec.observed_of" not in span.attributes
        }
        assert orphans == told

    def close(self) -> None:
        """Close the connection."""
        self._store.close()

    def __del__(self) -> None:
        """Close it also where nobody did: from Python 3.13 on sqlite3 warns of that."""
        self.close()
