"""
The schema of the PostgreSQL store, and the functions in it that commit what every execution writes.

Everything lives in a PostgreSQL schema named `otelexec`, so that the store may share a database with the application's
own tables. A call of `commit_writes` is one statement for any number of opens and closes; `open_attempt` and
`close_attempt` are the same for a lone one, which they make a quarter faster. The server keeps the plans of a
PL/pgSQL function for each session by itself, so neither prepared statements nor settings of the session are needed, which a
pooler in transaction mode would lose. Their statements are so simple, and the planner settings such, that a plan made while a
table is empty takes the index that is right for millions of rows; joins with the group in one statement scanned them all
instead, until the next ANALYZE. (For the same reason an open attempt is one without an end here, and a state is put into an
expression: a condition like that of a partial index would open a way through all that this index holds.) `sql.py` holds the
same writes one by one, for all that is rare.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import psycopg

from otelexec.errors import StoreNotFound, StoreVersionError
from otelexec.store import schema
from otelexec.store.attempt_statements import OPENED
from otelexec.store.sql import QUEUED_AGAIN

if TYPE_CHECKING:
    from otelexec.store.postgres_pool import Session

SCHEMA: Final = "otelexec"

_TYPES: Final = {
    "key": "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
    "serial": "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
    "name": 'TEXT COLLATE "C"',
    "blob": "BYTEA",
    "bigint": "BIGINT",
}

# One number for all that use this lock, from the bytes of "otelexec": advisory locks have no names.
_MIGRATION_LOCK: Final = int.from_bytes(b"otelexec", "big")

NOW: Final = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint * 1000"

# When the server's present life began. A crash of one of its processes ends all sessions and forgets what was committed without
# fsync, under the same postmaster; the statistics are reset then, and not in a clean restart.
STARTED: Final = "(extract(epoch FROM greatest(pg_postmaster_start_time(), pg_stat_get_bgwriter_stat_reset_time())) * 1000000)::bigint"

SERVER_CHANGED: Final = "OX001"
"""SQLSTATE of `commit_writes` where the server is not the one that it was when the caller last looked."""

# What one machine's SQLite file can do without: executions that did not succeed, by their state.
# Of a span's bytes there is nothing to compress that would be worth the time.
_OWN: Final = (
    "CREATE INDEX execution_state ON execution (state, seq) WHERE state <> 'succeeded'",
    "ALTER TABLE outbox ALTER COLUMN request SET STORAGE EXTERNAL",
    "ALTER TABLE attempt ALTER COLUMN span_start SET STORAGE EXTERNAL",
)

# The fields of an open and of a close on their way: of the JSON rows of a group, and of the parameters of a lone one.
OPEN_FIELDS: Final = (
    *(("i", "integer"), ("e", "text"), ("n", "text"), ("q", "text"), ("s", "text"), ("c", "text"), ("p", "text"), ("t", "text")),
    *(("w", "text"), ("b", "bigint"), ("d", "bigint"), ("ti", "text"), ("si", "text"), ("sb", "text"), ("ot", "text"), ("oi", "text")),
    *(("oti", "text"), ("ob", "text"), ("os", "bigint")),
)
CLOSE_FIELDS: Final = (
    *(("i", "integer"), ("e", "text"), ("t", "text"), ("st", "text"), ("en", "bigint"), ("et", "text"), ("em", "text"), ("fb", "text")),
    *(("cl", "text"), ("rc", "bigint"), ("pr", "text"), ("ou", "text"), ("nn", "text"), ("xs", "text"), ("xe", "bigint")),
    *(("sk", "integer"), ("sn", "text"), ("rq", "text"), ("ct", "integer")),
)

# What is done for one of them; `w_` stands before its fields.
_OPEN: Final = f"""
    INSERT INTO execution (execution_id, name, state, request_id, source, correlation, parent_execution_id,
                           started_unix_ns, attempts, latest)
    VALUES (w_e, w_n, 'running', w_q, w_s, w_c, w_p, w_b, 1, 1)
    {OPENED.replace("state, snapshot", "(state = 'succeeded')::integer, snapshot")}
    INTO r_number, r_duplicate, r_text, r_requested, r_terminate;
    INSERT INTO attempt (execution_id, attempt, token, process_id, state, duplicate, trace_id, span_id, span_start,
                         started_unix_ns, deadline_unix_ns, outer_token, outer_span_id, outer_trace_id,
                         outer_start, outer_started_unix_ns)
    VALUES (w_e, r_number, w_t, w_w, 'running', r_duplicate, w_ti, w_si, decode(w_sb, 'base64'),
            w_b, w_d, w_ot, w_oi, w_oti, decode(w_ob, 'base64'), w_os);
    r_place := w_i;
    RETURN NEXT;"""

_CLOSE: Final = f"""
    UPDATE attempt SET state = w_st, ended_unix_ns = w_en, error_type = w_et, error_message = w_em,
        finalized_by = w_fb, classification = w_cl, reconciled_unix_ns = w_rc, progress = COALESCE(w_pr, progress),
        output = w_ou, nonce = w_nn, span_start = NULL
    WHERE execution_id = w_e AND token = w_t AND ended_unix_ns IS NULL
    RETURNING attempt, duplicate, span_id INTO r_number, r_duplicate, r_text;
    IF FOUND THEN
        IF w_st = 'succeeded' THEN
            UPDATE execution SET state = w_xs, ended_unix_ns = w_xe, snapshot = NULL
            WHERE execution_id = w_e AND state || '' <> 'succeeded';
        ELSIF r_duplicate = 0 THEN
            IF w_st = 'lost' AND EXISTS (SELECT 1 FROM run r JOIN cancellation c USING (execution_id) WHERE r.execution_id = w_e) THEN
                w_xs := 'cancelled';
                w_sk := 1;
            ELSIF w_st = 'lost' AND EXISTS (SELECT 1 FROM run WHERE execution_id = w_e AND max_attempts > r_number) THEN
                w_xs := 'retrying';
                w_xe := NULL;
            END IF;
            UPDATE execution SET state = w_xs, ended_unix_ns = w_xe, sticky = w_sk, snapshot = COALESCE(w_sn, snapshot)
            WHERE execution_id = w_e AND latest = r_number AND NOT (state || '' = 'succeeded' OR sticky = 1);
        END IF;
        IF w_rq IS NOT NULL THEN
            INSERT INTO outbox (request, count, execution_id, written_unix_ns) VALUES (decode(w_rq, 'base64'), w_ct, w_e, {NOW});
        END IF;
        r_place := w_i;
        RETURN NEXT;
    END IF;"""

_GIVES: Final = "(r_place integer, r_number integer, r_duplicate integer, r_text text, r_requested bigint, r_terminate integer)"
_PLANS: Final = f"SET search_path = {SCHEMA}, pg_temp SET enable_seqscan = off SET plan_cache_mode = force_generic_plan"
_BEGINS: Final = f"""
    IF {STARTED} <> server THEN
        RAISE EXCEPTION 'another server' USING ERRCODE = '{SERVER_CHANGED}';
    END IF;
    IF NOT durable THEN
        PERFORM set_config('synchronous_commit', 'off', true);
    ELSIF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;"""


def _alone(name: str, fields: Sequence[tuple[str, str]], body: str) -> str:
    parameters = ", ".join(f"w_{field} {kind}" for field, kind in fields)
    return f"""
CREATE OR REPLACE FUNCTION {name}(durable boolean, server bigint, {parameters}) RETURNS TABLE {_GIVES}
LANGUAGE plpgsql {_PLANS} AS $body$
BEGIN{_BEGINS}{body}
END
$body$"""


def _each(rows: str, fields: Sequence[tuple[str, str]], body: str) -> str:
    columns = ", ".join(f"{field} {kind}" for field, kind in fields)
    once = re.sub(r"\bw_", "w.", body)
    return f"""
    FOR w IN SELECT * FROM json_to_recordset({rows}) AS r ({columns})
    LOOP{once}
    END LOOP;"""


_FUNCTIONS: Final = (
    _alone("open_attempt", OPEN_FIELDS, _OPEN),
    _alone("close_attempt", CLOSE_FIELDS, _CLOSE),
    f"""
CREATE OR REPLACE FUNCTION commit_writes(durable boolean, server bigint, opens json, closes json, more json) RETURNS TABLE {_GIVES}
LANGUAGE plpgsql {_PLANS} AS $body$
DECLARE
    moment bigint := {NOW};
    w record;
BEGIN{_BEGINS}{_each("opens", OPEN_FIELDS, _OPEN)}
    r_requested := NULL;
    r_terminate := NULL;{_each("closes", CLOSE_FIELDS, _CLOSE)}
    IF more IS NULL THEN
        RETURN;
    END IF;
    FOR w IN SELECT * FROM json_to_recordset(more->'queued') AS r (
        e text, n text, q text, s text, c text, p text, b bigint, ti text, si text)
    LOOP
        INSERT INTO execution (execution_id, name, state, request_id, source, correlation, parent_execution_id,
                               queued_unix_ns, producer_trace_id, producer_span_id)
        VALUES (w.e, w.n, 'queued', w.q, w.s, w.c, w.p, w.b, w.ti, w.si)
        {QUEUED_AGAIN};
    END LOOP;
    FOR w IN SELECT * FROM json_to_recordset(more->'opened') AS r (ti text, si text, w text, e text, sb text)
    LOOP
        INSERT INTO open_span (trace_id, span_id, process_id, execution_id, start)
        VALUES (w.ti, w.si, w.w, w.e, decode(w.sb, 'base64')) ON CONFLICT (trace_id, span_id) DO NOTHING;
    END LOOP;
    FOR w IN SELECT * FROM json_to_recordset(more->'plain') AS r (nn text, rq text, ct integer, e text)
    LOOP
        IF w.nn <> '' THEN
            INSERT INTO written (nonce) VALUES (w.nn) ON CONFLICT (nonce) DO NOTHING;
            CONTINUE WHEN NOT FOUND;
        END IF;
        INSERT INTO outbox (request, count, execution_id, written_unix_ns) VALUES (decode(w.rq, 'base64'), w.ct, w.e, moment);
    END LOOP;
    FOR w IN SELECT * FROM json_to_recordset(more->'ended') AS r (ti text, si text, rq text, e text)
    LOOP
        DELETE FROM open_span WHERE trace_id = w.ti AND span_id = w.si;
        CONTINUE WHEN NOT FOUND;
        INSERT INTO outbox (request, count, execution_id, written_unix_ns) VALUES (decode(w.rq, 'base64'), 1, w.e, moment);
    END LOOP;
    FOR w IN SELECT * FROM json_to_recordset(more->'seen') AS r (e text, w text, at bigint)
    LOOP
        UPDATE attempt SET last_seen_unix_ns = w.at
        WHERE execution_id = w.e AND process_id = w.w AND ended_unix_ns IS NULL AND last_seen_unix_ns < w.at;
    END LOOP;
    FOR w IN SELECT * FROM json_to_recordset(more->'progress') AS r (e text, t text, pr text, at bigint)
    LOOP
        UPDATE attempt SET progress = w.pr, last_seen_unix_ns = w.at WHERE execution_id = w.e AND token = w.t AND ended_unix_ns IS NULL;
    END LOOP;
END
$body$""",
)


def version_of(session: Session) -> int:
    """
    Give the version of the schema in this database; 0 where there is none.

    Raises:
        psycopg.Error: It could not be read.
    """
    # Of the tables themselves: what `to_regclass` says may be remembered from before the wait for another process's migration.
    found = session.execute(
        "SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = 'schema_version'",
        (SCHEMA,),
    ).fetchall()
    if not found:
        return 0
    [[version]] = session.execute(f"SELECT version FROM {SCHEMA}.schema_version").fetchall()
    return int(version)


def ensure(session: Session, url: str, *, create: bool) -> None:
    """
    Make the schema, or bring it up to this library's version; does nothing where it is so already.

    Args:
        session: A session without a transaction.
        url: For messages.
        create: Whether to make or upgrade one; readers don't.

    Raises:
        StoreNotFound: There is none, and none is to be made.
        StoreVersionError: It is newer than this library, or older and not to be upgraded.
        psycopg.Error: The server refused, for example because the role may not create it.
    """
    version = version_of(session)
    if version == 0 and not create:
        raise StoreNotFound(f"No store in {url}. Run an execution first, or `otelexec migrate`, or set OTELEXEC_STORE to where it is.")
    if version == schema.SCHEMA_VERSION:
        return
    old = StoreVersionError(
        f"{url} has schema {version}, this otelexec needs {schema.SCHEMA_VERSION}: run `otelexec migrate` as the role that owns it."
    )
    if version < schema.SCHEMA_VERSION and not create:
        raise old
    session.execute("BEGIN")
    try:
        session.execute("SELECT pg_advisory_xact_lock($1)", (_MIGRATION_LOCK,))
        _upgrade(session, version_of(session), url)
        session.execute("COMMIT")
    except BaseException as error:
        if session.pgconn.transaction_status != psycopg.pq.TransactionStatus.IDLE and not session.closed:
            session.execute("ROLLBACK")
        if version and isinstance(error, psycopg.errors.InsufficientPrivilege):
            raise old from error
        raise


def _upgrade(session: Session, version: int, url: str) -> None:
    if version > schema.SCHEMA_VERSION:
        raise StoreVersionError(
            f"{url} has schema {version}, this otelexec knows {schema.SCHEMA_VERSION}. Upgrade this one: `pip install -U otelexec`."
        )
    if version == schema.SCHEMA_VERSION:  # another process was first
        return
    steps: list[str] = []
    if version == 0:
        # Where it is there already, the right to make schemas in the database may be missing, which IF NOT EXISTS asks for all the same.
        if not session.execute("SELECT 1 FROM pg_namespace WHERE nspname = $1", (SCHEMA,)).fetchall():
            session.execute(f"CREATE SCHEMA {SCHEMA}")
        steps += ["CREATE TABLE schema_version (version INTEGER NOT NULL)", "INSERT INTO schema_version VALUES (0)", *schema.SCHEMA, *_OWN]
    else:
        steps += schema.upgrade_from(version)
    session.execute(f"SET LOCAL search_path TO {SCHEMA}, pg_temp")
    for statement in steps:
        session.execute(statement.format(**_TYPES).encode())
    for function in _FUNCTIONS:
        session.execute(function.encode())
    session.execute("UPDATE schema_version SET version = $1", (schema.SCHEMA_VERSION,))
