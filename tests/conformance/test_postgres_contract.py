"""The PostgreSQL store passes the contract of stores: on the wheel's server, on Debian's, and behind PgBouncer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from otelexec.store.base import Store
from otelexec.store.postgres import PostgresStore
from otelexec.store.postgres_pool import Session
from otelexec.store.runs import ForgetRuns
from otelexec.store.writes import Ingested
from otelexec.testing import StoreContract
from otelexec.testing.model import check_against_model
from otelexec.testing.rows import OpenStore, closing, opened, opening, pruned, write
from otelexec.testing.runs import enqueue, exclusive, run_row
from tests.postgres_servers import PASSWORD, Server, at, debian, running_pgbouncer, running_server
from tests.records import until

BLOCKED = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"


def lanes(store: Store) -> list[str]:
    """Give the lanes that have a row."""
    return [row[0] for row in store.read(lambda tx: tx.execute("SELECT lane FROM run_lane ORDER BY lane").fetchall())]


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

    def test_prune_deletes_lanes_in_which_nothing_waits_or_runs(self, store: Store) -> None:
        """A concurrency key may be a customer's or an order's, of which there are more every day."""
        for name, lane in (("ended", "ended"), ("running", "one"), ("waiting", "one")):
            enqueue(store, run_row(name, lane=lane))
        for name in ("ended", "running"):
            opened(store, exclusive(f"t-{name}", f"e-{name}"))
        write(store, closing(opening("t-ended", "e-ended")), ForgetRuns(("e-ended",)))
        assert lanes(store) == ["ended", "one"]
        pruned(store, 1)
        assert lanes(store) == ["one"]

    def test_an_open_holds_its_lane_also_when_prune_has_just_deleted_that(self, store: Store, database: str) -> None:
        enqueue(store, run_row("first", lane="lane"))
        opened(store, exclusive("t", "e-first"))
        write(store, closing(opening("t", "e-first")))
        enqueue(store, run_row("second", lane="lane"))
        with psycopg.connect(database) as pruning, ThreadPoolExecutor() as pool:
            pruning.execute("DELETE FROM otelexec.run_lane")
            opening_it = pool.submit(opened, store, exclusive("t", "e-second"))
            until(lambda: store.read(lambda tx: tx.execute(BLOCKED).fetchall()), 30)
            pruning.commit()
            assert opening_it.result(30).number == 1
        assert lanes(store) == ["lane"]

    def test_what_comes_back_from_the_spool_is_a_few_round_trips(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """At some milliseconds each, a process with more to write than went in so would never have left the spool."""
        write(store)
        trips, wait = Counter[str](), Session.wait

        def counted(*arguments: Any, **keywords: Any) -> Any:
            trips["wait"] += 1
            return wait(*arguments, **keywords)

        rows = [replace(opening(f"t{number}", f"e{number}"), repeated=True) for number in range(200)]
        with monkeypatch.context() as patch:
            patch.setattr(Session, "wait", counted)
            write(store, *(each for row in rows for each in (row, closing(row))), Ingested("segment", 1))
        assert trips["wait"] < 10
        assert [found.state for found in store.executions(limit=300)] == 200 * ["succeeded"]


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
