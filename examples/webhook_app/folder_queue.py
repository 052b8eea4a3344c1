"""The example's queue: a folder of JSON files, one for each message. Enough for one web process and one worker."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class FolderQueue:
    """
    A queue that delivers at least once: a message is gone only when its worker says so.

    Args:
        folder: Where the messages are; made when missing.
    """

    def __init__(self, folder: Path) -> None:
        self._waiting = folder / "waiting"
        self._taken = folder / "taken"
        for each in (self._waiting, self._taken):
            each.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, body: Mapping[str, Any]) -> None:
        """Add a message under a name of its own."""
        written = self._taken.with_name(f"{name}.{os.getpid()}")
        written.write_text(json.dumps(body))
        written.rename(self._waiting / f"{name}.json")

    def take(self) -> tuple[Path, dict[str, Any]] | None:
        """Give the next message and the file that stands for it; None when there is none."""
        for file in sorted(self._waiting.glob("*.json")):
            taken = file.rename(self._taken / file.name)
            return taken, json.loads(taken.read_text())
        return None

    def take_back(self) -> int:
        """Deliver once more what a worker before this one left unfinished; gives how many messages that were."""
        unfinished = list(self._taken.glob("*.json"))
        for file in unfinished:
            file.rename(self._waiting / file.name)
        return len(unfinished)
