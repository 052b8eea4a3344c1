"""A stage for tests: a Valkey, RQ workers in subprocesses, and the store that they share with this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from redis import Redis
from rq import Queue
from rq import Worker as RQWorker
from rq.job import Job
from rq.serializers import JSONSerializer

from tests.integrations.rq.jobs import LOGGED
from tests.integrations.rq.worker_app import INSTRUMENT, OPTIONS
from tests.integrations.stage import ROOT, ReadStage, WorkerProcess
from tests.patience import PATIENCE
from tests.records import until

START_SECONDS = 40.0


class Worker(WorkerProcess):
    """
    An RQ worker in a session of its own.

    Args:
        stage: Whose it is.
        name: Its name.
        cls: Name of its class.
        queues: What it listens to; empty for the stage's queue.
        options: What it is made with; see `worker_app`.
        environment: Further variables; None removes one.
    """

    def __init__(
        self,
        stage: Stage,
        name: str,
        cls: str = "Worker",
        queues: tuple[str, ...] = (),
        *,
        environment: Mapping[str, str | None] | None = None,
        **options: Any,
    ) -> None:
        self.name = f"{stage.folder.name}-{name}"
        self.log = stage.folder / f"{name}.log"
        self._stage = stage
        own: dict[str, str | None] = {OPTIONS: json.dumps({"name": self.name, **options})}
        variables = {key: value for key, value in (stage.environment | own | dict(environment or {})).items() if value is not None}
        command = [sys.executable, "-m", "tests.integrations.rq.worker_app", stage.url, cls, *(queues or (stage.name,))]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def wait_until_ready(self, workers: int = 1) -> None:
        """Wait until it has registered with the server."""
        deadline = time.monotonic() + PATIENCE * START_SECONDS
        while sum(self._stage.name in worker.queue_names() for worker in RQWorker.all(connection=self._stage.connection)) < workers:
            assert self.process.poll() is None, f"the worker ended:\n{self.text()[-3000:]}"
            assert time.monotonic() < deadline, f"the worker did not start:\n{self.text()[-3000:]}"
            time.sleep(0.02)

    def horses(self) -> list[int]:
        """Give the pids of its work horses, which are leaders of process groups of their own."""
        try:
            return [child.pid for child in psutil.Process(self.pid).children() if _is_leader(child)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """Kill it and its horses with SIGKILL, as a machine that goes down does."""
        horses = self.horses()
        self.process.kill()
        self.process.wait()
        for pid in horses:
            try:
                psutil.Process(pid).kill()
            except psutil.NoSuchProcess:
                continue


def _is_leader(process: psutil.Process) -> bool:
    try:
        return os.getpgid(process.pid) == process.pid
    except ProcessLookupError:
        return False


class Stage(ReadStage):
    """
    A queue on a Valkey, a store, and the workers between them.

    Args:
        folder: For store, marks and logs.
        url: Of the Valkey.
    """

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder, "rq")
        self.url = url
        self.name = folder.name
        self.connection = Redis.from_url(url)
        self.queue = Queue(self.name, connection=self.connection)
        self.workers: list[Worker] = []

    @property
    def environment(self) -> dict[str, str]:
        """Give the environment of a worker, which instruments itself."""
        return super().environment | {INSTRUMENT: "{}", LOGGED: str(self.folder / "callbacks")}

    @property
    def callbacks(self) -> list[str]:
        """Give what callbacks said, a line each."""
        path = self.folder / "callbacks"
        return path.read_text().splitlines() if path.exists() else []

    def start(self, name: str, cls: str = "Worker", **options: Any) -> Worker:
        """Start a worker without waiting for it."""
        worker = Worker(self, name, cls, **options)
        self.workers.append(worker)
        self.processes.append(worker)
        return worker

    def worker(self, name: str, cls: str = "Worker", **options: Any) -> Worker:
        """Start a worker and wait until it is there."""
        worker = self.start(name, cls, **options)
        worker.wait_until_ready(options.get("pool", 1))
        return worker

    def json_queue(self, name: str) -> Queue:
        """Give a queue with RQ's JSON serializer."""
        return Queue(name, connection=self.connection, serializer=JSONSerializer)

    def result(self, job: Job, seconds: float = 25.0) -> Any:
        """Wait until a job has a result, and give what it returned."""
        until(lambda: job.get_status() in ("finished", "failed"), seconds)
        assert job.get_status() == "finished", job.exc_info
        return job.return_value(refresh=True)

    def close(self) -> None:
        """End what still runs, without asking."""
        for worker in self.workers:
            for pid in worker.horses():
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(pid).kill()
            worker.stop(signal.SIGKILL)
        self.connection.close()
