"""What the stages of all backends have: worker processes, tasks that count their runs, and what is read back of a store."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otelexec import semconv
from otelexec.decoded import DecodedSpan
from otelexec.store.records import AttemptRecord, ExecutionRecord
from otelexec.store.rows import ENDED_STATES
from otelexec.store.sqlite import SqliteStore
from tests.acceptance.agreement import reconciler
from tests.records import AMENDMENTS, ERRORS, Records, until

ROOT = Path(__file__).resolve().parents[2]
STOP_SECONDS = 45.0
"""Celery's warm shutdown takes 30 s and more where it hits a task that a child has only just been given."""
PATIENCE_SECONDS = 25.0
DEAD_SECONDS = 2.0
"""How long something may still appear after the last worker has ended."""

# Not these: a task's own traceback is in the log too.
TROUBLE = re.compile(
    r"Failed to detach context|otelexec\.execution\.inherited|otelexec\.store|CRITICAL.*otelexec|Signal handler|otelexec\.\w+\.failed"
)
"""What must not stand in a worker's log."""
OTHERS = "opentelemetry.instrumentation"
"""The scope of spans that the contrib instrumentations make with our provider."""


class WorkerProcess:
    """
    A worker in a session of its own.

    Attributes:
        name: Its name.
        log: The file that it logs to.
        process: The main process.
    """

    name: str
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        """Give the main process's pid."""
        return self.process.pid

    def text(self) -> str:
        """Give what it logged."""
        return self.log.read_text(errors="replace")

    def stop(self, number: int = signal.SIGTERM, seconds: float = STOP_SECONDS) -> int:
        """Ask it to end, wait until it has, and give its exit code; what is left of its session is killed."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(seconds)
            if code:
                print(self.text()[-4000:])  # noqa: T201 (with a failure, pytest shows it)
            return code
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()

    def check_log(self, *allowed: str) -> None:
        """Check that nothing in its log speaks of trouble of ours."""
        lines = [line for line in self.text().splitlines() if TROUBLE.search(line)]
        assert not [line for line in lines if not any(word in line for word in allowed)]


@dataclass(frozen=True)
class Seen:
    """What there is of one task: its record, and every span that names its id."""

    record: ExecutionRecord
    producers: Sequence[DecodedSpan]
    consumers: Sequence[DecodedSpan]

    @property
    def attempts(self) -> tuple[AttemptRecord, ...]:
        """Give the attempts in their order."""
        return self.record.attempts

    @property
    def attempt(self) -> AttemptRecord:
        """Give the only attempt."""
        (attempt,) = self.record.attempts
        return attempt

    def consumer(self, number: int = 1) -> DecodedSpan:
        """Give the CONSUMER span of an attempt."""
        wanted = {self.attempts[number - 1].span_id, self.attempts[number - 1].outer_span_id}
        (span,) = [span for span in self.consumers if span.span_id in wanted]
        return span

    @property
    def states(self) -> list[str]:
        """Give how the attempts ended."""
        return [attempt.state for attempt in self.attempts]


class ReadStage:
    """
    A folder with a store, and the workers that write to it.

    Args:
        folder: For store, marks and logs.
        name: Of the store's file.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.path = folder / f"{name}.db"
        self.cache: dict[str, Any] = {}
        self.processes: list[WorkerProcess] = []
        self._marks = 0

    @property
    def environment(self) -> dict[str, str]:
        """Give the environment of a worker: none of the machine's settings, everything by this stage's."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "OTELEXEC_"))}
        return kept | {
            "OTELEXEC_STORE": f"sqlite:///{self.path}",
            "OTELEXEC_RELAY": "false",
            "OTELEXEC_RECONCILE": "false",
            "OTELEXEC_CANCEL_POLL_SECONDS": "0.2",
            "OTEL_SERVICE_NAME": "worker",
            "HOME": str(self.folder),
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "integrations"))),
        }

    def mark(self) -> str:
        """Give a file of its own for a task that counts its runs."""
        self._marks += 1
        return str(self.folder / f"mark-{self._marks}")

    @staticmethod
    def runs(mark: str) -> int:
        """Give how many runs a task has counted."""
        return len(Path(mark).read_text().splitlines()) if Path(mark).exists() else 0

    def wait_for_run(self, mark: str, number: int = 1, seconds: float = PATIENCE_SECONDS) -> int:
        """Wait until a task has begun its n-th run, and give the pid in which it did."""
        until(lambda: self.runs(mark) >= number, seconds)
        return int(Path(mark).read_text().splitlines()[number - 1])

    # What is read back

    def spans(self) -> list[DecodedSpan]:
        """Give every span in the outbox."""
        return Records(self.path).spans()

    def records(self) -> list[ExecutionRecord]:
        """Give every record, the oldest first."""
        return Records(self.path).all()

    def record(self, execution_id: str) -> ExecutionRecord | None:
        """Give a record; None when there is none."""
        store = SqliteStore(self.path, create=False)
        try:
            return store.execution(execution_id)
        finally:
            store.close()

    def look(self, task_id: str) -> Seen | None:
        """Give what there is of a task; None when no span names it yet, or its record is not there."""
        spans = [
            span
            # Not in the order of the outbox: the end of a PRODUCER span goes with whatever is committed next.
            for span in sorted(self.spans(), key=lambda span: span.start_unix_ns)
            if span.attributes.get(semconv.MESSAGING_MESSAGE_ID) == task_id and not span.scope.startswith(OTHERS)
        ]
        ids = {span.attributes[semconv.EXECUTION_ID] for span in spans}
        if not ids:
            return None
        assert len(ids) == 1, f"task {task_id} became the executions {ids}"
        record = self.record(ids.pop())
        if record is None:
            return None
        return Seen(
            record,
            [span for span in spans if span.kind == "producer"],
            [span for span in spans if span.kind == "consumer"],
        )

    def ended(self, task_id: str, *states: str, seconds: float = PATIENCE_SECONDS) -> Seen:
        """
        Wait until a task's execution has ended, and give what there is of it.

        Args:
            task_id: Celery's id.
            states: How its attempts must have ended; empty takes any.
            seconds: How long to wait.
        """
        execution_id = ""
        seen: Seen | None = None
        died: float | None = None

        def settled() -> bool:
            nonlocal died
            if has_settled():
                return True
            if died is None and self.processes and all(worker.process.poll() is not None for worker in self.processes):
                died = time.monotonic()
            assert died is None or time.monotonic() - died < DEAD_SECONDS
            return False

        def has_settled() -> bool:
            nonlocal execution_id
            if not execution_id:
                first = self.look(task_id)
                execution_id = "" if first is None else first.record.execution_id
                if not execution_id:
                    return False
            record = self.record(execution_id)
            return record is not None and self._is_complete(record, states)

        try:
            until(settled, seconds)
        except AssertionError:
            seen = self.look(task_id)
            told = "nothing" if seen is None else f"{seen.record.state} {[(a.state, a.classification) for a in seen.attempts]}"
            logs = "\n".join(f"{worker.name}:\n{worker.text()[-1500:]}" for worker in self.processes)
            msg = f"task {task_id} did not end in {seconds:g} s: there is {told}\n{logs}"
            raise AssertionError(msg) from None
        seen = self.look(task_id)
        assert seen is not None
        self.check(seen)
        if states:
            assert seen.states == list(states), f"{seen.states} instead of {list(states)}: {seen.attempts}"
        return seen

    def _is_complete(self, record: ExecutionRecord, states: Sequence[str]) -> bool:
        if any(attempt.ended_unix_ns is None for attempt in record.attempts):
            return False
        # What is around a core is closed by a commit of its own.
        if any(attempt.outer_span_id is not None and attempt.outer_outcome is None for attempt in record.attempts):
            return False
        if not (len(record.attempts) >= len(states) if states else record.state in ENDED_STATES):
            return False
        # The end of a PRODUCER span goes with a later commit of its process.
        return record.producer_span_id is None or any(span.span_id == record.producer_span_id for span in self.spans())

    def check(self, seen: Seen) -> None:
        """Check that every attempt has one CONSUMER span, and that record and spans say the same."""
        by_id = {span.span_id: span for span in self.spans()}
        for attempt in seen.attempts:
            if attempt.span_id is None:
                continue
            span = by_id[attempt.span_id]
            assert span.attributes[semconv.OUTCOME] == attempt.state
            assert span.attributes[semconv.EXECUTION_ID] == seen.record.execution_id
            assert (span.start_unix_ns, span.end_unix_ns) == (attempt.started_unix_ns, attempt.ended_unix_ns)
            assert span.status == ("error" if attempt.state in ERRORS else "unset")
            if attempt.classification not in AMENDMENTS:
                assert span.attributes.get(semconv.CLASSIFICATION) == attempt.classification
        told = {span.span_id for span in seen.consumers}
        assert len(told) == len(seen.consumers), "a CONSUMER span is there twice"
        assert len(told) == len(seen.attempts), f"{len(told)} CONSUMER spans for {len(seen.attempts)} attempts"
        assert told <= {key for attempt in seen.attempts for key in (attempt.span_id, attempt.outer_span_id)}

    def reconcile(self) -> None:
        """Close what dead workers left open, as `otelexec reconcile --once` does."""
        store = SqliteStore(self.path)
        reconciler(store, store.spool_folder).run_once()
        store.close()

    def command(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run an `otelexec` command on the stage's store."""
        return subprocess.run(
            [sys.executable, "-m", "otelexec", *arguments],
            env=self.environment | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    def check_agreement(self) -> None:
        """Check every record and every span of the stage, which must be at rest."""
        records = Records(self.path)
        records.check_agreement()
        records.close()


def each_open(stage: ReadStage) -> Iterator[str]:
    """Give the executions that have an open attempt."""
    return (record.execution_id for record in stage.records() if any(attempt.ended_unix_ns is None for attempt in record.attempts))
