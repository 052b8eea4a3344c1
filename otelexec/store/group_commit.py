"""
Group commit with a leader and followers.

A lone caller commits inline. Under concurrency whoever holds the lead commits what everybody waits for in one
transaction. There is no writer thread for threads: it cost 25-40 % there (design section 6). Coroutines have one
committer thread of their own, since `asyncio.to_thread`'s pool may be full of the user's blocked work.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from otelexec.errors import StoreError, StoreUnavailable
from otelexec.store.base import CommitInterrupted, Store, Write

MAX_GROUP = 512
"""Writes in one transaction: longer ones keep other processes waiting without saving much."""

# A follower looks again after this long, should its leader have died between commit and wake-up (a signal handler
# that raised there).
_RESCUE_SECONDS = 0.05


class Entry:
    """
    One write on its way into the store.

    Attributes:
        write: What to write.
        durable: Whether it must survive power loss.
        timeout_seconds: How long its transaction may wait for other processes.
        done: Whether `result` or `error` holds.
        result: What the store gave.
        error: Why it did not get there.
    """

    __slots__ = ("_notify", "_wake", "done", "durable", "error", "result", "timeout_seconds", "write")

    def __init__(self, write: Write, *, durable: bool, timeout_seconds: float, notify: Callable[[Entry], None] | None = None) -> None:
        self.write = write
        self.durable = durable
        self.timeout_seconds = timeout_seconds
        self.done = False
        self.result: object = None
        self.error: Exception | None = None
        self._notify = notify
        self._wake: threading.Lock | None = None

    @property
    def prepared(self) -> bool:
        """Tell whether the entry can be woken."""
        return self._wake is not None

    def prepare(self) -> None:
        """Make the entry one that can be woken."""
        if self._wake is None:
            wake = threading.Lock()
            wake.acquire()
            self._wake = wake

    def wait(self, timeout_seconds: float) -> None:
        """Wait until the entry is done or is asked to lead."""
        if not self.done and self._wake is not None:
            self._wake.acquire(timeout=timeout_seconds)

    def nudge(self) -> bool:
        """Wake the thread that waits; False when it is nobody's but the committer thread's."""
        if self._notify is not None:
            return False
        if self._wake is not None:
            with contextlib.suppress(RuntimeError):  # awake already
                self._wake.release()
        return True

    def settle(self, result: object, error: Exception | None) -> None:
        """Set the answer and tell whoever waits."""
        self.result, self.error = result, error
        self.done = True
        if self._notify is not None:
            self._notify(self)
        else:
            self.nudge()

    def answer(self) -> object:
        """Give the result or raise the error."""
        if self.error is not None:
            raise self.error
        return self.result


class GroupCommit:
    """
    One process's door to a store.

    Args:
        store: The store.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._pending: deque[Entry] = deque()
        self._lead = threading.Lock()
        self._signal: SimpleQueue[None] = SimpleQueue()
        self._committer: threading.Thread | None = None
        self._committer_lock = threading.Lock()
        self._closed = False

    def commit(self, write: Write, *, durable: bool = False, timeout_seconds: float = 1.0) -> object:
        """
        Commit one write together with whatever else waits.

        Args:
            write: What to write.
            durable: Whether it must survive power loss.
            timeout_seconds: How long to wait for other processes, and for one's turn.

        Returns:
            The write's result.

        Raises:
            StoreError: It was not written.
        """
        entry = Entry(write, durable=durable, timeout_seconds=timeout_seconds)
        deadline = time.monotonic() + timeout_seconds + 1.0
        self._pending.append(entry)
        try:
            while not entry.done:
                if self._lead.acquire(blocking=False):
                    try:
                        self._lead_group(entry)
                    finally:
                        self._lead.release()
                        self._hand_on()
                elif not entry.prepared:
                    # Then one more try for the lead: it may have been let go before anybody could wake this entry.
                    entry.prepare()
                else:
                    entry.wait(_RESCUE_SECONDS)
                    if time.monotonic() > deadline and self._withdraw(entry):
                        raise StoreUnavailable("The store is busy with other executions; this one did not get its turn.")
        except BaseException:
            # A signal handler raised while this thread waited. The caller repeats the write, so it must not stay here.
            self._withdraw(entry)
            raise
        return entry.answer()

    def submit(self, write: Write, notify: Callable[[Entry], None], *, durable: bool, timeout_seconds: float) -> None:
        """
        Commit one write on the committer thread.

        Args:
            write: What to write.
            notify: Called on that thread with the settled entry; must not block.
            durable: Whether it must survive power loss.
            timeout_seconds: How long to wait for other processes.
        """
        self._pending.append(Entry(write, durable=durable, timeout_seconds=timeout_seconds, notify=notify))
        if self._committer is None:
            self._start_committer()
        self._signal.put(None)

    def leave(self, write: Write, notify: Callable[[Entry], None], *, durable: bool, timeout_seconds: float) -> None:
        """
        Leave a write for the next commit, without taking any lock.

        For finalizations that the garbage collector begins: they may run in the thread that holds the lead.

        Args:
            write: What to write.
            notify: Called with the settled entry by whoever commits it.
            durable: Whether it must survive power loss.
            timeout_seconds: How long to wait for other processes.
        """
        self._pending.append(Entry(write, durable=durable, timeout_seconds=timeout_seconds, notify=notify))
        self._signal.put(None)

    def flush(self) -> None:
        """Commit whatever was left behind, unless somebody is at it."""
        while self._pending and self._lead.acquire(blocking=False):
            try:
                self._lead_group(None)
            finally:
                self._lead.release()

    def close(self) -> None:
        """Commit what is left and end the committer thread."""
        self.flush()
        self._closed = True
        self._signal.put(None)

    def _withdraw(self, entry: Entry) -> bool:
        try:
            self._pending.remove(entry)
        except ValueError:  # a leader has it in hand, so the answer is near
            return False
        return True

    def _lead_group(self, own: Entry | None) -> None:
        if own is not None and own.done:
            return
        group: list[Entry] = []
        try:
            while self._pending and len(group) < MAX_GROUP:
                group.append(self._pending.popleft())
            if not group:
                return
            self._commit_group(group)
        finally:
            # Not settled means that a signal handler raised before the commit: the writes wait for the next leader.
            self._pending.extendleft(entry for entry in reversed(group) if not entry.done)

    def _commit_group(self, group: list[Entry]) -> None:
        writes = [entry.write for entry in group]
        durable = any(entry.durable for entry in group)
        timeout = min(entry.timeout_seconds for entry in group)
        held: BaseException | None = None
        try:
            results = self.store.commit(writes, durable=durable, timeout_seconds=timeout)
        except CommitInterrupted as interrupted:
            results, held = interrupted.results, interrupted.cause
        except StoreError as error:
            for entry in group:
                entry.settle(None, error)
            return
        for entry, result in zip(group, results, strict=True):
            entry.settle(*((None, result) if isinstance(result, StoreError) else (result, None)))
        if held is not None:
            raise held

    def _hand_on(self) -> None:
        with contextlib.suppress(IndexError):  # emptied by the next leader
            if self._pending and not self._pending[0].nudge():
                self._signal.put(None)

    def _start_committer(self) -> None:
        with self._committer_lock:
            if self._committer is None:
                thread = threading.Thread(target=self._serve, name="otelexec-committer", daemon=True)
                thread.start()
                self._committer = thread

    def _serve(self) -> None:
        while not self._closed:
            self._signal.get()
            while self._pending:
                with self._lead:
                    self._lead_group(None)
        self.flush()
