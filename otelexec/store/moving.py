"""Moving a store over: everything that a SQLite file holds, into PostgreSQL, in one transaction."""

from __future__ import annotations

import contextlib
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from otelexec import identity
from otelexec.errors import StoreError, StoreUnavailable
from otelexec.store.postgres import PostgresStore
from otelexec.store.postgres_packing import without_nul
from otelexec.store.sqlite import SqliteStore

if TYPE_CHECKING:
    from otelexec.store.postgres_pool import Session

_MARK: Final = "moved store "

# Claims stay behind: whoever held them is gone. Keys that a store gives by itself are given anew, in the same order.
TABLES: Final = (
    ("process", "process_id"),
    ("execution", "seq"),
    ("attempt", "execution_id, attempt"),
    ("open_span", "trace_id"),
    ("outbox", "id"),
    ("parked", "id"),
    ("cancellation", "execution_id"),
    ("contribution", "join_key"),
    ("run", "seq"),
    ("run_key", "name"),
    ("run_batch", "batch_id"),
    ("run_packet", "name"),
    ("ingested", "segment"),
    ("written", "nonce"),
)
_OWN_KEYS: Final = {"execution": "seq", "outbox": "id", "run": "seq"}

_ONCE: Final = "INSERT INTO ingested (segment, upto, at_unix_ns) VALUES (?, 0, ?) ON CONFLICT (segment) DO NOTHING"


class _Table(NamedTuple):
    """One table on its way: its name, its columns without those that the target gives by itself, its rows in their order."""

    name: str
    columns: tuple[str, ...]
    rows: Iterator[Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Moved:
    """
    What became of a move.

    Attributes:
        rows: Rows written, by table; empty when an earlier move had got through already.
        left: Executions that the target had already, and which stay there as they were.
        aside: Where the source lies now.
    """

    rows: dict[str, int]
    left: int
    aside: Path


def move(source: SqliteStore, target: PostgresStore, *, advanced: Callable[[int], None] = lambda _: None) -> Moved:
    """
    Move everything from a SQLite store to a PostgreSQL one, and rename the file.

    May be repeated after it was killed at any point: either nothing had arrived, or all of it and it is not written again.

    Args:
        source: Where from; nobody may use it any more.
        target: Where to; what is there stays.
        advanced: Told of rows as they are read, how many.

    Raises:
        StoreError: A process that uses the source lives, one of them can't be used, or the target refuses a row; nothing was moved.
    """
    now = source.now_unix_ns()
    alive = [process for process in source.every_process() if not process.ended and identity.liveness(process, now) == "alive"]
    if alive:
        who = ", ".join(f"{process.pid} on {process.host}" for process in alive[:5])
        raise StoreUnavailable(f"{source.url} is in use by {len(alive)} processes ({who}): stop them first")
    source.close()
    path = source.path
    aside = path.with_name(f"{path.name}.moved-{time.strftime('%Y%m%dT%H%M%S')}")
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=5)) as connection:
            connection.execute("BEGIN IMMEDIATE")  # nobody writes until the target has it all
            rows, left = _copy(target, _name(connection), [_table(connection, *each, advanced) for each in TABLES])
            connection.execute("COMMIT")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        path.rename(aside)
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"{source.url}: {error}") from error
    return Moved(rows, left, aside)


def _name(connection: sqlite3.Connection) -> str:
    """Give the name under which the target remembers this file; it is made once and stays in the file."""
    found = connection.execute("SELECT segment FROM ingested WHERE segment LIKE ?", (_MARK + "%",)).fetchone()
    if found is not None:
        return str(found[0])
    name = _MARK + uuid.uuid4().hex
    connection.execute("INSERT INTO ingested (segment, upto, at_unix_ns) VALUES (?, 0, ?)", (name, time.time_ns()))
    connection.execute("COMMIT")
    connection.execute("BEGIN IMMEDIATE")
    return name


def _table(connection: sqlite3.Connection, name: str, order: str, advanced: Callable[[int], None]) -> _Table:
    own = _OWN_KEYS.get(name)
    columns = tuple(row[1] for row in connection.execute(f"PRAGMA table_info({name})") if row[1] != own)

    def rows() -> Iterator[Sequence[Any]]:
        cursor = connection.execute(f"SELECT {', '.join(columns)} FROM {name} ORDER BY {order}")
        while page := cursor.fetchmany(1000):
            yield from page
            advanced(len(page))

    return _Table(name, columns, rows())


def _copy(target: PostgresStore, name: str, tables: Sequence[_Table]) -> tuple[dict[str, int], int]:
    """Write all tables in one transaction, once; gives the rows written by table, and the executions that were there already."""
    counts: dict[str, int] = {}
    left = 0
    with target.moving() as (session, tx):
        if tx.execute(_ONCE, (name, tx.now_unix_ns())).rowcount:
            for table in tables:
                came, counts[table.name] = _copy_table(session, table)
                left += came - counts[table.name] if table.name == "execution" else 0
    return counts, left


def _copy_table(session: Session, table: _Table) -> tuple[int, int]:
    """Copy a table beside the real one, and from there what is not here yet; gives how many rows came and how many went in."""
    name, columns = table.name, ", ".join(table.columns)
    session.execute(f"CREATE TEMP TABLE came ON COMMIT DROP AS SELECT 0::bigint AS place, {columns} FROM {name} LIMIT 0".encode())
    came = 0
    with session.cursor() as cursor, cursor.copy(f"COPY came (place, {columns}) FROM STDIN".encode()) as copy:
        for row in table.rows:
            came += 1
            copy.write_row([came, *map(without_nul, row)])
    values, condition = columns, ""
    if name == "parked":  # its ids come from the outbox
        values = columns.replace("id,", "nextval(pg_get_serial_sequence('outbox', 'id')),", 1)
    elif name == "execution":
        session.execute("CREATE TEMP TABLE known ON COMMIT DROP AS SELECT execution_id FROM execution JOIN came USING (execution_id)")
    elif name == "attempt":
        condition = "WHERE execution_id NOT IN (SELECT execution_id FROM known)"
    insert = f"INSERT INTO {name} ({columns}) SELECT {values} FROM came {condition} ORDER BY place ON CONFLICT DO NOTHING"
    went = session.execute(insert.encode()).rowcount
    session.execute("DROP TABLE came")
    return came, went
