"""The embedded store passes the contract of stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from otelexec.store.base import Store
from otelexec.store.sqlite import SqliteStore
from otelexec.testing import StoreContract
from otelexec.testing.rows import OpenStore


class TestSqliteStore(StoreContract):
    @pytest.fixture
    def other_store(self, tmp_path: Path) -> Iterator[OpenStore]:
        made: list[Store] = []

        def make() -> Store:
            made.append(SqliteStore(tmp_path / "contract.db"))
            return made[-1]

        yield make
        for store in made:
            store.close()

    @pytest.fixture
    def store(self, other_store: OpenStore) -> Store:
        return other_store()
