"""After the kill: bring a store to rest, and hold its records, its spans and what was seen against each other."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from otelexec import identity, semconv
from otelexec.decoded import DecodedSpan, decode
from otelexec.reconcile import Reconciler
from otelexec.store.base import Store
from otelexec.store.spool import Spool
from otelexec.store.upkeep import ClaimOutbox, ReleaseClaims, SettleOutbox
from otelexec.store.writes import Heartbeat
from tests import stores
from tests.acceptance.scenarios import OUTSIDE
from tests.stores import Place

ENDED = frozenset({"succeeded", "failed", "timed_out", "cancelled", "paused", "rejected", "lost"})

NONE: Final[Mapping[str, int]] = {}


def reconciler(store: Store, spool: Path) -> Reconciler:
    """Give a reconciler with the store's spool, as the command has it."""
    process = identity.this_process(identity.mint_process_id(), lease_seconds=30, resource=b"", scope=b"")
    store.announce = lambda: (Heartbeat(process),)
    return Reconciler(store, Spool(spool, lambda: process), own=process.process_id)


def drained(store: Store) -> list[DecodedSpan]:
    """Take everything out of the outbox as a relay would, and give it as a receiver would see it."""
    [freed] = store.commit([ReleaseClaims(store.claim_owners())], durable=False, timeout_seconds=5)
    assert isinstance(freed, int)
    found: list[DecodedSpan] = []
    while True:
        [rows] = store.commit([ClaimOutbox("test", 60)], durable=False, timeout_seconds=5)
        assert isinstance(rows, list)
        if not rows:
            return found
        found += [span for row in rows for span in decode(row.request)]
        store.commit([SettleOutbox("test", delivered=[row.id for row in rows])], durable=False, timeout_seconds=5)


def settle(place: Place, *, drain_first: bool) -> list[DecodedSpan]:
    """Reconcile and drain, in either order, and give every span that left."""
    store = stores.opened(place.url)
    delivered = drained(store) if drain_first else []
    reconciler(store, place.spool).run_once()
    delivered += drained(store)
    store.close()
    return delivered


@dataclass(slots=True)
class Found:
    """
    What a comparison found.

    Attributes:
        failures: Each disagreement as a sentence; the name of the process that it is about in front, where known.
        attempts: How many attempts were compared.
    """

    failures: list[str] = field(default_factory=list)
    attempts: int = 0


def disagreements(place: Place, delivered: Iterable[DecodedSpan], *, repeats: Mapping[str, int] = NONE) -> Found:
    """
    Compare every record with the spans that were delivered, and with the ledger, where there is one.

    Args:
        place: The store, settled.
        delivered: Every span that left, repeats included.
        repeats: How many killed relays had a span in hand, by its id: so often its bytes may have arrived again.
    """
    found = Found()
    spans: dict[tuple[str, str], DecodedSpan] = {}
    again: Counter[str] = Counter()
    for span in delivered:
        before = spans.setdefault((span.trace_id, span.span_id), span)
        if before is span:
            continue
        again[span.span_id] += 1
        if before.encoded != span.encoded:
            found.failures.append(f"{_whose(span)}: span {span.name} {span.span_id} was sent twice, with other bytes")
        elif again[span.span_id] > repeats.get(span.span_id, 0):
            found.failures.append(f"{_whose(span)}: span {span.name} {span.span_id} was sent again, and no relay died with it in hand")
    unexplained = {key for key, span in spans.items() if semconv.OUTCOME in span.attributes or semconv.OUTER_OUTCOME in span.attributes}
    store = stores.opened(place.url, create=False)
    records = {record.execution_id: record for record in store.executions()}
    store.close()
    for record in records.values():
        _check_execution(record, found)
        if record.producer_span_id is not None and (record.producer_trace_id, record.producer_span_id) not in spans:
            found.failures.append(f"{record.execution_id}: its PRODUCER span is missing")
        for attempt in record.attempts:
            found.attempts += 1
            _check_attempt(record, attempt, spans, unexplained, found)
    found.failures += [f"{_whose(spans[key])}: span {spans[key].name} {key[1]} has no record" for key in unexplained]
    _check_parents(spans, found)
    _check_rest(place, found)
    if place.ledger.exists():
        _check_ledger(place.ledger, records, found)
    return found


def _whose(span: DecodedSpan) -> str:
    return str(span.attributes.get(semconv.EXECUTION_ID) or span.attributes.get(semconv.REQUEST_ID) or span.trace_id)


def _check_execution(record: Any, found: Found) -> None:
    numbers = [attempt.attempt for attempt in record.attempts]
    if numbers != list(range(1, len(numbers) + 1)):
        found.failures.append(f"{record.execution_id}: its attempts are numbered {numbers}")
    own = [attempt for attempt in record.attempts if not attempt.duplicate]
    if not own:
        expected = {"queued", "rejected"}
    elif any(attempt.state == "succeeded" for attempt in own):
        expected = {"succeeded"}
    elif any(attempt.state == "cancelled" and attempt.classification is None for attempt in own):
        expected = {"cancelled"}
    else:
        expected = {own[-1].state, "retrying"} if own[-1].state in ("failed", "lost") else {own[-1].state}
    if record.state not in expected:
        found.failures.append(f"{record.execution_id}: it is {record.state} with attempts {[a.state for a in record.attempts]}")


def _check_attempt(
    record: Any, attempt: Any, spans: dict[tuple[str, str], DecodedSpan], unexplained: set[tuple[str, str]], found: Found
) -> None:
    name = f"{record.execution_id} attempt {attempt.attempt}"
    if attempt.state not in ENDED or attempt.ended_unix_ns is None:
        found.failures.append(f"{name}: it is still {attempt.state}")
        return
    span = spans.get((attempt.trace_id, attempt.span_id))
    unexplained.discard((attempt.trace_id, attempt.span_id))
    if span is None:
        found.failures.append(f"{name}: its span {attempt.span_id} is missing; the record says {attempt.state}")
    else:
        says = {
            "outcome": (span.attributes.get(semconv.OUTCOME), attempt.state),
            "start": (span.start_unix_ns, attempt.started_unix_ns),
            "end": (span.end_unix_ns, attempt.ended_unix_ns),
            "execution id": (span.attributes.get(semconv.EXECUTION_ID), record.execution_id),
            "attempt": (span.attributes.get(semconv.ATTEMPT, attempt.attempt), attempt.attempt),
            "classification": (span.attributes.get(semconv.CLASSIFICATION), attempt.classification),
            "error type": (span.attributes.get(semconv.ERROR_TYPE), attempt.error_type),
            "status": (span.status, "error" if attempt.state in ("failed", "timed_out", "lost", "rejected") else "unset"),
        }
        found.failures += [
            f"{name}: {what}: the span says {ours}, the record {theirs}" for what, (ours, theirs) in says.items() if ours != theirs
        ]
    if attempt.outer_span_id is not None:
        outer = spans.get((attempt.trace_id, attempt.outer_span_id))
        unexplained.discard((attempt.trace_id, attempt.outer_span_id))
        if outer is None:
            found.failures.append(f"{name}: its outer span {attempt.outer_span_id} is missing; the record says {attempt.outer_outcome}")
        elif (outer.attributes.get(semconv.OUTER_OUTCOME), outer.end_unix_ns) != (attempt.outer_outcome, attempt.outer_ended_unix_ns):
            found.failures.append(f"{name}: its outer span says {outer.attributes}, the record {attempt.outer_outcome}")
        elif outer.start_unix_ns != attempt.outer_started_unix_ns or semconv.OUTCOME in outer.attributes:
            found.failures.append(f"{name}: its outer span has another start, or the outcome of an attempt")
    if attempt.observed is not None:
        unexplained.discard((attempt.trace_id, json.loads(attempt.observed)["span_id"]))


def _check_parents(spans: dict[tuple[str, str], DecodedSpan], found: Found) -> None:
    outside = tuple(OUTSIDE.split("-")[1:3])
    for (trace_id, _), span in spans.items():
        parent = span.parent_span_id
        if parent is not None and (trace_id, parent) not in spans and (trace_id, parent) != outside:
            found.failures.append(f"{_whose(span)}: span {span.name} has no parent {parent}")


def _check_rest(place: Place, found: Found) -> None:
    for table in ("outbox", "claim", "open_span", "parked"):
        [[count]] = stores.rows(place.url, f"SELECT COUNT(*) FROM {table}")
        if count:
            found.failures.append(f"{count} rows are left in {table}")
    if not stores.is_postgres(place.url):
        [[fine]] = stores.rows(place.url, "PRAGMA integrity_check")
        if fine != "ok":
            found.failures.append(f"the file is damaged: {fine}")
    left = [file.name for file in place.spool.glob("*") if file.name != ".lock" and file.suffix != ".damaged"]
    if left:
        found.failures.append(f"the spool still holds {left}")


def _check_ledger(ledger: Path, records: dict[str, Any], found: Found) -> None:
    seen: Counter[str] = Counter()
    for line in ledger.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        seen[entry["event"]] += 1
        who = f"{entry['process']} ({entry['id']} attempt {entry['attempt']})"
        record = records.get(entry["id"])
        if record is None:
            found.failures.append(f"{who}: {entry['event']}, and there is no record")
            continue
        if entry["event"] == "published":
            continue
        attempts = [attempt for attempt in record.attempts if entry["attempt"] in (0, attempt.attempt)]
        if not attempts:
            found.failures.append(f"{who}: {entry['event']}, and there is no such attempt")
        elif entry["event"] == "returned" and entry["state"] not in {attempt.state for attempt in attempts}:
            found.failures.append(f"{who}: it returned as {entry['state']}, and is recorded as {[a.state for a in attempts]}")
    if not seen:
        found.failures.append("nothing was seen at all")
