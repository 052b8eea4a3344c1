"""What a process has committed lately without fsync: a server that crashes forgets it, and the process writes it again."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Final

from otelexec.store.writes import (
    AddSpans,
    AmendAttempt,
    CloseOuter,
    Contribute,
    NameMessage,
    OpenAttempt,
    RecordProgress,
    RecordQueued,
    RefuseQueued,
    Write,
)

MAX_KEPT: Final = 4096
"""Writes kept at the most: a process that writes so much has commits with fsync among them, or is one of many."""

_KEPT: Final = (OpenAttempt, RecordQueued, AddSpans, AmendAttempt, CloseOuter, Contribute, RefuseQueued, NameMessage, RecordProgress)

# The log is flushed at the latest after three times wal_writer_delay
# (https://www.postgresql.org/docs/current/wal-async-commit.html); the rest is for a server that is busy.
_DELAYS: Final = 4.0
_SLACK_SECONDS: Final = 1.0


class Tail:
    """
    The last writes that a crash of the server would take.

    A commit with fsync makes all that was committed before it durable as well, by whatever session: the log has one order.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[int, float, Write]] = deque(maxlen=MAX_KEPT)
        self._lock = threading.RLock()  # reentrant: a signal handler may commit in the middle
        self._numbers = count()
        self._seconds = _DELAYS * 0.2 + _SLACK_SECONDS

    def keep_for(self, wal_writer_delay_seconds: float) -> None:
        """Learn how long the server takes at the most to flush by itself."""
        self._seconds = _DELAYS * wal_writer_delay_seconds + _SLACK_SECONDS

    def mark(self) -> int:
        """Give the place in the order of commits that one takes that begins now."""
        return next(self._numbers)

    def committed(self, writes: Sequence[Write], mark: int, *, durable: bool) -> None:
        """
        Learn of a commit.

        Args:
            writes: What it wrote.
            mark: What `mark` gave before it began.
            durable: Whether it was with fsync.
        """
        now = time.monotonic()
        with self._lock:
            with contextlib.suppress(IndexError):  # the last one went
                while self._kept[0][1] < now - self._seconds or (durable and self._kept[0][0] < mark):
                    self._kept.popleft()
            if durable:
                return
            self._kept.extend((self.mark(), now, write) for write in writes if isinstance(write, _KEPT))

    def writes(self) -> list[Write]:
        """Give what to write again, in order; each may be there already."""
        with self._lock:
            kept = [write for _, _, write in list(self._kept)]
        return [replace(write, repeated=True) if isinstance(write, OpenAttempt | RecordQueued) else write for write in kept]
