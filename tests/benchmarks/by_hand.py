"""The baseline of the durable benchmarks: what one would write by hand with SQLite, two fully durable commits each."""

from __future__ import annotations

import sqlite3
import time
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class TwoCommits:
    """
    One connection in WAL mode with synchronous=FULL: an INSERT is committed before the work, an UPDATE after it.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = FULL")
        self.connection.execute(
            "CREATE TABLE IF NOT EXISTS run "
            "(id TEXT PRIMARY KEY, name TEXT NOT NULL, state TEXT NOT NULL, started INTEGER NOT NULL, ended INTEGER)"
        )

    def opened(self, name: str) -> str:
        """Commit the start of a run and give its id."""
        run_id = str(uuid.uuid4())
        self.connection.execute("INSERT INTO run (id, name, state, started) VALUES (?, ?, 'running', ?)", (run_id, name, time.time_ns()))
        return run_id

    def closed(self, run_id: str) -> None:
        """Commit its end."""
        self.connection.execute("UPDATE run SET state = 'succeeded', ended = ? WHERE id = ?", (time.time_ns(), run_id))

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()
