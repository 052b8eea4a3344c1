"""
The connections of one process to one PostgreSQL server: psycopg's pool, with what a store needs beyond it.

A wait ends when the caller's time is over, also for an answer that never comes. The pool's own locks and books don't stand
a signal handler that raises in the middle of them, nor a call from the garbage collector in the thread that holds them: a
pool that was disturbed is replaced, and who must not wait is turned away while its thread is inside.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode

import psycopg
from psycopg import conninfo as _conninfo
from psycopg import generators
from psycopg.errors import error_from_result
from psycopg.pq import Conninfo, ExecStatus, TransactionStatus
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from otelexec.clock import monotonic
from otelexec.errors import SettingsError, StoreBusy, StoreError, StoreUnavailable
from otelexec.store.postgres_errors import GaveUp, first_line

_Value = TypeVar("_Value")

MAX_SESSIONS: Final = 4
"""A process commits through one leader at a time; beside it there are a reconciler, a recovery and a reader at most."""

# Defaults of connections, which the URL may change. A server that is gone without a word is noticed within seconds, where
# TCP's own patience is a quarter of an hour (https://www.postgresql.org/docs/current/libpq-connect.html).
_PARAMETERS: Final[Mapping[str, Any]] = {
    "client_encoding": "UTF8",
    "connect_timeout": "5",
    "fallback_application_name": "otelexec",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}

_LOOK_SECONDS: Final = 0.05
# If for so long nobody got a connection and none failed either, signal handlers have taken them all out of the pool's books.
_STARVED_SECONDS: Final = 10.0

# What says where a database is, and the variables that libpq reads it from.
_PLACE: Final = {"host": "PGHOST", "hostaddr": "PGHOSTADDR", "port": "PGPORT", "dbname": "PGDATABASE", "service": "PGSERVICE"}

_names = itertools.count(1)


class Session(psycopg.Connection[Any]):
    """
    A connection whose waits end.

    Attributes:
        give_up_at: When to wait no longer for an answer, by `clock.monotonic()`.
    """

    give_up_at = float("inf")

    def call(self, statement: bytes, parameters: Sequence[bytes | None]) -> list[list[bytes | None]]:
        """
        Run one statement with parameters and results as text in UTF-8.

        A cursor's adaptation of types costs twice as much as all the rest of a small statement (75 against 33 us of CPU).

        Args:
            statement: With placeholders `$1` and so on.
            parameters: Their values; None is NULL.

        Returns:
            The rows; a NULL is None.

        Raises:
            psycopg.Error: It failed.
        """
        with self.lock:
            self.pgconn.send_query_params(statement, parameters)
            result = self.wait(generators.execute(self.pgconn))[-1]
        if result.status != ExecStatus.TUPLES_OK:
            raise error_from_result(result)
        return [[result.get_value(row, column) for column in range(result.nfields)] for row in range(result.ntuples)]

    def wait(self, gen: Generator[Any, Any, _Value], *args: Any, **kwargs: Any) -> _Value:
        """Wait for an answer, until `give_up_at`."""
        return super().wait(self._limited(gen), *args, **kwargs)

    def _limited(self, gen: Generator[Any, Any, _Value]) -> Generator[Any, Any, _Value]:
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                # psycopg comes by every tenth of a second with nothing in hand.
                if not ready and monotonic() >= self.give_up_at:
                    raise GaveUp("the server did not answer in time")
                wanted = gen.send(ready)
        except StopIteration as stop:
            value: _Value = stop.value
            return value


class _Quiet(logging.Filter):
    """Leaves out what the pool says of our connections: the store says it once, and with a remedy."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether the record is about somebody else's pool."""
        arguments = record.args if isinstance(record.args, tuple) else ()
        return not any(isinstance(each, Session) or (isinstance(each, str) and each.startswith("otelexec-")) for each in arguments)


logging.getLogger("psycopg.pool").addFilter(_Quiet())


class Place:
    """
    Where a store is, and how to get there.

    Args:
        url: A `postgresql://` URL as libpq reads it.
        writes: Whether sessions must be able to write: of several hosts, one that can is chosen.

    Attributes:
        shown: The URL without password and options, for people.
        key: Names the database, whoever logs in to it.

    Raises:
        SettingsError: It is none. The message repeats no part of it, since any part may hold a password.
    """

    def __init__(self, url: str, *, writes: bool) -> None:
        given = _read(url)
        if given is None:
            raise SettingsError(
                "OTELEXEC_STORE: this URL can't be read; write postgresql://USER:PASSWORD@HOST:PORT/DATABASE, "
                "with special characters percent-encoded"
            )
        place = {name: str(given[name]) for name in _PLACE if given.get(name)}
        self.key = hashlib.sha256(repr(sorted(_completed(place, given).items())).encode()).hexdigest()[:12]
        self.shown = _shown(place, str(given.get("user") or ""))
        parameters = {**_PARAMETERS, **given}
        if writes and "target_session_attrs" not in given and "," in place.get("host", place.get("hostaddr", "")):
            parameters["target_session_attrs"] = "read-write"
        self.conninfo = _conninfo.make_conninfo("", **parameters)


def _read(url: str) -> dict[str, Any] | None:
    """Give libpq's parameters; None where it can't read the URL, or reads a part of a password as something else."""
    try:
        given = _conninfo.conninfo_to_dict(url)
    except (psycopg.Error, ValueError):
        return None
    before = url.partition("?")[0].partition("://")[2]
    ports = str(given.get("port") or "").split(",")
    return None if before.count("@") > 1 or "@" in before.partition("/")[2] or not all(port.isdigit() for port in ports if port) else given


def _completed(place: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, str]:
    """Add what libpq takes from the environment, and the database that it takes where none is named: the user's."""
    ambient = {name: os.environ[variable] for name, variable in _PLACE.items() if os.environ.get(variable)}
    (user,) = (option.val for option in Conninfo.get_defaults() if option.keyword == b"user")
    return {"dbname": str(given.get("user") or os.fsdecode(user or b"")), **ambient, **place}


def _shown(place: Mapping[str, str], user: str) -> str:
    host, port = place.get("host", ""), place.get("port", "")
    database = quote(place.get("dbname", ""), safe="")
    rest = {name: value for name, value in place.items() if name in ("hostaddr", "service")}
    if "/" in host or "," in host or "," in port:
        rest.update({"host": host} if host else {}, **({"port": port} if port else {}))
        host = port = ""
    elif ":" in host:
        host = f"[{host}]"
    who = f"{quote(user, safe='')}@" if user else ""
    return f"postgresql://{who}{host}{':' + port if port else ''}/{database}" + (f"?{urlencode(rest)}" if rest else "")


class Lending:
    """A session for as long as a `with` block lasts; a generator's context manager takes three times as long."""

    __slots__ = ("_from", "_pool", "_taken", "_timeout_seconds")

    def __init__(self, pool: Pool, timeout_seconds: float) -> None:
        self._pool = pool
        self._timeout_seconds = timeout_seconds
        self._taken: list[Session] = []
        self._from: ConnectionPool[Session] | None = None

    def __enter__(self) -> Session:
        self._from = self._pool.take(self._taken, self._timeout_seconds)
        return self._taken[0]

    def __exit__(self, *_: object) -> None:
        if self._from is not None:
            self._pool.give_back(self._from, self._taken[0])


class Pool:
    """
    The sessions of one process.

    Args:
        place: Where to.
        greet: Called with each new session, in a thread of the pool; what it raises closes the session.
    """

    def __init__(self, place: Place, greet: Callable[[Session], None]) -> None:
        self._place = place
        self._greet = greet
        self._pool: ConnectionPool[Session] | None = None
        self._making = threading.Lock()
        self._here = threading.local()
        self._trouble: Exception | None = None
        self._taken_at = monotonic()

    def session(self, timeout_seconds: float) -> Lending:
        """
        Lend a session for a `with` block; it goes back when that ends, or away if it is in the middle of something.

        Args:
            timeout_seconds: How long to wait for one; 0: not at all.

        Raises:
            StoreBusy: None was ready in time, or, without waiting, this thread is inside the pool already.
            StoreUnavailable: There is none, since the server can't be reached.
        """
        return Lending(self, timeout_seconds)

    def take(self, taken: list[Session], timeout_seconds: float) -> ConnectionPool[Session]:
        """Put a session into a list, and give the pool that it goes back to; see `session`."""
        here = self._here
        before = getattr(here, "inside", False)
        if before and timeout_seconds <= 0:
            raise StoreBusy(f"{self._place.shown}: this thread is waiting for a connection already")
        here.inside = True
        pool = None
        try:
            pool = self._opened()
            self._wait(pool, taken, max(timeout_seconds, 0.001))
        except StoreError:
            raise
        except BaseException:
            self.replace(pool)  # whatever it had in hand is lost to its books
            raise
        finally:
            here.inside = before
        return pool

    def give_back(self, pool: ConnectionPool[Session], session: Session) -> None:
        """Give a session back to its pool."""
        here = self._here
        before, here.inside = getattr(here, "inside", False), True
        try:
            if session.pgconn.transaction_status != TransactionStatus.IDLE:
                session.close()
            pool.putconn(session)
        except BaseException:
            self.replace(pool)
            raise
        finally:
            here.inside = before

    def _wait(self, pool: ConnectionPool[Session], taken: list[Session], timeout_seconds: float) -> None:
        deadline = monotonic() + timeout_seconds
        self._trouble = None
        while not taken:
            left = deadline - monotonic()
            try:
                # One call into C takes the session and notes it, so that no signal handler can raise in between.
                taken.extend(map(pool.getconn, (max(min(left, _LOOK_SECONDS), 0.001),)))
            except (PoolTimeout, TooManyRequests, PoolClosed) as error:
                # The pool waits on although nobody connects any more; why the last one failed is known here.
                if self._can_not_connect() or left <= _LOOK_SECONDS or isinstance(error, PoolClosed):
                    raise self._explain(pool, timeout_seconds) from None
        self._taken_at = monotonic()

    def _can_not_connect(self) -> bool:
        return self._trouble is not None

    def _explain(self, pool: ConnectionPool[Session], waited_seconds: float) -> StoreError:
        trouble = self._trouble
        if isinstance(trouble, StoreError):
            return trouble
        if trouble is not None:
            return StoreUnavailable(f"{self._place.shown}: {first_line(trouble)}")
        if monotonic() - self._taken_at > _STARVED_SECONDS:
            self._taken_at = monotonic()
            self.replace(pool)
        return StoreBusy(f"{self._place.shown}: no connection was ready within {waited_seconds:g} s")

    def _opened(self) -> ConnectionPool[Session]:
        if self._pool is None:
            with self._making:
                if self._pool is None:
                    self._pool = self._make()
        return self._pool

    def _make(self) -> ConnectionPool[Session]:
        pool = ConnectionPool(
            self._place.conninfo,
            connection_class=self._connecting_class(),
            # No prepared statements: a pooler in transaction mode hands every transaction to another session.
            kwargs={"autocommit": True, "prepare_threshold": None, "cursor_factory": psycopg.RawCursor},
            min_size=0,
            max_size=MAX_SESSIONS,
            configure=self._configure,
            name=f"otelexec-{os.getpid()}-{next(_names)}",
            # Whoever asks next tries anew: a backoff of the pool's own would outlast the outage.
            reconnect_timeout=0.0,
            num_workers=1,
            open=False,
        )
        pool.open()
        return pool

    def _connecting_class(self) -> type[Session]:
        noted = self

        class Connecting(Session):
            """A session whose connecting is noted: the pool keeps the reason of a failure to itself."""

            @classmethod
            def connect(cls, *args: Any, **kwargs: Any) -> Any:
                """Connect, and note why that failed."""
                try:
                    session = super().connect(*args, **kwargs)
                except Exception as error:
                    noted._trouble = error
                    raise
                # Also with an instrumentation of psycopg active, which gives connections a cursor class of its own.
                session.cursor_factory = psycopg.RawCursor
                return session

        return Connecting

    def _configure(self, session: Session) -> None:
        try:
            self._greet(session)
        except BaseException as error:
            session.close()
            self._trouble = error if isinstance(error, Exception) else None
            raise
        self._trouble = None

    def replace(self, pool: ConnectionPool[Session] | None = None) -> None:
        """
        Give up all sessions; the next one that is asked for is new.

        Args:
            pool: Only if it is still this one; None: whichever it is.
        """
        if pool is None or self._pool is pool:
            old, self._pool = self._pool, None
            if old is not None:
                # In a thread, since it waits for the pool's own, one of which may be connecting.
                with suppress(RuntimeError):  # the interpreter is shutting down
                    threading.Thread(target=old.close, args=(1.0,), name="otelexec-pool-close", daemon=True).start()

    def forget(self) -> object:
        """Give up the inherited pool without closing anything, in a forked child; keep what this gives, for ever."""
        old, self._pool = self._pool, None
        self._making = threading.Lock()
        self._here = threading.local()
        return old

    def close(self) -> None:
        """Close all sessions; the next one that is asked for is new."""
        old, self._pool = self._pool, None
        if old is not None:
            old.close(timeout=1.0)
