"""A PostgreSQL schema of an older version becomes what a new one is, functions included, and none changes without a new version."""

from __future__ import annotations

import hashlib
from typing import Any

import psycopg
import pytest

from otelexec.store import postgres_schema, schema
from otelexec.testing.rows import closed, closing, opened, opening, record
from tests import stores

_DESCRIBED = (
    "SELECT table_name, column_name, data_type FROM information_schema.columns WHERE table_schema = 'otelexec' ORDER BY 1, 2",
    "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'otelexec' ORDER BY 1",
    "SELECT proname, prosrc FROM pg_proc WHERE pronamespace = 'otelexec'::regnamespace ORDER BY 1",
)
_OLDER = {
    2: ("DROP TABLE run, run_key, run_batch, run_lane, run_packet",),
    3: (),
}


def test_what_a_store_consists_of_changes_with_its_version() -> None:
    """A store that is there is brought up by its version: what changes without one never reaches it."""
    statements = (*schema.SCHEMA, *postgres_schema._OWN, *postgres_schema._FUNCTIONS)
    digest = hashlib.sha256(" ".join(" ".join(statements).split()).encode()).hexdigest()
    assert (schema.SCHEMA_VERSION, digest[:16]) == (4, "00441be4ae70b28d"), "raise SCHEMA_VERSION, with a step in UPGRADES"


@pytest.mark.parametrize("version", _OLDER)
def test_an_upgraded_store_has_what_a_new_one_has(url: str, version: int) -> None:
    store = stores.opened(url)
    opened(store, opening())
    store.close()
    with stores.connected(url) as connection:
        new = described(connection)
        [[function]] = connection.execute("SELECT pg_get_functiondef('close_attempt'::regproc)").fetchall()
        for statement in (*_OLDER[version], f"UPDATE schema_version SET version = {version}", function.replace("'lost'", "'never'")):
            connection.execute(statement.encode())
        assert described(connection) != new
        store = stores.opened(url)
        assert closed(store, closing(opening())).won
        assert record(store).state == "succeeded"
        store.close()
        assert described(connection) == new


def described(connection: psycopg.Connection[Any]) -> list[list[Any]]:
    """Give the columns, the indexes and the functions of a store."""
    return [connection.execute(statement.encode()).fetchall() for statement in _DESCRIBED]
