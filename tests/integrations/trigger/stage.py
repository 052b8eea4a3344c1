"""A stage for tests: a store, `otelexec trigger serve` and `worker` processes on it, and this process beside them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.integrations.stage import ROOT, ReadStage, WorkerProcess
from tests.patience import PATIENCE
from tests.records import until

KEY = "tr_dev_for_the_tests"
APP = "tests.integrations.trigger.tasks_app"
START_SECONDS = 40.0


class Process(WorkerProcess):
    """
    A process of `otelexec trigger`.

    Args:
        stage: Whose it is.
        name: Its name.
        arguments: After `otelexec trigger`.
        environment: Further variables.
        ready: What it prints once it is there.
    """

    def __init__(
        self, stage: ReadStage, name: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None, ready: str = ""
    ) -> None:
        self.name = name
        self.log = stage.folder / f"{name}.log"
        self._ready = ready
        command = [sys.executable, "-m", "otelexec", "trigger", *arguments]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=stage.environment | {"PYTHONUNBUFFERED": "1"} | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_ready(self) -> str:
        """Wait for the line that says so, and give it."""
        deadline = time.monotonic() + PATIENCE * START_SECONDS
        while (found := re.search(self._ready, self.text())) is None:
            assert self.process.poll() is None, f"{self.name} ended:\n{self.text()[-3000:]}"
            assert time.monotonic() < deadline, f"{self.name} did not start:\n{self.text()[-3000:]}"
            time.sleep(0.02)
        return found[0]

    def children(self) -> list[int]:
        """Give the pids of a worker's children."""
        try:
            return [child.pid for child in psutil.Process(self.pid).children()]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self.process.kill()
        self.process.wait()


class Stage(ReadStage):
    """
    A store, and the processes on it.

    Args:
        folder: For store, marks and logs.
        settings: Further variables of every process.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(folder, "trigger")
        self._settings = dict(settings or {})
        self._names = 0

    @property
    def environment(self) -> dict[str, str]:
        """Give the environment of a process."""
        return super().environment | {"TRIGGER_SECRET_KEY": KEY} | self._settings

    def _start(self, kind: str, arguments: Sequence[str], ready: str, environment: Mapping[str, str] | None) -> Process:
        self._names += 1
        process = Process(self, f"{kind}-{self._names}", [kind, *arguments], environment, ready)
        self.processes.append(process)
        return process

    def start_worker(self, concurrency: int = 2, *, app: str = APP, **environment: str) -> Process:
        """Start a worker without waiting for it."""
        return self._start("worker", ["--app", app, "--concurrency", str(concurrency)], "Attempting", environment)

    def worker(self, concurrency: int = 2, **environment: str) -> Process:
        """Start a worker, and wait until it has said so; its children may still be on their way."""
        worker = self.start_worker(concurrency, **environment)
        worker.wait_until_ready()
        return worker

    def serve(self, port: int = 0, **environment: str) -> tuple[Process, str]:
        """Start a server, and give it and its URL."""
        server = self._start("serve", ["--port", str(port)], r"http://[\d.]+:\d+", environment)
        url = server.wait_until_ready()
        until(lambda: _answers(url), START_SECONDS)
        return server, url

    def run(self, run_id: str) -> dict[str, Any]:
        """Give a run as the server would tell of it, without one."""
        from otelexec_trigger import LocalBackend

        return LocalBackend().get(run_id).raw or {}

    def close(self) -> None:
        """End what still runs, without asking."""
        for process in self.processes:
            if isinstance(process, Process):
                for pid in process.children():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            process.stop(signal.SIGKILL)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
