"""
The store for many machines: PostgreSQL, through psycopg 3 and its pool.

What PostgreSQL alone needs stands here and in the modules beside it: a commit whose answer is lost may have got through,
so that every write can be repeated; a server that crashes forgets what it committed without fsync in its last moments, so
that the process which wrote it writes it again; and a session belongs to nobody between two transactions.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg import errors as pg
from psycopg.pq import TransactionStatus

from otelexec.clock import monotonic
from otelexec.errors import StoreBusy, StoreError, StoreRejected, StoreUnavailable
from otelexec.settings import state_home
from otelexec.store import postgres_schema, sql
from otelexec.store.base import Receipt
from otelexec.store.postgres_errors import ERRORS, GONE, MOVED, REPEATABLE, ServerChanged, first_line, is_closed, is_refusal
from otelexec.store.postgres_packing import Packed, stretches, without_nul
from otelexec.store.postgres_pool import Place, Pool, Session
from otelexec.store.postgres_repeats import is_doubtful, looked_up
from otelexec.store.postgres_schema import NOW, SCHEMA, SERVER_CHANGED, STARTED
from otelexec.store.postgres_tail import Tail
from otelexec.store.reading import SqlReader
from otelexec.store.schema import Cursor, Transaction
from otelexec.store.upkeep import ClaimOutbox
from otelexec.store.writes import Heartbeat, OpenAttempt, Write

logger = logging.getLogger("otelexec.store")

LEAST_PATIENCE_SECONDS: Final = 1.0
"""How long an answer is waited for at the least: what a commit may take on a busy server is no outage."""

HASTY_PATIENCE_SECONDS: Final = 0.2
"""The same for who may not wait for others."""

_READ_SECONDS: Final = 10.0
_TRIES: Final = 4

# The others refuse some character of an error message or an output, and with it the record that it is in.
_ENCODINGS: Final = ("UTF8", "SQL_ASCII")

_stores: weakref.WeakSet[PostgresStore] = weakref.WeakSet()
# Pools of the process that this one was forked from; kept, so that nothing of them is ever closed here.
_inherited: list[object] = []

# Without statistics (after a restore, or before the first ANALYZE) the planner takes a few ids for a large part of a table.
_LOCAL: Final = (
    f"SET LOCAL search_path TO {SCHEMA}, pg_temp; SET LOCAL enable_seqscan TO off; "
    "SET LOCAL enable_hashjoin TO off; SET LOCAL enable_bitmapscan TO off; "
)
# Whatever the role's default: a lane is counted after its lock is there, in a newer snapshot than the transaction's first.
_BEGIN: Final = f"BEGIN ISOLATION LEVEL READ COMMITTED; {_LOCAL}"
# Also where the server or the role has it switched off; whatever is stronger than `on` stays.
_DURABLE: Final = "SELECT set_config('synchronous_commit', COALESCE(NULLIF(current_setting('synchronous_commit'), 'off'), 'on'), true); "
_NOT_DURABLE: Final = "SET LOCAL synchronous_commit TO off; "
_BEGIN_READING: Final = f"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {_LOCAL}"
_LOOK: Final = f"SELECT {NOW}, {STARTED}"
_GREETING: Final = (
    f"SELECT {NOW}, {STARTED}, extract(epoch FROM current_setting('wal_writer_delay')::interval)::float8, "
    "current_setting('server_encoding')"
)
_RIGHTS: Final = """
    SELECT current_setting('transaction_read_only'), string_agg(what, ', ' ORDER BY what) FROM (
        SELECT 'table ' || relname FROM pg_class WHERE relnamespace = to_regnamespace($1) AND relkind = 'r' AND NOT
            (has_table_privilege(oid, 'SELECT') AND has_table_privilege(oid, 'INSERT')
             AND has_table_privilege(oid, 'UPDATE') AND has_table_privilege(oid, 'DELETE'))
        UNION ALL
        SELECT 'function ' || proname FROM pg_proc WHERE pronamespace = to_regnamespace($1) AND NOT has_function_privilege(oid, 'EXECUTE')
    ) AS missing (what)
"""
_SEE_README: Final = "README, PostgreSQL, has the rights that a role needs"


@lru_cache(maxsize=256)
def _numbered(statement: str) -> bytes:
    """Give a statement with PostgreSQL's own placeholders, $1, $2 and so on, for the shared ones."""
    places = count(1)
    return "".join(f"${next(places)}" if part == "?" else part for part in statement.replace("?", "\0?\0").split("\0")).encode()


class _Transaction:
    __slots__ = ("_now", "_session", "lock", "skip_locked")

    def __init__(self, session: Session, now: int) -> None:
        self._session = session
        self._now = now
        self.lock = "FOR UPDATE"
        self.skip_locked = "FOR UPDATE OF o SKIP LOCKED"

    def execute(self, statement: str, parameters: Sequence[Any] = (), /) -> Cursor:
        return self._session.execute(_numbered(statement), [without_nul(each) for each in parameters] or None)

    def read_whole_tables(self) -> None:
        self._session.execute("SET LOCAL enable_seqscan TO on")

    def among(self, values: Sequence[Any]) -> tuple[str, Sequence[Any]]:
        return "= ANY(?)", ([without_nul(each) for each in values],)

    def now_unix_ns(self) -> int:
        return self._now


class PostgresStore(SqlReader):
    """
    A store in a PostgreSQL database, in a schema named `otelexec`.

    Args:
        url: A `postgresql://` URL as libpq reads it; several hosts and TLS options included.
        create: Whether to make the schema where none is; readers don't.
        patience_seconds: How long an answer of the server is waited for at the least.

    Raises:
        SettingsError: libpq can't read the URL.
    """

    def __init__(self, url: str, *, create: bool = True, patience_seconds: float = LEAST_PATIENCE_SECONDS) -> None:
        self.announce: Callable[[], Sequence[Write]] = tuple
        self._create = create
        self._patience = patience_seconds
        self._place = Place(url, writes=create)
        self._pool = Pool(self._place, self._greet)
        self._tail = Tail()
        self._restoring = threading.Lock()
        self._announced = False
        # When the server that sessions reach was started, and since when leases could be renewed there, on its clock.
        self._server = 0
        self._restored = 0
        self._up_since = 0
        _stores.add(self)

    @property
    def url(self) -> str:
        """Give the store's URL without password and options."""
        return self._place.shown

    @property
    def spool_folder(self) -> Path:
        """Give the folder for what could not be written here: one for each database, in the user's state folder."""
        return state_home() / f"postgres-{self._place.key}.spool"

    def _greet(self, session: Session) -> None:
        session.give_up_at = monotonic() + _READ_SECONDS
        [[now, started, delay, encoding]] = session.execute(_GREETING).fetchall()
        if encoding not in _ENCODINGS:
            raise StoreUnavailable(f"{self.url}: the database's encoding is {encoding}; otelexec needs one that was created with UTF8")
        postgres_schema.ensure(session, self.url, create=self._create)
        self._tail.keep_for(delay)
        self._saw(now, started)

    def _saw(self, now: int, started: int) -> None:
        if started != self._server:
            # The first server was up before; with another one, leases count from the moment that it is seen.
            self._up_since = now if self._server else started * 1000
            self._restored = self._restored if self._server else started
            self._server = started

    # Writing

    def commit(self, writes: Sequence[Write], *, durable: bool, timeout_seconds: float, receipt: Receipt | None = None) -> list[object]:
        """
        Commit all writes in one transaction; see `base.Store.commit`.

        Args:
            writes: What to write.
            durable: Whether it must survive a crash of the server.
            timeout_seconds: How long to wait for a connection, and for an answer if that is longer than the store's patience.
            receipt: A new one to fill in; None: nobody asks.
        """
        receipt = receipt or Receipt()
        if receipt.committed:
            return receipt.results
        durable = durable or any(map(_needs_fsync, writes))
        patience = max(timeout_seconds, self._patience) if timeout_seconds > 0 else HASTY_PATIENCE_SECONDS
        deadline = monotonic() + patience
        may_reconnect = timeout_seconds > 0
        for left in reversed(range(_TRIES)):
            try:
                with self._pool.session(timeout_seconds) as session:
                    session.give_up_at = deadline
                    self._restore(session, timeout_seconds)
                    mark = self._tail.mark()
                    results = self._commit(session, writes, durable=durable)
                    made = [write for write, result in zip(writes, results, strict=True) if not isinstance(result, StoreRejected)]
                    self._tail.committed(made, mark, durable=durable)
            except ERRORS as error:
                closed = may_reconnect and is_closed(error)
                if not left or monotonic() >= deadline or not (closed or isinstance(error, REPEATABLE)):
                    raise self._failure(error) from error
                if closed:  # while it stood idle, maybe: by a restart that is over, a firewall, a timeout of the server's
                    may_reconnect = False
                    self._pool.replace()
                # Also an earlier try whose answer was lost, and which the server was still at: now it can be found.
                writes = [replace(write, repeated=True) if isinstance(write, OpenAttempt) else write for write in writes]
            else:
                receipt.results.extend(results)
                receipt.committed.append(True)
                break
        return receipt.results

    def check_writable(self, *, timeout_seconds: float) -> None:
        """Ask for every right that a worker needs; see `base.Store.check_writable`."""
        try:
            with self._pool.session(timeout_seconds) as session:
                session.give_up_at = monotonic() + _READ_SECONDS
                [[read_only, missing]] = session.execute(_RIGHTS, (SCHEMA,)).fetchall()
        except ERRORS as error:
            raise self._failure(error) from error
        if read_only == "on":
            raise StoreUnavailable(f"{self.url}: the server, the database or the role is read-only")
        if missing:
            raise StoreUnavailable(f"{self.url}: permission denied for {missing}; {_SEE_README}")

    def _restore(self, session: Session, timeout_seconds: float) -> None:
        """Write again what a server that crashed may have forgotten, before anything that builds on it."""
        if self._restored == self._server:
            return
        if not self._restoring.acquire(timeout=timeout_seconds if timeout_seconds > 0 else -1, blocking=timeout_seconds > 0):
            raise StoreBusy(f"{self.url}: another thread writes again what the server has lost")
        try:
            server, writes = self._server, self._tail.writes()
            self._commit(session, [*self.announce(), *writes], durable=True)
            self._restored = server
            self._announced = True
            if writes:
                logger.warning("otelexec.store.restored: %s was started anew; %d recent writes were made again", self.url, len(writes))
        finally:
            self._restoring.release()

    def _commit(self, session: Session, writes: Sequence[Write], *, durable: bool) -> list[object]:
        try:
            return self._together(session, writes, durable=durable)
        except ERRORS as error:
            if not is_refusal(error):
                raise
        results: list[object] = [None] * len(writes)
        with self._transaction(session, durable=durable) as tx:
            for place, write in enumerate(writes):
                results[place] = self._apart(tx, write)
        return results

    def _together(self, session: Session, writes: Sequence[Write], *, durable: bool) -> list[object]:
        """Commit the writes in order, packed where they can be; one packed stretch alone is a transaction by itself."""
        results: list[object] = [None] * len(writes)
        in_doubt = len(writes) > 1 and any(map(is_doubtful, writes))
        pending = [] if in_doubt else stretches(writes)
        if self._announced and len(pending) == 1 and pending[0][0]:
            left = self._call(session, Packed(writes, pending[0][1]), results, durable=durable)
            if not left:
                return results
            pending = [(False, left)]
        with self._transaction(session, durable=durable) as tx:
            if not self._announced:
                for write in self.announce():
                    sql.apply(tx, write)
            if in_doubt:
                found = looked_up(tx, writes)
                for place, result in found.results.items():
                    results[place] = result
                writes, pending = found.writes, stretches(found.writes, but=found.results, alone=found.executions)
            for can_be_packed, places in pending:
                left = self._call(session, Packed(writes, places), results, durable=durable) if can_be_packed else places
                for place in left:
                    results[place] = sql.apply(tx, writes[place])
        self._announced = True
        return results

    def _call(self, session: Session, packed: Packed, results: list[object], *, durable: bool) -> list[int]:
        try:
            rows = session.call(*packed.statement(durable=durable, server=self._server))
        except psycopg.Error as error:
            if error.diag.sqlstate != SERVER_CHANGED:
                raise
            _roll_back(session)
            self._saw(*_last(session.execute(_LOOK)))
            raise ServerChanged("the server was started anew") from error
        return packed.settle(rows, results)

    def _apart(self, tx: Transaction, write: Write) -> object:
        """Make a write that the store may refuse, without taking the others with it."""
        tx.execute("SAVEPOINT apart")
        try:
            result: object = sql.apply(tx, write)
        except ERRORS as error:
            if not is_refusal(error):
                raise
            tx.execute("ROLLBACK TO apart")
            reason = first_line(error)
            result = StoreRejected(f"{self.url} refused {type(write).__name__}: {reason}", reason=reason)
        tx.execute("RELEASE apart")
        return result

    @contextlib.contextmanager
    def _transaction(self, session: Session, *, durable: bool) -> Iterator[_Transaction]:
        try:
            now, started = _last(session.execute(f"{_BEGIN}{_DURABLE if durable else _NOT_DURABLE}{_LOOK}"))
            if started != self._server:
                self._saw(now, started)
                raise ServerChanged("the server was started anew")
            yield _Transaction(session, now)
            session.execute("COMMIT")
        except BaseException:
            _roll_back(session)
            raise

    def _failure(self, error: Exception) -> StoreError:
        """Give what to tell the caller, and give up sessions that won't serve again."""
        if isinstance(error, pg.InsufficientPrivilege):
            return StoreUnavailable(f"{self.url}: {first_line(error)}; {_SEE_README}")
        if isinstance(error, GONE):
            # Dropped under us: what is committed from here on goes to the schema that the next session makes.
            logger.warning("otelexec.store.replaced: the schema %s in %s is gone", SCHEMA, self.url)
            self._announced = False
        if is_closed(error) or isinstance(error, (*GONE, *MOVED)):
            self._pool.replace()
        return StoreUnavailable(f"{self.url}: {first_line(error)}")

    # Reading

    def now_unix_ns(self) -> int:
        """Give the server's clock."""
        with self._reading() as tx:
            return tx.now_unix_ns()

    def up_since_unix_ns(self) -> int:
        """Give when the server was started, or when this process first saw that it is another one."""
        if not self._server:
            self.now_unix_ns()
        return self._up_since

    @contextlib.contextmanager
    def _reading(self) -> Iterator[_Transaction]:
        try:
            with contextlib.ExitStack() as stack:
                try:
                    session, now = self._begin_reading(stack)
                except ERRORS as error:
                    if not is_closed(error):
                        raise
                    self._pool.replace()
                    session, now = self._begin_reading(stack)
                try:
                    yield _Transaction(session, now)
                    session.execute("COMMIT")
                except BaseException:
                    _roll_back(session)
                    raise
        except ERRORS as error:
            raise self._failure(error) from error

    def _begin_reading(self, stack: contextlib.ExitStack) -> tuple[Session, int]:
        session = stack.enter_context(self._pool.session(_READ_SECONDS))
        session.give_up_at = monotonic() + _READ_SECONDS
        now, _ = _last(session.execute(_BEGIN_READING + _LOOK))
        return session, now

    def _sizes(self, tx: Transaction, /) -> tuple[int, Mapping[str, int]]:
        rows = tx.execute(
            """SELECT c.relname, pg_total_relation_size(c.oid) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
               WHERE n.nspname = ? AND c.relkind = 'r' ORDER BY 2 DESC, 1""",
            (SCHEMA,),
        ).fetchall()
        tables = dict(rows)
        return sum(tables.values()), tables

    @contextlib.contextmanager
    def moving(self) -> Iterator[tuple[Session, Transaction]]:
        """
        Give a durable transaction for as long as it takes, and its session, for what is no write of an execution.

        Raises:
            StoreError: It did not get through, and nothing was written.
        """
        try:
            with self._pool.session(_READ_SECONDS) as session:
                session.give_up_at = float("inf")
                with self._transaction(session, durable=True) as tx:
                    tx.read_whole_tables()
                    yield session, tx
        except ERRORS as error:
            raise self._failure(error) from error

    # Sessions

    def forget(self) -> None:
        """Forget inherited sessions without closing them, in a forked child."""
        _inherited.append(self._pool.forget())
        self._restoring = threading.Lock()

    def close(self) -> None:
        """Close every session; the store may be used again."""
        self._pool.close()


def _needs_fsync(write: Write) -> bool:
    """
    Tell whether a write is committed with fsync in any case: its flush makes all that came before it durable as well.

    What a relay claims leaves, and must not be forgotten after that; what a process that ends has written, nobody would write again.
    Once an exclusive attempt is forgotten, another worker begins one while the first is at work.
    """
    if isinstance(write, OpenAttempt):
        return write.exclusive
    return isinstance(write, ClaimOutbox) or (isinstance(write, Heartbeat) and write.ended)


def _last(cursor: psycopg.Cursor[Any]) -> Any:
    """Give the row of the last of several statements."""
    while cursor.nextset():
        pass
    return cursor.fetchone()


def _roll_back(session: Session) -> None:
    if session.pgconn.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
        with contextlib.suppress(psycopg.Error):
            session.execute("ROLLBACK")


def _after_fork_in_child() -> None:
    for store in list(_stores):
        store.forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
