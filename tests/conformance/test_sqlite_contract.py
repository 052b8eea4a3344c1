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
    def other_store(self, tmp_path: Path) -> OpenStore:
        return lambda: SqliteStore(tmp_path / "contract.db")

    @pytest.fixture
    def store(self, other_store: OpenStore) -> Iterator[Store]:
        store = other_store()
        yield store
        store.close()
