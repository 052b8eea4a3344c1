"""
A queue with at-least-once delivery, workers that are killed at random, and their relays and reconcilers with them.

`python -m tests.acceptance.redelivery` forks workers, hands them jobs, SIGKILLs one of them every now and then, starts
another in its place, and delivers again what the dead one had not acknowledged.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import select
import signal
import sqlite3
import sys
import time
from collections import Counter, deque
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from opentelemetry import trace

import otelexec
from otelexec import cli
from otelexec.decoded import decode
from tests.acceptance.agreement import disagreements
from tests.acceptance.collector import Collected, collecting
from tests.acceptance.killing import answer_of
from tests.acceptance.scenarios import Ledger

PREFETCH: Final = 3
"""Jobs that a worker holds: all of them are delivered again when it dies."""

tracer = trace.get_tracer("app")


@otelexec.execution("job.core", core=True)
def core(number: int) -> None:
    """Succeed, or fail the first time, or for good."""
    run = otelexec.current_execution()
    with tracer.start_as_current_span("step"), tracer.start_as_current_span("query"):
        run.progress("working")
    if number % 7 == 0:
        raise ValueError("no luck")
    if number % 5 == 0:
        with tracer.start_as_current_span("around the child"):
            child()


@otelexec.execution("job.child")
def child() -> None:
    """Be another execution."""
    with tracer.start_as_current_span("deep"):
        pass


@otelexec.execution("job.async")
async def coroutine() -> None:
    """Be a few executions at once."""

    async def step() -> None:
        async with otelexec.execution("job.step"):
            await asyncio.sleep(0)

    await asyncio.gather(step(), step())


def work(job: dict[str, Any], ledger: Ledger) -> None:
    """Do one job, as a task around a core or as a coroutine."""
    number = job["n"]
    with otelexec.extract(job), contextlib.suppress(ValueError):
        if number % 4 == 0:
            asyncio.run(coroutine())
            return
        with otelexec.execution("job.task"):
            ledger.called()
            core(number)


def produce(count: int) -> list[dict[str, Any]]:
    """Publish the jobs and give their payloads."""
    jobs = []
    for number in range(count):
        with otelexec.correlate(source="workflow", workflow_id="w", execution_id=f"job-{number}"), otelexec.publish("job", destination="q"):
            jobs.append(otelexec.inject({"n": number}))
    otelexec.shutdown()
    return jobs


@dataclass(slots=True)
class Worker:
    """
    One worker, as its controller knows it.

    Attributes:
        pid: Its process.
        jobs: Where jobs go in.
        answers: Where the numbers of finished jobs come out.
        held: What it has not acknowledged, by number.
        buffer: An answer that is not complete yet.
    """

    pid: int
    jobs: int
    answers: int
    held: dict[int, dict[str, Any]] = field(default_factory=dict)
    buffer: bytes = b""


class Queue:
    """
    Deliver every job until it is acknowledged.

    Args:
        store: The store of the workers.
        jobs: The payloads.
        kill_seconds: Mean time between two kills; 0 kills nobody.
    """

    def __init__(self, store: Path, jobs: list[dict[str, Any]], kill_seconds: float) -> None:
        self.store = store
        self.waiting = deque(jobs)
        self.kills = self.redelivered = 0
        self.claimed: Counter[str] = Counter()
        self._kill_seconds = kill_seconds
        self._random = random.Random(5)
        self._workers: list[Worker] = []
        self._ledger = store.with_suffix(".ledger")

    def run(self, workers: int) -> None:
        """Deliver until everything is acknowledged; the workers that live then end well."""
        for _ in range(workers):
            self._workers.append(self._start())
        next_kill = time.monotonic() + self._pause()
        while self.waiting or any(worker.held for worker in self._workers):
            for worker in self._workers:
                self._feed(worker)
            readable, _, _ = select.select([worker.answers for worker in self._workers], [], [], max(0.0, next_kill - time.monotonic()))
            for worker in self._workers:
                if worker.answers in readable:
                    self._take_answers(worker)
            if time.monotonic() >= next_kill:
                self._kill(self._random.randrange(workers))
                next_kill = time.monotonic() + self._pause()
        for worker in self._workers:
            os.close(worker.jobs)
        for worker in self._workers:
            _, status = os.waitpid(worker.pid, 0)
            assert status == 0, f"a worker ended with status {status}"

    def _pause(self) -> float:
        return self._random.uniform(0.1, 1.9) * self._kill_seconds if self._kill_seconds else 1e6

    def _start(self) -> Worker:
        jobs_out, jobs_in = os.pipe()
        answers_out, answers_in = os.pipe()
        pid = os.fork()
        if pid == 0:
            for other in self._workers:
                os.close(other.jobs)
                os.close(other.answers)
            os.close(jobs_in)
            self._serve(jobs_out, answers_in)
        os.close(jobs_out)
        os.close(answers_in)
        return Worker(pid, jobs_in, answers_out)

    def _serve(self, jobs: int, answers: int) -> None:
        code = 1
        try:
            ledger = Ledger.at(self._ledger, f"w{os.getpid()}")
            with os.fdopen(jobs, encoding="utf-8") as lines:
                for line in lines:
                    job = json.loads(line)
                    work(job, ledger)
                    os.write(answers, b"%d\n" % job["n"])
            otelexec.shutdown()
            code = 0
        finally:
            os._exit(code)

    def _feed(self, worker: Worker) -> None:
        while self.waiting and len(worker.held) < PREFETCH:
            job = self.waiting.popleft()
            worker.held[job["n"]] = job
            os.write(worker.jobs, json.dumps(job).encode() + b"\n")

    def _take_answers(self, worker: Worker) -> None:
        *numbers, worker.buffer = (worker.buffer + os.read(worker.answers, 65536)).split(b"\n")
        for number in numbers:
            del worker.held[int(number)]

    def _kill(self, index: int) -> None:
        worker = self._workers.pop(index)
        # Stopped first, so that what its relay had in hand when it died can be read before others free it.
        os.kill(worker.pid, signal.SIGSTOP)
        os.waitpid(worker.pid, os.WUNTRACED)
        self.claimed.update(self._claimed_by(worker.pid))
        os.kill(worker.pid, signal.SIGKILL)
        os.waitpid(worker.pid, 0)
        self.kills += 1
        os.close(worker.jobs)
        while select.select([worker.answers], [], [], 0)[0]:
            before = len(worker.held), worker.buffer
            self._take_answers(worker)
            if (len(worker.held), worker.buffer) == before:
                break
        os.close(worker.answers)
        self.redelivered += len(worker.held)
        self.waiting.extendleft(worker.held.values())
        self._workers.append(self._start())

    def _claimed_by(self, pid: int) -> set[str]:
        with closing(sqlite3.connect(self.store)) as connection:
            rows = connection.execute(
                """SELECT request FROM outbox JOIN claim USING (id) JOIN process ON process_id = owner WHERE pid = ?""", (pid,)
            ).fetchall()
        return {span.span_id for (request,) in rows for span in decode(request)}


def _settle(store: Path, jobs: int, queue: Queue, collected: Collected) -> dict[str, Any]:
    for command in (["reconcile", "--once"], ["relay", "--drain"]):
        assert cli.main(command) == 0, command
    delivered = collected.news()
    found = disagreements(store, delivered, store.with_suffix(".ledger"), repeats=queue.claimed)
    with closing(sqlite3.connect(store)) as connection:
        [[executed]] = connection.execute("SELECT COUNT(*) FROM execution WHERE execution_id LIKE 'job-%' AND attempts > 0").fetchall()
        states = dict(connection.execute("SELECT state, COUNT(*) FROM attempt GROUP BY state").fetchall())
        [[executions]] = connection.execute("SELECT COUNT(*) FROM execution").fetchall()
    if executed != jobs:
        found.failures.append(f"{executed} of {jobs} jobs have an attempt")
    return {
        "executions": executions,
        "attempts": found.attempts,
        "states": states,
        "spans": len({span.span_id for span in delivered}),
        "repeated": len(delivered) - len({span.span_id for span in delivered}),
        "failures": found.failures,
    }


def main() -> int:
    """Run the queue and print what was seen as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance.redelivery")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kill-seconds", type=float, default=0.2)
    chosen = parser.parse_args()
    gc.freeze()
    started = time.monotonic()
    store = chosen.folder / "store.db"
    os.environ["OTELEXEC_STORE"] = f"sqlite:///{store}"
    os.environ["OTELEXEC_RELAY"] = os.environ["OTELEXEC_RECONCILE"] = "true"
    os.environ["OTELEXEC_RECONCILE_INTERVAL_SECONDS"] = "0.5"
    with collecting(chosen.folder / "collected") as collected:
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = collected.endpoint
        jobs = answer_of(lambda: produce(chosen.jobs), chosen.folder / "jobs.json")
        queue = Queue(store, jobs, chosen.kill_seconds)
        queue.run(chosen.workers)
        stdout, sys.stdout = sys.stdout, sys.stderr
        seen = _settle(store, chosen.jobs, queue, collected)
    stdout.write(json.dumps(seen | {"kills": queue.kills, "redelivered": queue.redelivered, "claimed": queue.claimed.total(),
                                    "seconds": round(time.monotonic() - started, 1)}) + "\n")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
