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
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol

from opentelemetry import trace

import otelexec
from otelexec import cli
from otelexec.decoded import decode
from tests import stores
from tests.acceptance.agreement import disagreements
from tests.acceptance.collector import Collected, collecting
from tests.acceptance.hosts import Host, Network, running_hosts
from tests.acceptance.killing import answer_of
from tests.acceptance.scenarios import Ledger
from tests.patience import PATIENCE
from tests.stores import Place, Places

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


def long(path: Path, ledger: Ledger) -> None:
    """Run until a file is there, or until somebody cancels it, and say so in another file."""
    run = ledger.called()
    path.with_suffix(".running").touch()
    while not path.exists():
        if run.cancel_requested:
            path.with_suffix(".cancelled").touch()
            raise asyncio.CancelledError
        time.sleep(0.02)


def work(job: dict[str, Any], ledger: Ledger) -> None:
    """Do one job, as a task around a core, as a coroutine, or for as long as a file is missing."""
    number = job["n"]
    with otelexec.extract(job), contextlib.suppress(ValueError, asyncio.CancelledError):
        if "until" in job:
            otelexec.execution("job.long")(long)(Path(job["until"]), ledger)
            return
        if number % 4 == 0:
            asyncio.run(coroutine())
            return
        with otelexec.execution("job.task"):
            ledger.called()
            core(number)


def publish(number: int) -> dict[str, Any]:
    """Publish a job and give its payload."""
    with otelexec.correlate(source="workflow", workflow_id="w", execution_id=f"job-{number}"), otelexec.publish("job", destination="q"):
        return otelexec.inject({"n": number})


def produce(count: int) -> list[dict[str, Any]]:
    """Publish the jobs and give their payloads; threads share commits."""
    with ThreadPoolExecutor(16) as threads:
        jobs = list(threads.map(publish, range(count)))
    otelexec.shutdown()
    return jobs


def serve(jobs: int, answers: int, ledger: Path, host: str) -> NoReturn:
    """Be a worker: do every job that comes out of one pipe, and answer in the other."""
    code = 1
    try:
        mine = Ledger.at(ledger, f"{host}.w{os.getpid()}")
        with os.fdopen(jobs, encoding="utf-8") as lines:
            for line in lines:
                job = json.loads(line)
                work(job, mine)
                os.write(answers, b"%d\n" % job["n"])
        otelexec.shutdown()
        code = 0
    finally:
        os._exit(code)


class Machine(Protocol):
    """Where workers run."""

    name: str

    def start(self, jobs: int, answers: int, ledger: Path) -> int:
        """Start a worker and give its pid there."""
        ...

    def stop(self, pid: int) -> None:
        """Stop a worker where it is."""
        ...

    def end(self, pid: int) -> None:
        """Kill a stopped worker."""
        ...

    def wait(self, pid: int) -> int:
        """Wait for a worker's end and give its status."""
        ...


class Here:
    """This machine."""

    name = socket.gethostname()

    def start(self, jobs: int, answers: int, ledger: Path) -> int:
        """Start a worker and give its pid."""
        pid = os.fork()
        if pid == 0:
            # Pipes of other workers are not for it: they must end with their own processes.
            for descriptor in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
                if descriptor > 2 and descriptor not in (jobs, answers):
                    with contextlib.suppress(OSError):
                        os.close(descriptor)
            serve(jobs, answers, ledger, self.name)
        return pid

    def stop(self, pid: int) -> None:
        """Stop a worker where it is."""
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)

    def end(self, pid: int) -> None:
        """Kill a stopped worker."""
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def wait(self, pid: int) -> int:
        """Wait for a worker's end and give its status."""
        return os.waitpid(pid, 0)[1]


@contextlib.contextmanager
def crew(count: int, folder: Path) -> Iterator[None]:
    """Run so many relays and so many reconcilers, each a command of its own, until the block ends; they then end well."""
    with ExitStack() as stack:
        log = stack.enter_context((folder / "crew.log").open("ab"))
        processes = [
            subprocess.Popen([sys.executable, "-m", "otelexec", command], stdout=log, stderr=log)
            for command in ("relay", "reconcile")
            for _ in range(count)
        ]
        for process in processes:
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
        yield
        assert [process.poll() for process in processes] == [None] * len(processes), (folder / "crew.log").read_text()[-3000:]


@dataclass(slots=True)
class Worker:
    """
    One worker, as its controller knows it.

    Attributes:
        machine: Where it runs.
        pid: Its process there.
        jobs: Where jobs go in.
        answers: Where the numbers of finished jobs come out.
        held: What it has not acknowledged, by number.
        buffer: An answer that is not complete yet.
    """

    machine: Machine
    pid: int
    jobs: int
    answers: int
    held: dict[int, dict[str, Any]] = field(default_factory=dict)
    buffer: bytes = b""


class Queue:
    """
    Deliver every job until it is acknowledged.

    Args:
        place: The store of the workers.
        jobs: The payloads.
        kill_seconds: Mean time between two kills; 0 kills nobody.
        least_kills: On a machine that is done before so many, those that are missing are spread over the jobs.
        machines: Where workers run.
    """

    def __init__(
        self, place: Place, jobs: list[dict[str, Any]], kill_seconds: float, least_kills: int, machines: Sequence[Machine]
    ) -> None:
        self.place = place
        self.waiting = deque(jobs)
        self.kills = self.redelivered = 0
        self.claimed: Counter[str] = Counter()
        self._machines = machines
        self._kill_seconds = kill_seconds
        self._jobs_a_kill = len(jobs) / (least_kills + 1)
        self._least_kills = least_kills
        self._done = 0
        self._random = random.Random(5)
        self._workers: list[Worker] = []

    def run(self, workers: int) -> None:
        """Deliver until everything is acknowledged; the workers that live then end well."""
        for number in range(workers):
            self._workers.append(self._start(self._machines[number % len(self._machines)]))
        next_kill = time.monotonic() + self._pause()
        while self.waiting or any(worker.held for worker in self._workers):
            for worker in self._workers:
                self._feed(worker)
            readable, _, _ = select.select([worker.answers for worker in self._workers], [], [], max(0.0, next_kill - time.monotonic()))
            for worker in self._workers:
                if worker.answers in readable:
                    assert self._take_answers(worker), "a worker ended by itself"
            overdue = self.kills < self._least_kills and self._done >= (self.kills + 1) * self._jobs_a_kill
            if time.monotonic() >= next_kill or overdue:
                self._kill(self._random.randrange(workers))
                next_kill = time.monotonic() + self._pause()
        for worker in self._workers:
            os.close(worker.jobs)
        for worker in self._workers:
            status = worker.machine.wait(worker.pid)
            assert status == 0, f"a worker ended with status {status}"

    def _pause(self) -> float:
        return self._random.uniform(0.1, 1.9) * self._kill_seconds if self._kill_seconds else 1e6

    def _start(self, machine: Machine) -> Worker:
        jobs_out, jobs_in = os.pipe()
        answers_out, answers_in = os.pipe()
        pid = machine.start(jobs_out, answers_in, self.place.ledger)
        os.close(jobs_out)
        os.close(answers_in)
        return Worker(machine, pid, jobs_in, answers_out)

    def _feed(self, worker: Worker) -> None:
        while self.waiting and len(worker.held) < PREFETCH:
            job = self.waiting.popleft()
            worker.held[job["n"]] = job
            os.write(worker.jobs, json.dumps(job).encode() + b"\n")

    def _take_answers(self, worker: Worker) -> bool:
        """Take what a worker has answered; False when it never will again."""
        data = os.read(worker.answers, 65536)
        *numbers, worker.buffer = (worker.buffer + data).split(b"\n")
        for number in numbers:
            del worker.held[int(number)]
        self._done += len(numbers)
        return bool(data)

    def _kill(self, index: int) -> None:
        worker = self._workers.pop(index)
        # Stopped first, so that what its relay had in hand when it died can be read before others free it.
        worker.machine.stop(worker.pid)
        self.claimed.update(self._claimed_by(worker))
        worker.machine.end(worker.pid)
        self.kills += 1
        os.close(worker.jobs)
        while self._take_answers(worker):
            pass
        os.close(worker.answers)
        self.redelivered += len(worker.held)
        self.waiting.extendleft(worker.held.values())
        self._workers.append(self._start(self._random.choice(self._machines)))

    def _claimed_by(self, worker: Worker) -> set[str]:
        rows = patient_rows(
            self.place.url,
            f"""SELECT request FROM outbox JOIN claim USING (id) JOIN process ON process_id = owner
                WHERE pid = {worker.pid} AND host = '{worker.machine.name}'""",
        )
        return {span.span_id for (request,) in rows for span in decode(request)}


def patient_rows(url: str, statement: str) -> list[tuple[Any, ...]]:
    """Give the rows of a query, also of a server that is just being killed and started again."""
    deadline = time.monotonic() + PATIENCE * 30
    while True:
        try:
            return stores.rows(url, statement)
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


SETTLE_SECONDS: Final = 60.0


def _reconcile(place: Place, hosts: Sequence[Host]) -> None:
    """Take in every host's spool and close what the dead left, whose leases may have to lapse first."""
    commands = [host.command for host in hosts] or [lambda *arguments: cli.main(list(arguments))]
    deadline = time.monotonic() + PATIENCE * SETTLE_SECONDS
    while True:
        # A server that was killed at the very end may be on its way up.
        done = [command("reconcile", "--once") == 0 for command in commands]
        [[left]] = patient_rows(
            place.url, "SELECT (SELECT COUNT(*) FROM attempt WHERE state = 'running') + (SELECT COUNT(*) FROM open_span)"
        )
        if all(done) and (not left or not stores.is_postgres(place.url)):
            return
        assert time.monotonic() < deadline, f"{left} attempts and spans are open, {done}"
        time.sleep(0.2)


def _settle(place: Place, jobs: int, queue: Queue, collected: Collected, hosts: Sequence[Host], *, crashes: bool) -> dict[str, Any]:
    _reconcile(place, hosts)
    assert cli.main(["relay", "--drain"]) == 0
    delivered = collected.news()
    again = Counter(span.span_id for span in delivered)
    # The server forgets a deletion that was not fsynced when it crashes, so every span may come again then.
    found = disagreements(place, delivered, repeats=again if crashes else queue.claimed)
    [[executed]] = stores.rows(place.url, "SELECT COUNT(*) FROM execution WHERE execution_id LIKE 'job-%' AND attempts > 0")
    states = dict(stores.rows(place.url, "SELECT state, COUNT(*) FROM attempt GROUP BY state"))
    [[executions]] = stores.rows(place.url, "SELECT COUNT(*) FROM execution")
    [[machines]] = stores.rows(place.url, "SELECT COUNT(DISTINCT host) FROM process WHERE process_id IN (SELECT process_id FROM attempt)")
    if executed != jobs:
        found.failures.append(f"{executed} of {jobs} jobs have an attempt")
    return {
        "executions": executions,
        "attempts": found.attempts,
        "states": states,
        "machines": machines,
        "spans": len(again),
        "repeated": len(delivered) - len(again),
        "failures": found.failures,
    }


def main() -> int:
    """Run the queue and print what was seen as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance.redelivery")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kill-seconds", type=float, default=0.2)
    parser.add_argument("--least-kills", type=int, default=0)
    parser.add_argument("--store", help="a PostgreSQL store's URL, which may lead through a proxy; without it, a SQLite file")
    parser.add_argument("--direct", help="the same store without the proxy, for what only looks")
    parser.add_argument("--hosts", default="", help="host names and how far their clocks are ahead: a=300,b=-300; needs --address")
    parser.add_argument("--network", default="", help="the bridge that hosts join, and this machine's address there: otb1@10.9.8.1")
    parser.add_argument(
        "--crew", type=int, default=0, help="relays and reconcilers in processes of their own, so many of each, not in the workers"
    )
    parser.add_argument("--crashes", action="store_true", help="the server is killed meanwhile: spans may come twice")
    parser.add_argument("--started", type=Path, help="a file that is there while the workers run")
    chosen = parser.parse_args()
    gc.freeze()
    started = time.monotonic()
    place = Places(chosen.folder).new("store")
    if chosen.store:
        place = replace(place, url=chosen.store)
    place.use()
    looked_at = replace(place, url=chosen.direct or place.url)
    os.environ["OTELEXEC_RELAY"] = os.environ["OTELEXEC_RECONCILE"] = "false" if chosen.crew else "true"
    os.environ["OTELEXEC_RECONCILE_INTERVAL_SECONDS"] = "0.5"
    if stores.is_postgres(place.url):
        os.environ["OTELEXEC_LEASE_SECONDS"] = "3"
    bridge, _, address = chosen.network.partition("@")
    with ExitStack() as stack:
        collected = stack.enter_context(collecting(chosen.folder / "collected", address or "127.0.0.1"))
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = collected.endpoint
        jobs = answer_of(lambda: produce(chosen.jobs), chosen.folder / "jobs.json", seconds=300)
        clocks = {name: float(offset) for name, _, offset in (each.partition("=") for each in chosen.hosts.split(",") if each)}
        hosts = stack.enter_context(running_hosts(Network(bridge, address), chosen.folder, clocks, {})) if clocks else []
        queue = Queue(looked_at, jobs, chosen.kill_seconds, chosen.least_kills, hosts or [Here()])
        if chosen.started:
            chosen.started.touch()
        with crew(chosen.crew, chosen.folder):
            queue.run(chosen.workers)
        if chosen.started:
            chosen.started.unlink()
        looked_at.use()
        stdout, sys.stdout = sys.stdout, sys.stderr
        seen = _settle(looked_at, chosen.jobs, queue, collected, hosts, crashes=chosen.crashes)
    stdout.write(json.dumps(seen | {"kills": queue.kills, "redelivered": queue.redelivered, "claimed": queue.claimed.total(),
                                    "seconds": round(time.monotonic() - started, 1)}) + "\n")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
