"""The PostgreSQL store passes the contract of stores: on the wheel's server, on Debian's, and behind PgBouncer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from otelexec.store.base import Store
from otelexec.store.postgres import PostgresStore
from otelexec.testing import StoreContract
from otelexec.testing.model import check_against_model
from otelexec.testing.rows import OpenStore
from tests.postgres_servers import PASSWORD, Server, at, debian, running_pgbouncer, running_server


class TestPostgresStore(StoreContract):
    @pytest.fixture(scope="class")
    @classmethod
    def database(cls, postgres: Server) -> str:
        return postgres.new_database()

    @pytest.fixture
    def other_store(self, postgres: Server, database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenStore]:
        monkeypatch.setenv("PGPASSWORD", PASSWORD)  # the URL that other processes get has no password
        made: list[Store] = []

        def make() -> Store:
            made.append(PostgresStore(database))
            return made[-1]

        yield make
        for store in made:
            store.close()
        postgres.drop_store(database)

    @pytest.fixture
    def store(self, other_store: OpenStore) -> Store:
        return other_store()


class TestDebiansServer(TestPostgresStore):
    @pytest.fixture(scope="class")
    @classmethod
    def postgres(cls, postgres_folder: Path) -> Iterator[Server]:
        with running_server(postgres_folder, programs=debian()) as server:
            yield server

    @pytest.mark.long
    def test_the_state_follows_the_model_whatever_order_things_happen_in(self, other_store: OpenStore) -> None:
        check_against_model(other_store)


class TestBehindPgBouncer(TestPostgresStore):
    @pytest.fixture(scope="class")
    @classmethod
    def database(cls, postgres: Server, postgres_folder: Path) -> Iterator[str]:
        with running_pgbouncer(postgres, postgres_folder, pool_size=4) as port:
            yield at(postgres.new_database(), port=port)

    @pytest.mark.long
    def test_the_state_follows_the_model_whatever_order_things_happen_in(self, other_store: OpenStore) -> None:
        check_against_model(other_store)
