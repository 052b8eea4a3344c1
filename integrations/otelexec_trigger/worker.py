"""
The worker of the local engine: a parent that watches, and children that attempt runs one at a time.

Each child is a process that imports the application afresh, so that a task may use all of Python, leak, crash or hang
without taking others along. The parent reports at once how a child died, kills what neither heeds its limit nor its
cancellation, and starts a new child. A child whose parent dies kills itself: nobody would look after what it does.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from typing import Final

from otelexec import runtime as _runtime
from otelexec.endings import Ending
from otelexec.errors import SettingsError, StoreError
from otelexec.store.records import OpenWork
from otelexec.store.rows import CANCELLED, TIMED_OUT
from otelexec.supervision import Supervisor
from otelexec_trigger import engine
from otelexec_trigger.settings import CANCEL_GRACE_SECONDS, LIMIT_GRACE_SECONDS, STOP_SECONDS
from otelexec_trigger.sweep import Sweeper

logger = logging.getLogger("otelexec.trigger")

UNUSABLE: Final = 78
"""Exit code of a child that can't work: its application can't be imported (EX_CONFIG of sysexits.h)."""

_LOOK_SECONDS: Final = 0.1
_LIMITS_SECONDS: Final = 0.5
_FIRST_RESTART_SECONDS: Final = 0.1
_LAST_RESTART_SECONDS: Final = 30.0
_SETTLED_SECONDS: Final = 10.0
_LAST_WORDS_SECONDS: Final = 5.0


class _Slot:
    """One child at a time."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._started = 0.0
        self._backoff = _FIRST_RESTART_SECONDS
        self._not_before = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start a child, unless one before it has just failed."""
        if time.monotonic() < self._not_before:
            return
        self._started = time.monotonic()
        try:
            # Its standard input stays open as long as this process lives: that is how it learns of our death.
            self.process = subprocess.Popen(  # noqa: S603 (this very Python, with a module of ours)
                self._command, stdin=subprocess.PIPE, env={**os.environ, **_runtime.settings().environment()}, start_new_session=True
            )
        except OSError as error:  # no memory, or no process left
            logger.warning("otelexec.trigger.child: can't be started: %s", error)
            self._wait_before_the_next()

    def reap(self) -> tuple[int, int] | None:
        """Give pid and exit code of the child if it has ended."""
        process = self.process
        code = None if process is None else process.poll()
        if process is None or code is None:
            return None
        if process.stdin is not None:
            process.stdin.close()
        self.process = None
        self._wait_before_the_next()
        return process.pid, code

    def _wait_before_the_next(self) -> None:
        if time.monotonic() - self._started > _SETTLED_SECONDS:
            self._backoff = _FIRST_RESTART_SECONDS
        self._not_before = time.monotonic() + self._backoff
        self._backoff = min(2 * self._backoff, _LAST_RESTART_SECONDS)

    def signal(self, number: int) -> None:
        """Send the child a signal; one that has ended meanwhile gets none."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)


class Worker:
    """
    A worker.

    Args:
        app: The module that registers the tasks.
        concurrency: How many runs it attempts at a time.
        stop_seconds: How long tasks may go on after the worker was told to end.
    """

    def __init__(self, app: str, concurrency: int, *, stop_seconds: float = STOP_SECONDS) -> None:
        self._app = app
        self._stop_seconds = stop_seconds
        self._slots = [_Slot((sys.executable, "-m", "otelexec_trigger.child", app)) for _ in range(concurrency)]
        self._supervisor = Supervisor()
        self._sweeper = Sweeper()
        self._endings: dict[int, dict[str, Ending]] = {}
        self._asked: dict[str, float] = {}
        # No Event: its lock may be held by the very wait that a signal handler interrupts.
        self._stopping = False
        self._next_limits = 0.0
        self._unusable = False

    def run(self) -> None:
        """
        Work until `stop` is called.

        Raises:
            SettingsError: The application can't be imported.
        """
        for slot in self._slots:
            slot.start()
        self._sweeper.start()
        _runtime.get().attend()
        logger.info("otelexec.trigger.worker: %d processes attempt the runs of %s", len(self._slots), self._app)
        try:
            while not self._stopping:
                time.sleep(_LOOK_SECONDS)
                self._look(restart=not self._stopping)
        finally:
            self._end()
        if self._unusable:
            raise SettingsError(f"{self._app} can't be used as an application; its error stands above.")

    def stop(self) -> None:
        """Have the worker end once its tasks have; may be called from a signal handler. A second call kills them."""
        if self._stopping:
            self._stop_seconds = 0.0
        self._stopping = True

    def _look(self, *, restart: bool) -> None:
        for slot in self._slots:
            ended = slot.reap()
            if ended is not None:
                self._buried(*ended)
            if slot.process is None and restart and not self._unusable:
                slot.start()
        if time.monotonic() >= self._next_limits:
            self._next_limits = time.monotonic() + _LIMITS_SECONDS
            try:
                self._enforce_limits()
            except StoreError as error:
                logger.debug("otelexec.trigger.limits: %s", error)

    def _buried(self, pid: int, code: int) -> None:
        endings = self._endings.pop(pid, {})
        if code == UNUSABLE and not self._had_begun(pid):
            self._unusable = True
            self._stopping = True
            return
        if code and not (self._stopping and code == -signal.SIGTERM):
            logger.warning("otelexec.trigger.child: process %d ended with %d", pid, code)
        # Also after a 0: a task may leave by `os._exit`.
        self._supervisor.died(pid, code, endings)

    def _had_begun(self, pid: int) -> bool:
        """Tell whether a child had an attempt open when it ended: then its exit code is the task's."""
        try:
            return bool(self._processes([pid]))
        except StoreError as error:
            logger.debug("otelexec.trigger.child: %s", error)
            return True

    @staticmethod
    def _processes(pids: Collection[int]) -> dict[str, int]:
        """Give the process ids that the store has for children with something open, and the pid of each."""
        own = _runtime.get().process
        return {
            row.process_id: row.pid
            for row in engine.store().processes()
            if row.pid in pids and (row.boot_id, row.pid_namespace) == (own.boot_id, own.pid_namespace)
        }

    def _enforce_limits(self) -> None:
        """Kill the children whose task is over its time, or goes on although it was cancelled."""
        store = engine.store()
        mine = {slot.process.pid: slot for slot in self._slots if slot.process is not None}
        processes = self._processes(mine)
        work = [item for item in store.open_work(list(processes), limit=500) if item.kind == "attempt"] if processes else []
        wishes = store.cancellations([item.execution_id for item in work]) if work else {}
        # From when it is known here: the clock of whoever asked is another one.
        self._asked = {item.token: self._asked.get(item.token, time.monotonic()) for item in work if item.execution_id in wishes}
        now = time.time_ns()
        for item in work:
            wish = wishes.get(item.execution_id)
            if item.deadline_unix_ns is not None and now > item.deadline_unix_ns + LIMIT_GRACE_SECONDS * 1e9:
                seconds = (item.deadline_unix_ns - item.started_unix_ns) / 1e9
                ending = Ending(TIMED_OUT, None, "TimeoutError", f"killed after its {seconds:g} s")
                if wish is not None:
                    ending = Ending(CANCELLED, error_message=f"killed after its {seconds:g} s, as it did not heed its cancellation")
                self._kill(mine[processes[item.process_id]], item, ending)
            elif wish is not None and time.monotonic() > self._asked[item.token] + CANCEL_GRACE_SECONDS:
                self._kill(
                    mine[processes[item.process_id]], item, Ending(CANCELLED, error_message="killed, as it did not heed its cancellation")
                )

    def _kill(self, slot: _Slot, item: OpenWork, ending: Ending) -> None:
        process = slot.process
        if process is not None:
            self._endings.setdefault(process.pid, {})[item.token] = ending
            slot.signal(signal.SIGKILL)

    def _end(self) -> None:
        for slot in self._slots:
            slot.signal(signal.SIGTERM)
        begun = time.monotonic()
        killed = False
        while any(slot.process is not None for slot in self._slots):
            if not killed and time.monotonic() - begun > self._stop_seconds:
                killed = True
                for slot in self._slots:
                    slot.signal(signal.SIGKILL)
            self._look(restart=False)
            time.sleep(_LOOK_SECONDS)
        self._supervisor.stop(_LAST_WORDS_SECONDS)
        self._sweeper.stop(_LAST_WORDS_SECONDS)
