"""The demo's queue: one SQLite table. Durable, shared by processes, and no part of otelexec."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "jobs"


@dataclass(frozen=True, slots=True)
class Message:
    """
    One job as a worker gets it.

    Attributes:
        id: The message's own id.
        job: Which executor it is for.
        body: The payload with whatever `otelexec.inject` put into it.
    """

    id: int
    job: str
    body: Mapping[str, Any]


class Queue:
    """
    A queue that delivers at least once: a message is gone only when its worker says that it is done.

    Args:
        path: Its file; made when missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._transaction() as run:
            run(
                """CREATE TABLE IF NOT EXISTS message (
                       id INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT, body TEXT, worker INTEGER, held_for TEXT)"""
            )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Any]:
        # A connection for each operation: slow, short, and right in every thread and process.
        with contextlib.closing(sqlite3.connect(self.path, timeout=10, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection.execute
            connection.execute("COMMIT")

    def put(self, job: str, body: Mapping[str, Any], *, held_for: str | None = None) -> None:
        """
        Add a message.

        Args:
            job: Which executor it is for.
            body: Anything that JSON can hold.
            held_for: Keep it back until `release` names the same; None delivers it at once.
        """
        with self._transaction() as run:
            run("INSERT INTO message (job, body, held_for) VALUES (?, ?, ?)", (job, json.dumps(body), held_for))

    def take(self, worker: int) -> Message | None:
        """Hand the oldest message to a worker, named by its pid; None when there is none."""
        with self._transaction() as run:
            row = run(
                """UPDATE message SET worker = ? WHERE id = (
                       SELECT id FROM message WHERE worker IS NULL AND held_for IS NULL ORDER BY id LIMIT 1)
                   RETURNING id, job, body""",
                (worker,),
            ).fetchone()
        return None if row is None else Message(row[0], row[1], json.loads(row[2]))

    def done(self, message: Message) -> None:
        """Forget a message: its work is recorded."""
        with self._transaction() as run:
            run("DELETE FROM message WHERE id = ?", (message.id,))

    def release(self, held_for: str) -> int:
        """Deliver what was kept back; gives how many messages that were."""
        with self._transaction() as run:
            return int(run("UPDATE message SET held_for = NULL WHERE held_for = ?", (held_for,)).rowcount)

    def give_back(self, worker: int) -> int:
        """Deliver once more what a dead worker had in hand; gives how many messages that were."""
        with self._transaction() as run:
            return int(run("UPDATE message SET worker = NULL WHERE worker = ?", (worker,)).rowcount)
