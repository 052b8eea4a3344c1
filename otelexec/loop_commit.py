"""
Commits of coroutines: handed to the committer thread together, and answered together.

Each hand-over between threads costs the interpreter a switch, and often a system call. So the writes of all tasks that
are ready in one turn of the loop reach the committer at once, and the answers to one transaction come back as one call.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from otelexec.effects import Commit
    from otelexec.runtime import Runtime
    from otelexec.store.group_commit import Entry


class _Waiting:
    """A task that waits for its commit."""

    __slots__ = ("_door", "answer", "done", "future")

    def __init__(self, door: LoopCommit, loop: asyncio.AbstractEventLoop) -> None:
        self._door = door
        self.future: asyncio.Future[None] = loop.create_future()
        self.done = False
        self.answer: Any = None

    def settled(self, entry: Entry) -> None:
        """Take the answer, on whatever thread led the commit."""
        self.answer = entry.error or entry.result
        self._door.deliver(self)


class LoopCommit:
    """The way of one event loop to the committer thread; it doesn't hold the loop, which may end before it."""

    def __init__(self) -> None:
        self._settled: deque[_Waiting] = deque()
        self._delivering = False

    async def commit(self, runtime: Runtime, effect: Commit, cancelled: Callable[[asyncio.CancelledError], None]) -> Any:
        """
        Commit a write and wait for it, whatever happens to the task meanwhile.

        Args:
            runtime: The runtime of this process.
            effect: What to commit.
            cancelled: Told of every cancellation; the commit is under way, and its answer is wanted.

        Returns:
            The write's result, or the StoreError that kept it out.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(self, loop)
        group = runtime.journal.group
        group.submit(effect.write, waiting.settled, durable=effect.durable, timeout_seconds=effect.timeout_seconds, wake=False)
        # Not at once: tasks that are ready now add theirs first.
        loop.call_soon(group.wake)
        while not waiting.done:
            try:
                await waiting.future
            except asyncio.CancelledError as error:
                cancelled(error)
                waiting.future = loop.create_future()
        return waiting.answer

    def deliver(self, waiting: _Waiting) -> None:
        """Bring an answer to its task, from any thread."""
        self._settled.append(waiting)
        # Two threads may both see False: one call more does no harm. Whoever sees True comes before that call looks.
        if not self._delivering:
            self._delivering = True
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile; the commit is through
                waiting.future.get_loop().call_soon_threadsafe(self._deliver_all)

    def _deliver_all(self) -> None:
        self._delivering = False
        while self._settled:
            waiting = self._settled.popleft()
            waiting.done = True
            if not waiting.future.done():
                waiting.future.set_result(None)


_doors: WeakKeyDictionary[asyncio.AbstractEventLoop, LoopCommit] = WeakKeyDictionary()


def of(loop: asyncio.AbstractEventLoop) -> LoopCommit:
    """Give the way of a loop."""
    door = _doors.get(loop)
    if door is None:
        door = _doors[loop] = LoopCommit()
    return door
