"""
Group commit with a leader and followers.

A lone caller commits inline. Under concurrency whoever holds the lead commits what everybody waits for in one
transaction. There is no writer thread for threads: it cost 25-40 % there. Coroutines have one
committer thread of their own, since `asyncio.to_thread`'s pool may be full of the user's blocked work.

A signal handler may raise between any two instructions of the main thread, also while it leads. So nothing here is ever
in the hands of a local variable alone: a write is in the queue or in the group, the lead says whose it is, and the
receipt of the group says whether its transaction is through. Each of these changes in one call into C, which no handler
can split, and whoever leads next goes on where the one before was stopped.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, repeat
from queue import Empty, SimpleQueue

from otelexec.clock import monotonic
from otelexec.errors import StoreBusy, StoreError, StoreReentered, StoreUnavailable
from otelexec.store.base import Receipt, Store
from otelexec.store.writes import Write

logger = logging.getLogger("otelexec.store")

MAX_GROUP = 512
"""Writes in one transaction: longer ones keep other processes waiting without saving much."""

MAX_DEFERRED = 16
"""Deferred writes that a commit without fsync leaves where they are: together they cost it less than one each time."""

SLICE_SECONDS = 0.2
"""How long one transaction waits for other processes at a time: nobody waits longer than this beyond its own timeout."""

# A follower looks again after this long, should its leader have been stopped between commit and wake-up (a signal
# handler that raised there).
_RESCUE_SECONDS = 0.05

# So often may anything but a StoreError come out of one group's commit. More are no signals but a fault of ours, and
# the executions must not hang on it.
_MAX_STOPS = 8

_LEAST_PAUSE_SECONDS = 0.01

_LEAD = "lead"


class _Fault(StoreUnavailable):
    """The store raised what it should not, again and again."""


class Entry:
    """
    One write on its way into the store.

    Attributes:
        write: What to write.
        durable: Whether it must survive power loss.
        deadline: Until when other processes are waited for, on the monotonic clock.
        done: Whether `result` or `error` holds.
        result: What the store gave.
        error: Why it did not get there.
    """

    __slots__ = ("_notify", "_wake", "deadline", "done", "durable", "error", "result", "write")

    def __init__(self, write: Write, *, durable: bool, timeout_seconds: float, notify: Callable[[Entry], None] | None = None) -> None:
        self.write = write
        self.durable = durable
        self.deadline = monotonic() + timeout_seconds
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
        """Wake the thread that waits; False when no thread does."""
        if self._notify is not None:
            return False
        if self._wake is not None:
            with contextlib.suppress(RuntimeError):  # awake already
                self._wake.release()
        return True

    def settle(self, result: object, error: Exception | None) -> None:
        """Set the answer and tell whoever waits."""
        self.result, self.error = result, error
        if self._notify is not None:
            try:
                self._notify(self)
            except Exception:  # one listener's trouble is not the others'
                logger.exception("otelexec.store.notify")
        self.done = True  # after the call: a leader that is stopped in between is followed by one that tells it again
        self.nudge()

    def answer(self) -> object:
        """Give the result or raise the error."""
        if self.error is not None:
            raise self.error
        return self.result


class _Call:
    """
    What a call that may lead holds until it is over, however it ends.

    The lead is a weak reference to it. To look at the frames of other threads instead would crash the interpreter: they run on
    meanwhile (https://github.com/python/cpython/issues/99110).
    """

    __slots__ = ("__weakref__", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()


class _Group:
    """What the leader has in hand; it stays there when a signal handler stops the leader."""

    __slots__ = ("entries", "receipt", "stops")

    def __init__(self, entries: Sequence[Entry] = (), stops: int = 0) -> None:
        self.entries = list(entries)
        self.receipt = Receipt()
        self.stops = stops


def _answer(result: object) -> tuple[object, StoreError | None]:
    return (None, result) if isinstance(result, StoreError) else (result, None)


def _take(waiting: deque[Entry], group: _Group) -> None:
    room = min(len(waiting), MAX_GROUP - len(group.entries))
    with contextlib.suppress(IndexError):  # somebody withdrew
        group.entries.extend(map(deque.popleft, repeat(waiting, room)))


def _each(waiting: deque[Entry]) -> Iterator[Entry]:
    """Give what waits; without a GIL a deque's own iterator raises when others add to it meanwhile."""
    with contextlib.suppress(IndexError):
        for place in count():
            yield waiting[place]


class GroupCommit:
    """
    One process's door to a store.

    Args:
        store: The store.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._pending: deque[Entry] = deque()
        self._deferred: deque[Entry] = deque()
        self._group = _Group()
        # Who leads. A dict and not a lock: taking it twice changes nothing, and it can be asked.
        self._lead: dict[str, object] = {}
        self._signal: SimpleQueue[None] = SimpleQueue()
        self._committer: threading.Thread | None = None
        self._committer_lock = threading.Lock()
        self._rescue_lock = threading.Lock()
        self._closed = False

    def commit(self, write: Write, *, durable: bool = False, timeout_seconds: float = 1.0) -> object:
        """
        Commit one write together with whatever else waits.

        What a signal handler raises meanwhile comes out once the write is done; to repeat it then is the caller's
        affair, and harmless where the write can be told from another one.

        Args:
            write: What to write.
            durable: Whether it must survive power loss.
            timeout_seconds: How long to wait for other processes, and for one's turn.

        Returns:
            The write's result.

        Raises:
            StoreReentered: This thread is in the middle of a commit already, which waits for what it does now.
            StoreError: It was not written.
        """
        entry = Entry(write, durable=durable, timeout_seconds=timeout_seconds)
        call: _Call | None = _Call()
        leader = weakref.ref(call)
        held: BaseException | None = None
        self._pending.append(entry)
        try:
            while True:
                try:
                    if entry.done:
                        break
                    self._advance(entry, leader)
                except BaseException as error:
                    held = error if held is None else held
        finally:
            try:
                if self._lead.get(_LEAD) is leader:
                    self._let_go(leader)
            finally:
                # What is raised keeps this frame alive, and has the call look as if it went on, until the garbage is collected.
                call = None
        if held is not None and not isinstance(entry.error, _Fault):
            raise held
        return entry.answer()

    def _advance(self, entry: Entry, leader: object) -> None:
        """Lead once, or wait for a moment."""
        if self._lead.setdefault(_LEAD, leader) is leader:
            try:
                if not entry.done:
                    self._commit_group()
            finally:
                self._let_go(leader)
        elif self._is_interrupted_here() and self._withdraw(entry):
            entry.settle(None, StoreReentered())
        elif not entry.prepared:
            # Then one more try for the lead: it may have been let go before anybody could wake this entry.
            entry.prepare()
        else:
            entry.wait(_RESCUE_SECONDS)
            if not entry.done:
                self._rescue_lead()
            if monotonic() > entry.deadline + 2 * SLICE_SECONDS and not entry.done and self._withdraw(entry):
                entry.settle(None, StoreBusy("The store is busy with other executions; this one did not get its turn."))

    def submit(self, write: Write, notify: Callable[[Entry], None], *, durable: bool, timeout_seconds: float, wake: bool = True) -> None:
        """
        Commit one write on the committer thread.

        Args:
            write: What to write.
            notify: Called on that thread with the settled entry; must not block.
            durable: Whether it must survive power loss.
            timeout_seconds: How long to wait for other processes.
            wake: Whether to wake that thread at once; else `wake()` has to follow.
        """
        self._pending.append(Entry(write, durable=durable, timeout_seconds=timeout_seconds, notify=notify))
        if self._committer is None:
            self._start_committer()
        if self._committer is None or self._closed:  # the process is ending
            self.flush()
        elif wake:
            self.wake()

    def wake(self) -> None:
        """Have the committer thread look for writes."""
        if self._pending:
            self._signal.put(None)

    def leave(self, write: Write, notify: Callable[[Entry], None], *, durable: bool, timeout_seconds: float) -> None:
        """
        Leave a write for the next commit, without taking any lock.

        For finalizations that the garbage collector begins: they may run in the thread that holds the lead.

        Args:
            write: What to write.
            notify: Called with the settled entry by whoever commits it.
            durable: Whether it must survive power loss.
            timeout_seconds: How long to wait for other processes, once somebody commits it.
        """
        self._pending.append(Entry(write, durable=durable, timeout_seconds=timeout_seconds, notify=notify))

    def defer(self, write: Write, notify: Callable[[Entry], None], *, timeout_seconds: float) -> None:
        """
        Leave a write for the next commit that has an fsync to share, that finds `MAX_DEFERRED` of them, or that `flush` makes.

        Args:
            write: What to write.
            notify: Called with the settled entry by whoever commits it.
            timeout_seconds: How long to wait for other processes, once somebody commits it.
        """
        self._deferred.append(Entry(write, durable=False, timeout_seconds=timeout_seconds, notify=notify))

    @property
    def waits(self) -> bool:
        """Tell whether a write is left behind or deferred."""
        return bool(self._pending or self._deferred or self._group.entries)

    def flush(self, *, wait: bool = True) -> None:
        """
        Commit whatever was left behind or deferred, unless somebody is at it.

        Args:
            wait: Whether to wait for other processes and threads; if not, what can't be written now stays.
        """
        call: _Call | None = _Call()
        leader = weakref.ref(call)
        # Into the queue, since whoever leads now would leave them where they are; with suppress, as it may take them meanwhile.
        with contextlib.suppress(IndexError):
            self._pending.extend(map(deque.popleft, repeat(self._deferred, len(self._deferred))))
        try:
            while (self._pending or self._group.entries) and self._lead.setdefault(_LEAD, leader) is leader:
                self._commit_group(wait=wait)
                if not wait:
                    return
        finally:
            try:
                self._let_go(leader)
            finally:
                call = None  # as in `commit`

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

    def _commit_group(self, *, wait: bool = True) -> None:
        """Commit what waits, or finish what another leader was stopped in. Only for whoever leads."""
        group = self._group
        if not group.receipt.committed:
            if group.entries:  # left by a leader that was stopped, or had no time
                group = self._group = _Group([entry for entry in group.entries if not entry.done], group.stops)
            _take(self._pending, group)
            if len(self._deferred) >= MAX_DEFERRED or any(entry.durable for entry in group.entries):
                _take(self._deferred, group)
            if not group.entries:
                return
        # Also what is committed already: a leader that was stopped after its commit may not have seen it to the disk.
        if not self._transact(group, wait=wait):
            return
        for entry, result in zip(group.entries, group.receipt.results, strict=True):
            if not entry.done:
                entry.settle(*_answer(result))
        self._group = _Group()

    def _transact(self, group: _Group, *, wait: bool) -> bool:
        """Commit the group; if that is not possible, its members are answered or stay in hand."""
        started = monotonic()
        try:
            self.store.commit(
                [entry.write for entry in group.entries],
                durable=any(entry.durable for entry in group.entries),
                timeout_seconds=SLICE_SECONDS if wait else 0,
                receipt=group.receipt,
            )
        except StoreBusy as error:
            if wait and group.receipt.committed:
                self._fail(group, error)
            elif wait:
                self._expire(group, error, started)
            return False
        except StoreError as error:
            self._fail(group, error)
            return False
        except BaseException as error:
            group.stops += 1
            if group.stops <= _MAX_STOPS:
                raise
            logger.exception("otelexec.store.commit")
            self._fail(group, _Fault(f"{type(error).__name__}: {error}"))
            return False
        return True

    def _fail(self, group: _Group, error: StoreError) -> None:
        written = iter(group.receipt.results if group.receipt.committed else ())
        for entry in group.entries:
            result = next(written, error)
            if not entry.done:
                entry.settle(*_answer(error if entry.durable else result))
        self._group = _Group()

    def _expire(self, group: _Group, error: StoreError, started: float) -> None:
        """Answer those whose time is up; the others stay in hand, and whoever came meanwhile joins them."""
        group.entries.extend(map(deque.popleft, repeat(self._pending, len(self._pending))))
        now = monotonic()
        for entry in group.entries:
            if entry.deadline <= now:
                entry.settle(None, error)
        self._group = _Group([entry for entry in group.entries if not entry.done])
        if now - started < _LEAST_PAUSE_SECONDS:  # not every kind of lock is waited for by the store
            time.sleep(_LEAST_PAUSE_SECONDS)

    def _let_go(self, leader: object) -> None:
        """Give the lead away, to somebody who waits."""
        try:
            if self._lead.get(_LEAD) is leader:
                del self._lead[_LEAD]
        finally:
            # Once more, should a signal handler have raised in the first line.
            if self._lead.get(_LEAD) is leader:
                del self._lead[_LEAD]
        if self._pending or self._group.entries:
            self._hand_on()

    def _rescue_lead(self) -> None:
        """Take the lead from a call that signal handlers threw out before it could let go, one upon another."""
        holder = self._lead.get(_LEAD)
        if not isinstance(holder, weakref.ref) or holder() is not None or not self._rescue_lock.acquire(blocking=False):
            return
        try:
            # Nobody but a rescuer takes it from a call that has ended, so this is still the one that was looked at.
            if self._lead.get(_LEAD) is holder:
                del self._lead[_LEAD]
        finally:
            self._rescue_lock.release()

    def _is_interrupted_here(self) -> bool:
        """Tell whether this very thread has the lead, in a call that a signal handler or a finalizer has interrupted."""
        holder = self._lead.get(_LEAD)
        if holder is self:
            return threading.current_thread() is self._committer
        call = holder() if isinstance(holder, weakref.ref) else None
        return call is not None and call.thread == threading.get_ident()

    def _hand_on(self) -> None:
        if self._committer is not None:
            self._signal.put(None)
            with contextlib.suppress(IndexError):  # emptied by the next leader
                self._pending[0].nudge()
            return
        for entry in chain(tuple(self._group.entries), _each(self._pending)):
            if not entry.done and entry.nudge():
                return

    def _start_committer(self) -> None:
        with self._committer_lock:
            if self._committer is None:
                thread = threading.Thread(target=self._serve, name="otelexec-committer", daemon=True)
                with contextlib.suppress(RuntimeError):  # the interpreter is shutting down
                    contextvars.Context().run(thread.start)  # as in the heartbeat
                    self._committer = thread

    def _serve(self) -> None:
        while not self._closed:
            self._signal.get()
            while self._pending or self._group.entries:
                if self._lead.setdefault(_LEAD, self) is not self:
                    with contextlib.suppress(Empty):
                        self._signal.get(timeout=_RESCUE_SECONDS)
                    continue
                try:
                    self._commit_group()
                except Exception:  # a fault of ours: after a few of them the group is answered
                    logger.exception("otelexec.store.commit")
                finally:
                    self._let_go(self)
        self.flush()
