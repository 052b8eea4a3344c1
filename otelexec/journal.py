"""
The way of a process's writes: into the store, or else into the spool, or else into the log and memory, and from there back.

There is one journal per runtime that has a store, so a forked child gets a new one with new locks.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otelexec.effects import run
from otelexec.errors import StoreError, StoreReentered, StoreRejected
from otelexec.finalize import Kept, persist
from otelexec.freeze import for_spool
from otelexec.store import spool as _spool
from otelexec.store.base import Store
from otelexec.store.group_commit import Entry, GroupCommit
from otelexec.store.spool import Spool
from otelexec.store.writes import (
    AddSpans,
    CloseAttempt,
    CloseOuter,
    Heartbeat,
    RecordObserved,
    RecordQueued,
    RefuseQueued,
    RequestCancel,
    Write,
)

if TYPE_CHECKING:
    from otelexec.runtime import Runtime
    from otelexec.settings import Settings

logger = logging.getLogger("otelexec")

# What a log line is the last place for. An open, a heartbeat and a marker are followed by something that says more.
_RECORDS = (CloseAttempt, CloseOuter, RecordObserved, RecordQueued, RefuseQueued, RequestCancel, AddSpans)

MAX_BACKLOG = 10_000
"""Writes kept in memory when neither store nor spool takes them; each has its CRITICAL line as well."""


def spool_folder(settings: Settings, store: Store) -> Path:
    """Give the folder of the spool: the same for workers and the command line."""
    return settings.spool if settings.spool is not None else store.spool_folder


class Journal:
    """
    The writes of one process.

    Args:
        runtime: The runtime of the process.
        store: Its store.
        before: The journal of the process that this one was forked from, with the same store; None if there was none. Where
            that knew the store to be away, each short-lived child need not wait and log anew to find out.

    Attributes:
        group: The door to the store.
        spool: What the store could not take.
        spooling: Whether writes go to the spool until that is taken in.
        said_away: Whether the log has been told that the store is away, and not yet that it is back.
    """

    def __init__(self, runtime: Runtime, store: Store, before: Journal | None = None) -> None:
        self._runtime = runtime
        self._store = store
        store.announce = self._announce
        self.group = GroupCommit(store)
        self.spool = Spool(spool_folder(runtime.settings, store), lambda: runtime.process)
        self.spooling: bool = before is not None and before.spooling
        self.said_away: bool = before is not None and before.said_away
        self._backlog: deque[Write] = deque()
        self._backlog_lock = threading.Lock()
        self._recovery_lock = threading.Lock()
        self._executor: concurrent.futures.ThreadPoolExecutor | None = None

    def _announce(self) -> Sequence[Write]:
        return (Heartbeat(self._runtime.process),)

    # Into the store

    def write(self, write: Write, *, durable: bool = False) -> object:
        """Bring a write into the store, or into the spool, in this thread."""
        patience = self._runtime.settings.open_timeout_seconds
        return run(self._runtime, persist(self, write, durable=durable, patience_seconds=patience))

    def commit_all(self, writes: Sequence[Write]) -> list[object]:
        """Commit writes of the relay one after the other; each goes in with whatever else waits."""
        return [self.group.commit(write, durable=False, timeout_seconds=5.0) for write in writes]

    def leave(self, write: Write, *, durable: bool) -> None:
        """Commit a write without waiting for anything, or leave it for the next commit."""
        self.group.leave(write, self._keep_if_refused, durable=durable, timeout_seconds=self._runtime.settings.finalize_timeout_seconds)
        self.group.flush(wait=False)
        self._runtime.heartbeat.nudge()

    def defer(self, write: Write) -> None:
        """Leave a write for a commit that has room for it, or the background thread's within `cancel_poll_seconds`."""
        self.group.defer(write, self._keep_if_refused, timeout_seconds=self._runtime.settings.finalize_timeout_seconds)
        self._runtime.heartbeat.ensure()

    def offer(self, write: Write) -> None:
        """Commit a write without waiting for anything, or leave it for the next commit; what the store can't take is gone."""
        self.group.leave(write, _ignore, durable=False, timeout_seconds=0.05)
        self.group.flush(wait=False)

    def _keep_if_refused(self, entry: Entry) -> None:
        if entry.error is not None:
            self.keep(entry.write, durable=entry.durable)

    # Where the store does not take them

    def store_failed(self, error: StoreError) -> None:
        """Go over to the spool until the store is back."""
        self.spooling = True
        if not isinstance(error, StoreReentered):  # the store is well
            self._say_away(error)
        self._runtime.heartbeat.nudge()

    def _say_away(self, error: StoreError) -> None:
        if not self.said_away:
            self.said_away = True
            logger.error(
                "otelexec.store.unavailable: %s. Records go to the spool until it is back; the work goes on.",
                str(error).rstrip("."),
                extra={"otelexec_error": str(error)},
            )

    def in_thread(self, loop: asyncio.AbstractEventLoop, function: Callable[[], Any]) -> asyncio.Future[Any]:
        """Call a function that may block on a thread of our own: the loop's pool may be full of the user's work."""
        if self._executor is None:
            self._executor = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="otelexec-spool")
        try:
            return loop.run_in_executor(self._executor, function)
        except RuntimeError:  # the interpreter is shutting down and takes no new threads
            future = loop.create_future()
            future.set_result(function())
            return future

    def keep(self, write: Write, *, durable: bool) -> Kept:
        """Keep a write that the store could not take: in the spool, or else in the log and in memory."""
        self.spooling = True
        execution = self._runtime.execution_of(write.attempt.token) if isinstance(write, CloseAttempt) else None
        write = for_spool(self._runtime, execution, write)
        try:
            self.spool.append(write, durable=durable)
        except (OSError, ValueError, TypeError) as error:
            self.cry(write, error)
            with self._backlog_lock:
                if len(self._backlog) < MAX_BACKLOG:
                    self._backlog.append(write)
            return Kept(durable=False)
        self._runtime.heartbeat.ensure()
        return Kept(durable=durable)

    def cry(self, write: Write, error: Exception) -> None:
        """Put a whole record into one CRITICAL log line, the last place left."""
        if isinstance(write, _RECORDS):
            try:
                line = _spool.encode(write)
            except (TypeError, ValueError) as broken:
                line = f'{{"unencodable": "{type(broken).__name__}"}}'
            _spool.log_homeless(logger, line, error)

    # Back into the store

    @property
    def homeless(self) -> bool:
        """Whether something waits outside the store."""
        return self.spooling or bool(self._backlog) or self.spool.filled

    def recover(self, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """
        Take in what the store could not take before.

        Args:
            meanwhile: Called after each commit; an OSError that it raises leaves the rest to whoever comes next.

        Returns:
            Whether all is in.
        """

        def take_in(writes: Sequence[Write]) -> None:
            self.take_in(writes)
            meanwhile()

        with self._recovery_lock:  # the background thread's, and the one that shuts down
            try:
                # Whether the store is back, before anything else is touched.
                self.take_in([Heartbeat(self._runtime.process)])
                try:
                    self.spool.ingest(take_in, self._store.ingested)
                except OSError as error:
                    if self.spool.filled:
                        raise
                    logger.debug("otelexec.spool.unavailable: %s", error)
                while self._backlog:
                    self.take_in([self._backlog[0]])
                    self._backlog.popleft()
                    meanwhile()
            except (StoreError, OSError) as error:
                logger.debug("otelexec.store.unavailable: %s", error)
                if isinstance(error, StoreError):
                    self._say_away(error)
                return False
            self.spooling = False
            if self.said_away:
                self.said_away = False
                logger.warning("otelexec.store.recovered: %s is back and has what it could not take before", self._store.url)
        return True

    def take_in(self, writes: Sequence[Write]) -> None:
        """Commit writes from the spool durably; what the store refuses by itself goes to the log."""
        results = self._store.commit(writes, durable=True, timeout_seconds=self._runtime.settings.open_timeout_seconds)
        for write, result in zip(writes, results, strict=True):
            if isinstance(result, StoreRejected):
                self.cry(write, result)


def _ignore(_: Entry) -> None:
    """Take no notice: a lost marker is followed by the next one."""
