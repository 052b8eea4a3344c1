"""The demo's processes: started, spoken to over HTTP, killed, and ended."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from otelexec.cli.demo.own_queue import Queue
from otelexec.cli.demo.stories import QUEUE

WORKERS = 3
START_SECONDS = 20.0
STOP_SECONDS = 10.0
REQUEST_SECONDS = 10.0
SHOWN_LOG_CHARS = 2_000

# What would take the spans away before they can be shown, or never make any.
_CLEARED = ("OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG", "OTEL_SDK_DISABLED")
_SET = {
    # The demo reconciles and delivers itself, after it has shown what there is.
    "OTELEXEC_RELAY": "false",
    "OTELEXEC_RECONCILE": "false",
    # Sooner than usual: the demo has only seconds.
    "OTELEXEC_PROGRESS_SECONDS": "0.1",
    "OTELEXEC_CANCEL_POLL_SECONDS": "0.2",
}


def missing(needed: Mapping[str, str]) -> str | None:
    """
    Give what to type for what a demo needs and is not installed; None when all of it is.

    Args:
        needed: Each import that it needs, and what to install for it.
    """
    names = dict.fromkeys(package for name, package in needed.items() if importlib.util.find_spec(name) is None)
    return f"pip install {' '.join(names)}" if names else None


class CrewError(Exception):
    """One of the demo's processes does not do its part."""


class Crew:
    """
    A web process, with the schedule in it, and workers.

    Args:
        folder: Where queue and logs go.
        store: Their store.
        run: Names this run of the demo.

    Attributes:
        module: What its processes run.
        needed: Each import that the demo needs, and what to install for it.
    """

    module = "otelexec.cli.demo.process"
    needed: ClassVar[Mapping[str, str]] = {}

    def __init__(self, folder: Path, store: str, run: str) -> None:
        self.folder = folder
        self.queue = Queue(folder / QUEUE)
        self.port = 0
        self.run = run
        self._environment = {name: value for name, value in os.environ.items() if name not in _CLEARED} | _SET | {"OTELEXEC_STORE": store}
        self._web: subprocess.Popen[bytes] | None = None
        self._workers: dict[int, subprocess.Popen[bytes]] = {}

    def start(self) -> str:
        """
        Start all of them; the web process takes requests when this returns.

        Returns:
            What there is, for whoever watches.

        Raises:
            CrewError: One of them does not start.
        """
        self._web = self._start("web", answers=True)
        for _ in range(WORKERS):
            self.start_worker()
        self.port = int(self._answer(self._web))
        return f"A web process listens on http://127.0.0.1:{self.port}; a queue and {WORKERS} worker processes stand behind it."

    def start_worker(self) -> int:
        """Start one more worker; gives its pid."""
        worker = self._start("worker")
        self._workers[worker.pid] = worker
        return worker.pid

    def _start(self, role: str, *, answers: bool = False) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C is the demo's, which then ends its processes by closing their input.
        with (self.folder / f"{role}.log").open("ab") as log:
            return subprocess.Popen(  # noqa: S603 (a fixed command)
                [sys.executable, "-m", self.module, role, str(self.folder), self.run],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if answers else log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )

    def _answer(self, process: subprocess.Popen[bytes]) -> str:
        """Wait for the one line with which a process says where it can be reached."""
        answer = process.stdout
        if answer is None or not select.select([answer], [], [], START_SECONDS)[0] or not (line := answer.readline()):
            raise CrewError(f"one of the demo's processes did not start:\n{self.log_tail()}")
        return line.decode().strip()

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None, **headers: str) -> tuple[int, dict[str, Any]]:
        """Send a real HTTP request to the web process; gives status and answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_SECONDS)
        try:
            connection.request(method, path, json.dumps(body or {}), {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise CrewError(f"{method} {path}: {error}\n{self.log_tail()}") from error
        finally:
            connection.close()

    def kill(self, pid: int) -> bool:
        """Kill a worker with SIGKILL; gives whether it is one of ours and runs."""
        worker = self._workers.get(pid)
        if worker is None or worker.poll() is not None:
            return False
        worker.send_signal(signal.SIGKILL)
        return True

    def dead_workers(self) -> Iterator[tuple[int, int]]:
        """Take the workers that have ended out of the crew: pid and return code, which is minus the signal's number."""
        for pid, worker in list(self._workers.items()):
            if (code := worker.poll()) is not None:
                del self._workers[pid]
                _close(worker)
                yield pid, code

    def end_schedule(self) -> None:
        """Ask for no more by schedule; the web process has stopped by itself."""

    def stop(self) -> None:
        """Let every process finish what it has in hand and end; one that doesn't is killed."""
        self._end(*self._workers.values(), *([self._web] if self._web is not None else []))
        self._workers.clear()
        self._web = None

    @staticmethod
    def _end(*processes: subprocess.Popen[bytes]) -> None:
        for process in processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in processes:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _close(process)

    def log_tail(self) -> str:
        """Give the end of what the processes logged."""
        logs = "".join(log.read_text(errors="replace") for log in sorted(self.folder.glob("*.log")))
        return logs[-SHOWN_LOG_CHARS:]


def _close(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
