"""Fills a PostgreSQL store with as many executions as it has after years, by a few statements on the server."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import psycopg

from otelexec import identity, otlp
from otelexec.store.writes import Heartbeat
from tests.benchmarks.sample import ended_span

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from otelexec.store.postgres import PostgresStore

EPOCH_NS: Final = 1_700_000_000_000_000_000
"""When the first execution started; each of the next starts a millisecond later and takes a second."""

_MANY: Final = 500_000  # from here on, building the indexes afterwards is faster

# {state} and {process} are expressions over `i`, the execution's number from {first} on, and `n`, the last one's.
_NUMBERS: Final = """(SELECT i, n, {state} AS state FROM
    (SELECT i, {first}::bigint + {count} - 1 AS n FROM generate_series({first}::bigint, {first} + {count} - 1) i) numbers) rows"""

_EXECUTIONS: Final = f"""
INSERT INTO execution (execution_id, name, state, request_id, source, correlation, started_unix_ns, ended_unix_ns, attempts, latest)
SELECT '0193' || lpad(to_hex(i), 32, '0'), 'invoice.run', state, '0194' || lpad(to_hex(i), 32, '0'), 'direct', '{{{{}}}}',
    {EPOCH_NS} + i * 1000000, CASE WHEN state NOT IN ('running', 'paused') THEN {EPOCH_NS} + i * 1000000 + 1000000000 END, 1, 1
FROM {_NUMBERS}"""

_ATTEMPTS: Final = f"""
INSERT INTO attempt (execution_id, attempt, token, process_id, state, duplicate, trace_id, span_id, span_start, started_unix_ns,
                     ended_unix_ns)
SELECT '0193' || lpad(to_hex(i), 32, '0'), 1, lpad(to_hex(i), 32, '0'), {{process}}, state, 0, lpad(to_hex(i), 32, '0'),
    lpad(to_hex(i), 16, '0'), CASE WHEN state = 'running' THEN $1 END,
    {EPOCH_NS} + i * 1000000, CASE WHEN state <> 'running' THEN {EPOCH_NS} + i * 1000000 + 1000000000 END
FROM {_NUMBERS}"""


@dataclass(frozen=True, slots=True)
class Rows:
    """
    What to fill in.

    Attributes:
        count: How many executions, each with one attempt.
        state: SQL that gives the state of number `i` of `n`.
        process: SQL that gives the process of its attempt.
        first: The number of the first.
    """

    count: int
    state: str
    process: str
    first: int = 1


def execution_id(number: int) -> str:
    """Give the id of an execution by its number."""
    return f"0193{number:032x}"


def fill(connection: psycopg.Connection[Any], rows: Rows) -> None:
    """
    Add executions.

    Args:
        connection: Of the tables' owner, with the store's schema in its search path, in autocommit mode.
        rows: What to add.
    """
    values = {"count": rows.count, "first": rows.first, "state": rows.state, "process": rows.process}
    if rows.count < _MANY:
        _insert(connection, values)
    else:
        with _without_indexes(connection):
            _insert(connection, values)


def _insert(connection: psycopg.Connection[Any], values: dict[str, Any]) -> None:
    connection.execute(_EXECUTIONS.format(**values).encode())
    # Raw: the expressions may hold a percent sign.
    psycopg.RawCursor(connection).execute(_ATTEMPTS.format(**values).encode(), (otlp.encode_start(ended_span()),))


@contextmanager
def _without_indexes(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Drop the indexes of both tables and make the same ones again at the end."""
    tables = ["execution", "attempt"]
    constraints = connection.execute(
        """SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
           WHERE conrelid::regclass::text = ANY(%s) AND contype IN ('p', 'u')""",
        (tables,),
    ).fetchall()
    indexes = connection.execute(
        """SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid::regclass::text = ANY(%s)
           AND indexrelid NOT IN (SELECT conindid FROM pg_constraint)""",
        (tables,),
    ).fetchall()
    for table, name, _ in constraints:
        connection.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}".encode())
    for name, _ in indexes:
        connection.execute(f"DROP INDEX {name}".encode())
    yield
    connection.execute("SET maintenance_work_mem = '512MB'")
    for table, name, definition in constraints:
        connection.execute(f"ALTER TABLE {table} ADD CONSTRAINT {name} {definition}".encode())
    for _, definition in indexes:
        connection.execute(definition.encode())


def fill_undelivered(connection: psycopg.Connection[Any], count: int, process: str) -> None:
    """
    Add spans that wait for the relay, as many that are open, and as many outer executors that have not ended: of the newest executions.

    Args:
        connection: As for `fill`.
        count: How many of each.
        process: SQL that gives the process which has the open spans, of the execution with number `e.seq`.
    """
    connection.execute(
        """INSERT INTO outbox (request, count, execution_id, written_unix_ns)
           SELECT decode(repeat('00', 500), 'hex'), 1, e.execution_id, e.started_unix_ns FROM execution e ORDER BY e.seq DESC LIMIT %s""",
        (count,),
    )
    start = otlp.encode_start(ended_span())
    psycopg.RawCursor(connection).execute(
        f"""INSERT INTO open_span (trace_id, span_id, process_id, execution_id, start)
           SELECT a.trace_id, 'a' || substr(a.span_id, 2), {process}, a.execution_id, $1
           FROM execution e JOIN attempt a USING (execution_id) ORDER BY e.seq DESC LIMIT $2""".encode(),
        (start, count),
    )
    connection.execute(
        """UPDATE attempt SET outer_token = 'o' || token, outer_trace_id = trace_id, outer_span_id = 'b' || substr(span_id, 2),
               outer_start = %s, outer_started_unix_ns = started_unix_ns
           WHERE execution_id IN (SELECT execution_id FROM execution WHERE state <> 'running' ORDER BY seq DESC LIMIT %s)""",
        (start, count),
    )


def processes_elsewhere(store: PostgresStore, names: Sequence[str], *, lease_seconds: float) -> None:
    """
    Add processes of another host, of which only the lease tells whether they live.

    Args:
        store: The store.
        names: Their ids.
        lease_seconds: Their lease; those named `dead-...` have not renewed it for long, the others never need to.
    """
    span = ended_span()
    here = identity.this_process(
        "",
        lease_seconds=lease_seconds,
        resource=otlp.encode_resource(span.resource),
        scope=otlp.encode_scope(span.instrumentation_scope),
    )
    there = [replace(here, process_id=name, host="elsewhere", boot_id="another boot") for name in names]
    store.commit([Heartbeat(process) for process in there], durable=False, timeout_seconds=5.0)


def settle_leases(connection: psycopg.Connection[Any]) -> None:
    """Make those named `dead-...` long silent, and the others alive for ever."""
    connection.execute("UPDATE process SET heartbeat_unix_ns = CASE WHEN process_id LIKE 'dead-%%' THEN 1 ELSE %s END", (2**62,))
