"""The baseline on PostgreSQL: what one would write by hand with psycopg, two durable commits each; and the server that both use."""

from __future__ import annotations

import time
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import psycopg

from tests.postgres_servers import Server, folder_of_servers, running_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DEFAULTS: Final[Mapping[str, object]] = {
    "fsync": "on",
    "full_page_writes": "on",
    "wal_writer_delay": "200ms",
    "max_connections": 100,
    "shared_buffers": "128MB",
    "max_wal_size": "1GB",
    "autovacuum_naptime": "60s",
}
"""What the tests' servers have otherwise than PostgreSQL itself: a benchmark that skips fsync would measure nothing."""


@contextmanager
def server_as_installed() -> Iterator[Server]:
    """Run a server with the settings that PostgreSQL comes with, until the block ends; its data is in the temporary folder."""
    with folder_of_servers() as folder, running_server(folder, settings=DEFAULTS) as server:
        yield server


class TwoCommits:
    """
    One connection in autocommit mode: an INSERT is committed before the work, an UPDATE after it.

    Args:
        url: The database; the table is made where it is not there.
    """

    def __init__(self, url: str) -> None:
        self.connection: psycopg.Connection[Any] = psycopg.connect(url, autocommit=True)
        self.connection.execute(
            """CREATE TABLE IF NOT EXISTS run (id text PRIMARY KEY, name text NOT NULL, state text NOT NULL,
                                               started bigint NOT NULL, ended bigint)"""
        )

    def execute(self) -> None:
        """Record one run that does nothing."""
        run_id = str(uuid.uuid4())
        self.connection.execute(
            "INSERT INTO run (id, name, state, started) VALUES (%s, 'invoice.run', 'running', %s)", (run_id, time.time_ns())
        )
        self.connection.execute("UPDATE run SET state = 'succeeded', ended = %s WHERE id = %s", (time.time_ns(), run_id))

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()
