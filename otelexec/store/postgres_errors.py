"""What an error of the server, of psycopg, or on the way to it means for a commit."""

from __future__ import annotations

from typing import Final

import psycopg
from psycopg import errors as pg

# Classes of errors (SQLSTATE, appendix A of PostgreSQL's manual) that are the write's own fault: data exception,
# integrity constraint violation, program limit exceeded.
_REFUSALS: Final = ("22", "23", "54")
GONE: Final = (pg.UndefinedTable, pg.InvalidSchemaName, pg.UndefinedFunction)
"""The schema was dropped under us."""

# After these the sessions that are left are of no use: connection exception, operator intervention (shutdown, failover);
# a server that is read-only now may be a standby whose primary is elsewhere.
_LOST: Final = ("08", "57")
MOVED: Final = (pg.ReadOnlySqlTransaction,)

ERRORS: Final = (psycopg.Error, UnicodeError, OverflowError, OSError)
"""Whatever may come out of a call of the server."""


class GaveUp(psycopg.OperationalError):
    """The server did not answer in time; what it was asked may yet be done."""


class ServerChanged(psycopg.OperationalError):
    """The server is another one, or the same started anew: something that it had committed may be lost."""


REPEATABLE: Final = (ServerChanged, pg.DeadlockDetected, pg.SerializationFailure, pg.UniqueViolation)
"""After these the same commit is made once more."""


def is_refusal(error: BaseException) -> bool:
    """Tell whether an error is the write's own fault, and would come again; any other is the server's, or the way's to it."""
    # What Python can't send (a lone surrogate, an integer that no type holds) never reaches the server and has no state.
    if not isinstance(error, psycopg.Error):
        return True
    state = error.diag.sqlstate
    if state is None:
        return isinstance(error, psycopg.DataError | psycopg.InterfaceError | psycopg.ProgrammingError)
    return isinstance(error, pg.DatatypeMismatch) or (state[:2] in _REFUSALS and not isinstance(error, pg.UniqueViolation))


def is_closed(error: BaseException) -> bool:
    """Tell whether a session was closed from afar, or its server is gone; then those beside it are of no use either."""
    if not isinstance(error, psycopg.OperationalError) or isinstance(error, GaveUp | ServerChanged | pg.QueryCanceled):
        return False
    state = error.diag.sqlstate
    return state is None or state[:2] in _LOST


def first_line(error: BaseException) -> str:
    """Give the first line of what the server or libpq said, which never holds a password."""
    primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    return (primary or str(error) or type(error).__name__).strip().splitlines()[0]
