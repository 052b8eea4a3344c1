"""
A child of the worker: `python -m otelexec_trigger.child MODULE`, with a pipe from its parent as standard input.

It attempts one run after the other in its main thread, where a task may use signals and event loops as it likes.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any, Final

from otelexec import runtime as _runtime
from otelexec.errors import OtelexecError, StoreError, StoreUnavailable
from otelexec.store import run_queries
from otelexec.store.runs import DueRun
from otelexec_trigger import engine
from otelexec_trigger.consume import attempt, leaving
from otelexec_trigger.settings import POLL_SECONDS
from otelexec_trigger.tasks import TASKS
from otelexec_trigger.worker import UNUSABLE

logger = logging.getLogger("otelexec.trigger")

LOST_STORE: Final = 75
"""Exit code of a child that does not know whether its attempt was opened (EX_TEMPFAIL): the parent closes what was."""

_CANDIDATES: Final = 16
_SKIPPED_SECONDS: Final = 60.0


class Child:
    """The loop of a child."""

    def __init__(self) -> None:
        # No Event: its lock may be held by the very wait that a signal handler interrupts.
        self._stopping = False
        self._pid = os.getpid()
        self._looked_ns = self._awake_since_ns = 0
        self._skipped: dict[str, float] = {}

    def stop(self, *_: Any) -> None:
        """End after the run that is being attempted."""
        self._stopping = True

    def heed_signals(self) -> None:
        """Take the signals of the parent; a task may have put handlers of its own in place."""
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair

    def run(self) -> int:
        """Attempt runs until it is stopped; gives the exit code."""
        while not self._stopping:
            self.heed_signals()
            try:
                found = self._due()
            except StoreError as error:
                logger.debug("otelexec.trigger.store: %s", error)
                found = []
            try:
                if not any(self._attempt(due) for due in found):
                    time.sleep(POLL_SECONDS)
            except StoreError as error:
                logger.warning("otelexec.trigger.store: %s", error)
                return LOST_STORE
        return 0

    def _attempt(self, due: DueRun) -> bool:
        try:
            return attempt(due, TASKS[due.run.task])
        except StoreUnavailable:
            raise
        except Exception:
            # A run that can't be opened must not keep the others from being attempted.
            logger.exception("otelexec.trigger.attempt: %s", due.run.run_id)
            self._skipped[due.run.run_id] = time.monotonic() + _SKIPPED_SECONDS
            return False
        finally:
            if os.getpid() != self._pid:
                os._exit(0)  # the task forked, and came back in the copy as well

    def _due(self) -> list[DueRun]:
        store, tasks = engine.store(), sorted(TASKS)
        lease_ns = _runtime.settings().lease_seconds * 1e9
        now = store.now_unix_ns()
        if now - self._looked_ns > lease_ns / 6 + 1e9:
            # The first look, or one after the machine slept or the store was locked: others may have had no chance to beat, either.
            self._awake_since_ns = now
        self._looked_ns = now
        lapsed_too = now - self._awake_since_ns > lease_ns / 3 and now - store.up_since_unix_ns() > lease_ns
        self._skipped = {run_id: until for run_id, until in self._skipped.items() if until > time.monotonic()}
        skipped = list(self._skipped)
        return store.read(lambda tx: run_queries.due_runs(tx, tasks, limit=_CANDIDATES, lapsed_too=lapsed_too, but=skipped))


def load(app: str) -> None:
    """
    Import the application.

    Raises:
        Exception: Whatever importing it raises.
        OtelexecError: It registers no task.
    """
    sys.path.insert(0, str(os.getcwd()))  # noqa: PTH109 (as `python -m` has it)
    importlib.import_module(app)
    if not TASKS:
        raise OtelexecError(f"{app} registers no task: decorate a function with @otelexec_trigger.task('id').")


def _die_with_parent(pipe: int) -> None:
    """Wait for the parent's death, and follow it."""
    try:
        while os.read(pipe, 1):
            pass
    except OSError:
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: list[str]) -> int:
    """
    Run a child.

    Args:
        arguments: The application's module.

    Returns:
        The exit code.
    """
    # A task, or a process that it starts, that reads its standard input finds nothing there, and does not wait for the parent.
    pipe, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    threading.Thread(target=_die_with_parent, args=(pipe,), name="otelexec-parent", daemon=True).start()
    _runtime.get().be_supervised()
    try:
        load(arguments[0])
    except BaseException:
        traceback.print_exc()
        return UNUSABLE
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")  # unless the application has set its own up
    # Until here SIGTERM just ended it: importing may take long, and nothing has begun.
    code = Child().run()
    leaving("the worker ends").start()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
