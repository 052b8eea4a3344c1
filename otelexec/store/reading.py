"""The queries, written once for every SQL store. Like the writes in `sql.py` they use nothing but their transaction."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar, Unpack

from otelexec import semconv
from otelexec.decoded import service_name
from otelexec.store.outbox_statements import chunks
from otelexec.store.records import AttemptRecord, ExecutionRecord, OpenWork, ParkedRow, Statistics, Wanted
from otelexec.store.rows import Cancellation, ProcessRow, SpanRow
from otelexec.store.schema import Transaction

Found = TypeVar("Found")

_PAGE = 200

_EXECUTIONS = """SELECT seq, execution_id, name, state, request_id, source, correlation, parent_execution_id,
    queued_unix_ns, started_unix_ns, ended_unix_ns, error_type, error_message, producer_trace_id, producer_span_id, snapshot
    FROM execution"""

_ATTEMPTS = """SELECT a.execution_id, a.attempt, a.state, a.duplicate, a.trace_id, a.span_id, a.started_unix_ns,
    a.ended_unix_ns, a.deadline_unix_ns, a.error_type, a.error_message, a.finalized_by, a.classification,
    a.reconciled_unix_ns, a.progress, a.output, a.observed, a.outer_span_id, a.outer_outcome, a.outer_started_unix_ns,
    a.outer_ended_unix_ns, a.outer_error_type, a.outer_error_message, p.host, p.pid, p.resource
    FROM attempt a LEFT JOIN process p ON p.process_id = a.process_id
    WHERE a.execution_id {among} ORDER BY a.execution_id, a.attempt"""

_OPEN_WORK = """
SELECT 'attempt', process_id, execution_id, token, attempt, trace_id, span_id, span_start, started_unix_ns,
    deadline_unix_ns, last_seen_unix_ns, progress,
    COALESCE((SELECT name FROM execution e WHERE e.execution_id = attempt.execution_id), '')
    FROM attempt WHERE state = 'running' AND process_id {among}
UNION ALL
SELECT 'outer', process_id, execution_id, outer_token, attempt, outer_trace_id, outer_span_id, outer_start,
    outer_started_unix_ns, NULL, COALESCE(ended_unix_ns, last_seen_unix_ns), NULL, '' FROM attempt
    WHERE outer_token IS NOT NULL AND outer_outcome IS NULL AND state <> 'running' AND process_id {among}
UNION ALL
SELECT 'span', process_id, COALESCE(execution_id, ''), '', 0, trace_id, span_id, start, 0, NULL, 0, NULL, ''
    FROM open_span WHERE process_id {among}
LIMIT ?"""


def _busy(name: str, table: str, condition: str) -> str:
    """Give a step through an index from one process id to the next: DISTINCT would visit every entry of it."""
    return f"""{name} (process_id) AS (
    SELECT MIN(process_id) FROM {table} WHERE {condition}
    UNION ALL SELECT (SELECT MIN(t.process_id) FROM {table} t WHERE t.process_id > {name}.process_id AND {condition})
    FROM {name} WHERE {name}.process_id IS NOT NULL)"""


_PROCESS = """SELECT process_id, host, boot_id, pid_namespace, pid, pid_start, lease_seconds, resource, scope, heartbeat_unix_ns, ended,
    clock_unix_ns, parent_pid, parent_start FROM process"""

_PROCESSES = f"""
WITH RECURSIVE {_busy("running", "attempt", "state = 'running'")},
{_busy("around", "attempt", "outer_token IS NOT NULL AND outer_outcome IS NULL")},
{_busy("spanning", "open_span", "1 = 1")}
{_PROCESS} WHERE process_id IN (
    SELECT process_id FROM running UNION SELECT process_id FROM around UNION SELECT process_id FROM spanning
    UNION SELECT owner FROM claim)"""


# Quotes inside a value are escaped, so that this finds nothing but a field. Both stores have REPLACE; neither has the other's INSTR.
_SINCE = "(queued_unix_ns >= ? OR started_unix_ns >= ? OR ended_unix_ns >= ?)"

_HAS_FIELD = "(correlation <> '{}' AND REPLACE(correlation, ?, '') <> correlation)"


def _field(name: str, value: str) -> str:
    """Give a field as it stands in the JSON text of a correlation."""
    return f"{json.dumps(name)}: {json.dumps(value)}"


class SqlReader(ABC):
    """The reading half of a store; each method reads in one transaction, `executions` in one for each page."""

    @abstractmethod
    def _reading(self) -> AbstractContextManager[Transaction]:
        """Give a transaction for reading; raises StoreError when there can be none."""

    @abstractmethod
    def _sizes(self, tx: Transaction, /) -> tuple[int, Mapping[str, int]]:
        """Give the size of the store and of its tables in bytes; no tables where they can't be told apart."""

    def read(self, query: Callable[[Transaction], Found]) -> Found:
        """
        Run queries in one transaction, and give what they found.

        Args:
            query: Takes the transaction; reads only.
        """
        with self._reading() as tx:
            return query(tx)

    def executions(self, *, limit: int | None = None, before: int | None = None, **wanted: Unpack[Wanted]) -> Iterator[ExecutionRecord]:
        """
        Give executions, the newest first.

        Args:
            limit: At most so many; None means all.
            before: Only those with a smaller `seq`; None means from the newest.
            **wanted: Which.
        """
        left = limit
        fields, since = wanted.pop("fields", None) or {}, wanted.pop("since_unix_ns", None)
        asked: list[tuple[str, tuple[object, ...]]] = [(f"{column} = ?", (value,)) for column, value in wanted.items() if value is not None]
        asked += [(_HAS_FIELD, (_field(*field),)) for field in fields.items()]
        if since is not None:
            asked.append((_SINCE, (since,) * 3))
        condition = " AND ".join(["seq < ?", *(one for one, _ in asked)])
        values = [value for _, values in asked for value in values]
        while left is None or left > 0:
            page = _PAGE if left is None else min(_PAGE, left)
            with self._reading() as tx:
                rows = tx.execute(
                    f"{_EXECUTIONS} WHERE {condition} ORDER BY seq DESC LIMIT ?", (2**62 if before is None else before, *values, page)
                ).fetchall()
                records = _complete(tx, rows)
            yield from records
            if len(records) < page:
                return
            before = records[-1].seq
            left = None if left is None else left - len(records)

    def execution(self, execution_id: str) -> ExecutionRecord | None:
        """Give one execution; None when it is not there."""
        with self._reading() as tx:
            rows = tx.execute(f"{_EXECUTIONS} WHERE execution_id = ?", (execution_id,)).fetchall()
            return next(iter(_complete(tx, rows)), None)

    def executions_of(self, known_as: str, *, limit: int) -> list[str]:
        """Give the ids of executions whose request, or whose message, has this id, the newest first."""
        with self._reading() as tx:
            rows = tx.execute(
                f"SELECT execution_id FROM execution WHERE request_id = ? OR {_HAS_FIELD} ORDER BY seq DESC LIMIT ?",
                (known_as, _field(semconv.MESSAGING_MESSAGE_ID, known_as), limit),
            ).fetchall()
            return [row[0] for row in rows]

    def ids_with_prefix(self, prefix: str, *, limit: int) -> list[str]:
        """Give the ids of executions that begin like this, in order."""
        with self._reading() as tx:
            # Ids are printable ASCII, so DEL is behind everything that may follow the prefix.
            rows = tx.execute(
                "SELECT execution_id FROM execution WHERE execution_id >= ? AND execution_id < ? ORDER BY execution_id LIMIT ?",
                (prefix, prefix + "\x7f", limit),
            ).fetchall()
            return [row[0] for row in rows]

    def outbox_rows(self) -> int:
        """Give how many rows wait for a relay or are in the hands of one; parked ones don't count."""
        with self._reading() as tx:
            return int(tx.execute("SELECT COUNT(*) FROM outbox").fetchone()[0])

    def processes(self) -> list[ProcessRow]:
        """Give the processes that have something open or hold a claim."""
        return self._processes(_PROCESSES)

    def every_process(self) -> list[ProcessRow]:
        """Give every process that has ever written here and was not pruned."""
        return self._processes(_PROCESS)

    def _processes(self, query: str) -> list[ProcessRow]:
        with self._reading() as tx:
            rows = tx.execute(query).fetchall()
            complete: list[Any] = [(*row[:7], bytes(row[7]), bytes(row[8]), row[9], bool(row[10]), *row[11:]) for row in rows]
            return [ProcessRow(*values) for values in complete]

    def open_work(self, process_ids: Sequence[str], *, limit: int) -> list[OpenWork]:
        """Give what these processes have open, attempts first."""
        with self._reading() as tx:
            among, ids = tx.among(process_ids)
            rows = tx.execute(_OPEN_WORK.format(among=among), (*ids, *ids, *ids, limit)).fetchall()
            return [
                OpenWork(
                    kind=row[0],
                    process_id=row[1],
                    execution_id=row[2],
                    token=row[3],
                    number=row[4],
                    span=None if row[6] is None or row[7] is None else SpanRow(row[5], row[6], bytes(row[7])),
                    started_unix_ns=row[8],
                    deadline_unix_ns=row[9],
                    last_seen_unix_ns=row[10],
                    progress=row[11],
                    name=row[12],
                )
                for row in rows
            ]

    def claim_owners(self) -> list[str]:
        """Give the process ids that hold claims on outbox rows."""
        with self._reading() as tx:
            return [row[0] for row in tx.execute("SELECT DISTINCT owner FROM claim").fetchall()]

    def ingested(self, segment: str) -> int:
        """Give how far a spool segment has been taken in, in bytes."""
        with self._reading() as tx:
            row = tx.execute("SELECT upto FROM ingested WHERE segment = ?", (segment,)).fetchone()
            return 0 if row is None else int(row[0])

    def cancellations(self, execution_ids: Sequence[str]) -> dict[str, Cancellation]:
        """Give the wishes to cancel among these executions."""
        found: dict[str, Cancellation] = {}
        with self._reading() as tx:
            for among, ids in chunks(tx, execution_ids):
                found.update(_cancellations(tx, among, ids))
        return found

    def held_requests(self, execution: ExecutionRecord) -> list[bytes]:
        """Give the encoded requests of this execution that are still in the outbox or parked."""
        with self._reading() as tx:
            rows = tx.execute(
                "SELECT request FROM outbox WHERE execution_id = ? UNION ALL SELECT request FROM parked WHERE execution_id = ?",
                (execution.execution_id, execution.execution_id),
            ).fetchall()
            return [bytes(row[0]) for row in rows]

    def statistics(self) -> Statistics:
        """Give what `doctor` shows."""
        with self._reading() as tx:
            tx.read_whole_tables()
            states = tx.execute("SELECT state, COUNT(*) FROM execution GROUP BY state ORDER BY state").fetchall()
            rows, spans, oldest = tx.execute("SELECT COUNT(*), COALESCE(SUM(count), 0), MIN(written_unix_ns) FROM outbox").fetchone()
            parked = tx.execute("SELECT id, count, reason, parked_unix_ns FROM parked ORDER BY id LIMIT 100").fetchall()
            parked_rows, parked_spans = tx.execute("SELECT COUNT(*), COALESCE(SUM(count), 0) FROM parked").fetchone()
            unseen = tx.execute(
                """SELECT c.execution_id FROM cancellation c JOIN execution e ON e.execution_id = c.execution_id
                   WHERE c.terminate = 1 AND e.state = 'running' ORDER BY c.execution_id LIMIT 100"""
            ).fetchall()
            size, tables = self._sizes(tx)
            return Statistics(
                executions=dict(states),
                outbox_rows=rows,
                outbox_spans=int(spans),
                outbox_oldest_unix_ns=oldest,
                claimed_rows=tx.execute("SELECT COUNT(*) FROM claim").fetchone()[0],
                parked=[ParkedRow(*row) for row in parked],
                parked_rows=parked_rows,
                parked_spans=int(parked_spans),
                processes=tx.execute("SELECT COUNT(*) FROM process WHERE ended = 0").fetchone()[0],
                queued_oldest_unix_ns=tx.execute("SELECT MIN(queued_unix_ns) FROM execution WHERE state = 'queued'").fetchone()[0],
                unseen_cancellations=[row[0] for row in unseen],
                size_bytes=size,
                table_bytes=tables,
            )


def _complete(tx: Transaction, rows: Sequence[Any]) -> list[ExecutionRecord]:
    """Complete rows of executions with their attempts and the wishes to cancel them."""
    if not rows:
        return []
    among, parameters = tx.among([row[1] for row in rows])
    attempts: dict[str, list[AttemptRecord]] = {}
    for execution_id, number, state, duplicate, *rest, resource in tx.execute(_ATTEMPTS.format(among=among), parameters).fetchall():
        values: Any = (number, state, bool(duplicate), *rest, None if resource is None else service_name(resource))
        attempts.setdefault(execution_id, []).append(AttemptRecord(*values))
    wishes = _cancellations(tx, among, parameters)
    complete: list[Any] = [(*row, wishes.get(row[1]), tuple(attempts.get(row[1], ()))) for row in rows]
    return [ExecutionRecord(*values) for values in complete]


def _cancellations(tx: Transaction, among: str, ids: Sequence[Any]) -> dict[str, Cancellation]:
    rows = tx.execute(f"SELECT execution_id, requested_unix_ns, terminate FROM cancellation WHERE execution_id {among}", ids).fetchall()
    return {row[0]: Cancellation.from_columns(row[1], row[2]) for row in rows}
