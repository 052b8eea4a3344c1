"""
The schema of the PostgreSQL store, and the function in it that commits what every execution writes.

Everything lives in a PostgreSQL schema named `otelexec`, so that the store may share a database with the application's
own tables. A call of `commit_writes` is one statement for any number of opens and closes: the server keeps the plans of a
PL/pgSQL function for each session by itself, so neither prepared statements nor settings of the session are needed, which a
pooler in transaction mode would lose. Its planner settings keep it to the indexes: a plan that is made while a table is
empty would go on scanning it when it has millions of rows. `sql.py` holds the same writes one by one, for all that is rare.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import psycopg

from otelexec.errors import StoreNotFound, StoreVersionError
from otelexec.store import schema
from otelexec.store.sql import OPENED, QUEUED_AGAIN, TERMINAL

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
STARTED: Final = "(extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint"

SERVER_CHANGED: Final = "OX001"
"""SQLSTATE of `commit_writes` where the server is not the one that it was when the caller last looked."""

# What one machine's SQLite file can do without: executions that did not succeed by their state, the ended ones by time.
# Of a span's bytes there is nothing to compress that would be worth the time.
_OWN: Final = (
    "CREATE INDEX execution_state ON execution (state, seq) WHERE state <> 'succeeded'",
    "CREATE INDEX execution_ended ON execution (ended_unix_ns) WHERE ended_unix_ns IS NOT NULL",
    "ALTER TABLE outbox ALTER COLUMN request SET STORAGE EXTERNAL",
    "ALTER TABLE attempt ALTER COLUMN span_start SET STORAGE EXTERNAL",
)

_TERMINAL: Final = TERMINAL.replace("state", "e.state").replace("sticky", "e.sticky")

_COMMIT_WRITES: Final = f"""
CREATE OR REPLACE FUNCTION commit_writes(opens json, closes json, more json, durable boolean, server bigint)
RETURNS TABLE (r_place integer, r_number integer, r_duplicate integer, r_text text, r_requested bigint, r_terminate integer)
LANGUAGE plpgsql
SET search_path = {SCHEMA}, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET enable_bitmapscan = off SET plan_cache_mode = force_generic_plan SET jit = off
AS $body$
DECLARE
    moment bigint := {NOW};
BEGIN
    IF {STARTED} <> server THEN
        RAISE EXCEPTION 'another server' USING ERRCODE = '{SERVER_CHANGED}';
    END IF;
    IF NOT durable THEN
        PERFORM set_config('synchronous_commit', 'off', true);
    END IF;
    IF opens IS NOT NULL THEN
        RETURN QUERY
        WITH o AS MATERIALIZED (SELECT * FROM json_to_recordset(opens) AS r (
            i integer, e text, n text, q text, s text, c text, p text, t text, w text, b bigint, d bigint,
            ti text, si text, sb text, ot text, oi text, oti text, ob text, os bigint)),
        x AS (
            INSERT INTO execution (execution_id, name, state, request_id, source, correlation, parent_execution_id,
                                   started_unix_ns, attempts, latest)
            SELECT o.e, o.n, 'running', o.q, o.s, o.c, o.p, o.b, 1, 1 FROM o ORDER BY o.i
            {OPENED.replace("RETURNING ", "RETURNING execution_id, ")}),
        a AS (
            INSERT INTO attempt (execution_id, attempt, token, process_id, state, duplicate, trace_id, span_id, span_start,
                                 started_unix_ns, deadline_unix_ns, outer_token, outer_span_id, outer_trace_id,
                                 outer_start, outer_started_unix_ns)
            SELECT o.e, x.attempts, o.t, o.w, 'running', (x.state = 'succeeded')::integer, o.ti, o.si, decode(o.sb, 'base64'),
                   o.b, o.d, o.ot, o.oi, o.oti, decode(o.ob, 'base64'), o.os
            FROM o JOIN x ON x.execution_id = o.e)
        SELECT o.i, x.attempts, (x.state = 'succeeded')::integer, x.snapshot, x.requested_unix_ns, x.terminate
        FROM o JOIN x ON x.execution_id = o.e;
    END IF;
    IF closes IS NOT NULL THEN
        RETURN QUERY
        WITH c AS MATERIALIZED (SELECT * FROM json_to_recordset(closes) AS r (
            i integer, e text, t text, st text, en bigint, et text, em text, fb text, cl text, rc bigint, pr text, ou text,
            nn text, xs text, xe bigint, sk integer, sn text, rq text, ct integer)),
        u AS (
            UPDATE attempt a SET state = c.st, ended_unix_ns = c.en, error_type = c.et, error_message = c.em,
                finalized_by = c.fb, classification = c.cl, reconciled_unix_ns = c.rc, progress = COALESCE(c.pr, a.progress),
                output = c.ou, nonce = c.nn, span_start = NULL
            FROM c WHERE a.execution_id = c.e AND a.token = c.t AND a.state = 'running'
            RETURNING c.i, c.e, c.st, c.xs, c.xe, c.sk, c.sn, c.rq, c.ct, a.attempt, a.duplicate, a.span_id),
        x AS (
            UPDATE execution e SET state = u.xs, ended_unix_ns = u.xe,
                sticky = CASE WHEN u.st = 'succeeded' THEN e.sticky ELSE u.sk END,
                snapshot = CASE WHEN u.st = 'succeeded' THEN NULL ELSE COALESCE(u.sn, e.snapshot) END
            FROM u WHERE e.execution_id = u.e AND CASE WHEN u.st = 'succeeded' THEN e.state <> 'succeeded'
                ELSE u.duplicate = 0 AND e.latest = u.attempt AND NOT ({_TERMINAL}) END),
        b AS (
            INSERT INTO outbox (request, count, execution_id, written_unix_ns)
            SELECT decode(u.rq, 'base64'), u.ct, u.e, moment FROM u WHERE u.rq IS NOT NULL ORDER BY u.i)
        SELECT u.i, u.attempt, u.duplicate, u.span_id, NULL::bigint, NULL::integer FROM u;
    END IF;
    IF more IS NOT NULL THEN
        INSERT INTO execution (execution_id, name, state, request_id, source, correlation, parent_execution_id,
                               queued_unix_ns, producer_trace_id, producer_span_id)
        SELECT r.e, r.n, 'queued', r.q, r.s, r.c, r.p, r.b, r.ti, r.si FROM json_to_recordset(more->'queued') AS r (
            e text, n text, q text, s text, c text, p text, b bigint, ti text, si text) ORDER BY r.e
        {QUEUED_AGAIN};
        INSERT INTO open_span (trace_id, span_id, process_id, execution_id, start)
        SELECT r.ti, r.si, r.w, r.e, decode(r.sb, 'base64') FROM json_to_recordset(more->'opened') AS r (
            ti text, si text, w text, e text, sb text) ORDER BY r.ti, r.si
        ON CONFLICT (trace_id, span_id) DO NOTHING;
        WITH f AS (
            INSERT INTO written (nonce) SELECT r.nn FROM json_to_recordset(more->'plain') AS r (nn text) WHERE r.nn <> ''
            ON CONFLICT (nonce) DO NOTHING RETURNING nonce)
        INSERT INTO outbox (request, count, execution_id, written_unix_ns)
        SELECT decode(r.rq, 'base64'), r.ct, r.e, moment FROM json_to_recordset(more->'plain') AS r (
            i integer, nn text, rq text, ct integer, e text)
        WHERE r.nn = '' OR r.nn IN (SELECT f.nonce FROM f) ORDER BY r.i;
        WITH r AS MATERIALIZED (SELECT * FROM json_to_recordset(more->'ended') AS r (ti text, si text, rq text, e text)),
        g AS (
            DELETE FROM open_span s USING r WHERE s.trace_id = r.ti AND s.span_id = r.si
            RETURNING r.rq, r.e)
        INSERT INTO outbox (request, count, execution_id, written_unix_ns)
        SELECT decode(g.rq, 'base64'), 1, g.e, moment FROM g;
        UPDATE attempt a SET last_seen_unix_ns = r.at FROM json_to_recordset(more->'seen') AS r (e text, w text, at bigint)
        WHERE a.execution_id = r.e AND a.process_id = r.w AND a.state = 'running' AND a.last_seen_unix_ns < r.at;
        UPDATE attempt a SET progress = r.pr, last_seen_unix_ns = r.at
        FROM json_to_recordset(more->'progress') AS r (e text, t text, pr text, at bigint)
        WHERE a.execution_id = r.e AND a.token = r.t AND a.state = 'running';
    END IF;
END
$body$"""


def version_of(session: Session) -> int:
    """
    Give the version of the schema in this database; 0 where there is none.

    Raises:
        psycopg.Error: It could not be read.
    """
    [[found]] = session.execute("SELECT to_regclass($1)::text", (f"{SCHEMA}.schema_version",)).fetchall()
    if found is None:
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
    if version < schema.SCHEMA_VERSION and not create:
        raise StoreVersionError(
            f"{url} has schema {version}, this otelexec needs {schema.SCHEMA_VERSION}: run `otelexec migrate` as the role that owns it."
        )
    session.execute("BEGIN")
    try:
        session.execute("SELECT pg_advisory_xact_lock($1)", (_MIGRATION_LOCK,))
        _upgrade(session, version_of(session), url)
        session.execute("COMMIT")
    except BaseException:
        if session.pgconn.transaction_status != psycopg.pq.TransactionStatus.IDLE and not session.closed:
            session.execute("ROLLBACK")
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
        session.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        steps += ["CREATE TABLE schema_version (version INTEGER NOT NULL)", "INSERT INTO schema_version VALUES (0)", *schema.SCHEMA, *_OWN]
    else:
        steps += schema.upgrade_from(version)
    session.execute(f"SET LOCAL search_path TO {SCHEMA}, pg_temp")
    for statement in steps:
        session.execute(statement.format(**_TYPES))
    session.execute(_COMMIT_WRITES)
    session.execute("UPDATE schema_version SET version = $1", (schema.SCHEMA_VERSION,))
