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
import traceback
from typing import Any, Final

from otelexec import runtime as _runtime
from otelexec.cli import console
from otelexec.errors import OtelexecError, StoreError
from otelexec.store import run_statements as statements
from otelexec.store.runs import DueRun
from otelexec_trigger import engine
from otelexec_trigger.consume import attempt
from otelexec_trigger.settings import POLL_SECONDS
from otelexec_trigger.tasks import TASKS
from otelexec_trigger.worker import UNUSABLE

logger = logging.getLogger("otelexec.trigger")

LOST_STORE: Final = 75
"""Exit code of a child that does not know whether its attempt was opened (EX_TEMPFAIL): the parent closes what was."""

_CANDIDATES: Final = 16


class Child:
    """The loop of a child."""

    def __init__(self) -> None:
        self._stopping = threading.Event()

    def stop(self, *_: Any) -> None:
        """End after the run that is being attempted."""
        self._stopping.set()

    def run(self) -> int:
        """Attempt runs until it is stopped; gives the exit code."""
        while not self._stopping.is_set():
            try:
                found = self._due()
            except StoreError as error:
                logger.debug("otelexec.trigger.store: %s", error)
                found = []
            try:
                if not any(attempt(due, TASKS[due.run.task]) for due in found):
                    self._stopping.wait(POLL_SECONDS)
            except StoreError as error:
                logger.warning("otelexec.trigger.store: %s", error)
                return LOST_STORE
        return 0

    @staticmethod
    def _due() -> list[DueRun]:
        store, tasks = engine.store(), sorted(TASKS)
        lease_seconds = _runtime.settings().lease_seconds
        lapsed_too = store.now_unix_ns() - store.up_since_unix_ns() > lease_seconds * 1e9
        return store.read(lambda tx: statements.due_runs(tx, tasks, limit=_CANDIDATES, lapsed_too=lapsed_too))


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


def _die_with_parent() -> None:
    """Wait for the parent's death, and follow it."""
    try:
        while os.read(sys.stdin.fileno(), 1):
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
    child = Child()
    signal.signal(signal.SIGTERM, child.stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair
    threading.Thread(target=_die_with_parent, name="otelexec-parent", daemon=True).start()
    console.log_to_stderr()
    _runtime.get().is_supervised()
    try:
        load(arguments[0])
    except BaseException:
        traceback.print_exc()
        return UNUSABLE
    return child.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
