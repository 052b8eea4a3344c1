"""A stage for tests: a broker, workers in subprocesses, a store that they share with this process, and what is read back."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from celery import Celery
from valkey import Valkey

from tests.integrations.celery.tasks import INSTRUMENT, SETTINGS, make_app
from tests.integrations.stage import ROOT, ReadStage, WorkerProcess
from tests.patience import PATIENCE

START_SECONDS = 40.0
PING_SECONDS = 0.5
# What a worker does for others of its kind only costs time here: mingling alone waits a second.
ALONE = ("--without-gossip", "--without-mingle", "--without-heartbeat")


class Worker(WorkerProcess):
    """
    A worker in a session of its own.

    Args:
        stage: Whose it is.
        name: Its node name's first part.
        pool: As in `-P`.
        concurrency: As in `-c`.
        arguments: Further ones of the command line.
        environment: Further variables; None removes one.
        command: What runs Celery's command line.
    """

    def __init__(
        self,
        stage: Stage,
        name: str,
        pool: str = "prefork",
        concurrency: int = 2,
        *,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str | None] | None = None,
        command: Sequence[str] = (sys.executable, "-m", "celery"),
        app: str = "tests.integrations.celery.worker_app",
    ) -> None:
        self.name = f"{name}@localhost"
        self.log = stage.folder / f"{name}.log"
        self._stage = stage
        self._command = [
            *command, "-A", app, "worker", "-P", pool, "-c", str(concurrency),
            "-n", self.name, "-l", "INFO", *ALONE, *arguments,
        ]  # fmt: skip
        self._environment = {key: value for key, value in (stage.environment | dict(environment or {})).items() if value is not None}
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def wait_until_ready(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + PATIENCE * START_SECONDS
        while not self._stage.app.control.ping(destination=[self.name], timeout=PING_SECONDS, limit=1):
            assert self.process.poll() is None, f"the worker ended:\n{self.text()[-3000:]}"
            assert time.monotonic() < deadline, f"the worker did not start:\n{self.text()[-3000:]}"

    def children(self) -> list[int]:
        """Give the pids of its pool."""
        with suppress(psutil.NoSuchProcess):
            return [child.pid for child in psutil.Process(self.pid).children()]
        return []

    def kill(self) -> None:
        """Kill the main process with SIGKILL; its children follow."""
        self.process.kill()
        self.process.wait()


class Stage(ReadStage):
    """
    A broker, a store, and the workers between them.

    Args:
        folder: For store, marks and logs.
        settings: Celery's; with `broker_url`.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(folder, "celery")
        self.settings = settings
        self.app: Celery = make_app(settings)
        self.workers: list[Worker] = []

    @property
    def environment(self) -> dict[str, str]:
        """Give the environment of a worker, with the settings that it makes its application of."""
        return super().environment | {SETTINGS: json.dumps(self.settings), INSTRUMENT: "{}"}

    # Workers

    def start(self, name: str, pool: str = "prefork", concurrency: int = 2, **options: Any) -> Worker:
        """Start a worker without waiting for it."""
        worker = Worker(self, name, pool, concurrency, **options)
        self.workers.append(worker)
        self.processes.append(worker)
        return worker

    def worker(self, name: str, pool: str = "prefork", concurrency: int = 2, **options: Any) -> Worker:
        """Start a worker and wait until it answers."""
        worker = self.start(name, pool, concurrency, **options)
        worker.wait_until_ready()
        return worker

    def close(self) -> None:
        """End what still runs, without asking."""
        for worker in self.workers:
            worker.stop(signal.SIGKILL)
        # A result that is collected once the backend is gone would look for it for 20 s, and then complain.
        self.app.backend.remove_pending_result = lambda result: result
        self.app.close()

    # Tasks

    def task(self, name: str) -> Any:
        """Give a task of the application on this side."""
        return self.app.tasks[name]

    def send_raw(self, name: str, body: Any) -> Any:
        """Send a task message with a body that Celery would not make."""
        task_id = str(uuid.uuid4())
        with self.app.connection_for_write() as connection, connection.Producer() as producer:
            headers = {"task": name, "id": task_id, "lang": "py"}
            producer.publish(body, routing_key=self.settings["task_default_queue"], headers=headers, serializer="json")
        return self.app.AsyncResult(task_id)

    def send_untraceable(self, name: str) -> Any:
        """Send a task that Celery accepts and begins, and then can't make a request of: the third part is no mapping."""
        return self.send_raw(name, [[1, 2], {}, [1]])


@dataclass(frozen=True)
class Broker:
    """Where a broker and a result backend are."""

    broker_url: str
    result_backend: str

    @property
    def settings(self) -> dict[str, Any]:
        """Give Celery's settings for them."""
        return {"broker_url": self.broker_url, "result_backend": self.result_backend}


def keys(url: str) -> Any:
    """Give a client for what lies in a Valkey."""
    return Valkey.from_url(url)
