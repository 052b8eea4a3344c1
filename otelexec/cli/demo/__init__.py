"""
`otelexec demo`: webhooks and a schedule come in, workers run them, one is killed, and every record has its span.

Around it stand `stories.py` (what should come of it), `jobs.py` (what a user writes; `work.py` is what the jobs of all
demos do), `process.py` (the web process and the workers), `own_queue.py` (the queue between them), `crew.py` (starts and
ends the processes), `result.py` and `view.py` (the end, and the table in it) and `postgres.py` (a server of the demo's
own). With `--backend celery`, `rq` or `trigger` the jobs, the processes and the crew are those of `celery_*.py`, `rq_*.py`
or `trigger_*.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn

import otelexec
from otelexec import runtime as _runtime
from otelexec import settings as _settings
from otelexec.cli import options
from otelexec.cli.console import STYLES, lines, plural
from otelexec.cli.demo import postgres, result
from otelexec.cli.demo.celery_crew import CeleryCrew
from otelexec.cli.demo.crew import Crew, CrewError, missing
from otelexec.cli.demo.rq_crew import RqCrew
from otelexec.cli.demo.stories import (
    CELERY_STORIES,
    RQ_STORIES,
    SCHEDULE,
    SCHEDULE_TIMES,
    SCHEDULED,
    SEGMENTS,
    STORIES,
    TRIGGER_STORIES,
    Story,
    unexpected,
)
from otelexec.cli.demo.trigger_crew import TriggerCrew
from otelexec.reconcile import Death, Reconciler
from otelexec.store.base import Store
from otelexec.store.records import AttemptRecord, ExecutionRecord
from otelexec.store.rows import ENDED_STATES, PAUSED, RUNNING

PATIENCE_SECONDS = 25.0
POLL_SECONDS = 0.05
PIPE_WIDTH = 130
KILL_AT_SEGMENT = 2


class Backend(StrEnum):
    """What stands between the web process and the workers."""

    OWN = "own"
    CELERY = "celery"
    RQ = "rq"
    TRIGGER = "trigger"


def demo(
    *,
    backend: Annotated[
        Backend,
        typer.Option(
            help="What runs the work: a small queue of the demo's own, Celery or RQ with a Valkey that the demo brings, "
            "or the local engine behind Trigger.dev's contract."
        ),
    ] = Backend.OWN,
) -> None:
    """
    See it all in seconds: webhooks, a schedule, a queue, workers, one of them killed, and every record with its span.

    No service is needed. The records go to OTELEXEC_STORE if it is set, else to a new store of the demo's own; with
    OTELEXEC_STORE=postgres, to an embedded PostgreSQL that runs as long as the demo.
    """
    install = missing(_CREWS[backend][0].needed)
    if install is not None:
        raise options.Failure(f"this demo needs more than is installed: {install}", code=2)
    with contextlib.ExitStack() as around:
        url = os.environ.get("OTELEXEC_STORE")
        if url == "postgres":
            url = around.enter_context(postgres.running())
            around.callback(postgres.wait_for_the_reader)
        _perform(url, backend)


_CREWS: Mapping[Backend, tuple[type[Crew], Sequence[Story]]] = {
    Backend.OWN: (Crew, STORIES),
    Backend.CELERY: (CeleryCrew, CELERY_STORIES),
    Backend.RQ: (RqCrew, RQ_STORIES),
    Backend.TRIGGER: (TriggerCrew, TRIGGER_STORIES),
}


def _perform(url: str | None, backend: Backend) -> None:
    # A pipe or a file has no width of its own; COLUMNS sets another one.
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit() else PIPE_WIDTH
    console = Console(width=width, highlight=False, emoji=False)
    logging.getLogger("otelexec.reconcile").setLevel(logging.ERROR)  # the demo tells it in its own words
    runtime, store = _configure(url)
    console.print("Webhooks and a schedule ask for work, worker processes do it, and one of them is killed in the middle of it.")
    console.print("Every execution must end with a record and a span that say the same.\n")
    console.print(f"The store of this demo: [bold]{escape(store.url.removeprefix('sqlite:///'))}[/]", soft_wrap=True)
    others = store.statistics().processes > 0  # killed ones count too, since they never said goodbye
    with tempfile.TemporaryDirectory(prefix="otelexec-demo-") as folder:
        make_crew, stories = _CREWS[backend]
        stage = Stage(console, runtime, store, make_crew(Path(folder), runtime.settings.store, uuid.uuid4().hex[:8]), stories)
        try:
            stage.perform()
        except KeyboardInterrupt:
            console.print("Stopped. `otelexec reconcile --once` closes what is left open.")
            raise
        except CrewError as error:
            console.print(f"[bold red]The demo could not run:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(1) from None
        finally:
            stage.crew.stop()
        records = stage.records()
        wrong = [*unexpected(records, stage.stories), *result.show(console, runtime, records, complete=not others)]
        logged = stage.crew.log_tail()
    if wrong and logged:
        wrong.append(f"The processes logged: {logged}")
    result.farewell(console, runtime, store, records, wrong)
    otelexec.shutdown()
    if wrong:
        raise typer.Exit(1)


def _configure(url: str | None) -> tuple[_runtime.Runtime, Store]:
    """Give the runtime of this process and its store; None: a new one of the demo's own."""
    if url == "none":
        raise otelexec.SettingsError("OTELEXEC_STORE: the demo shows records and `none` keeps none; unset it for a store of the demo's own")
    _settings.load(store=url)  # a wrong setting should not leave an empty store behind
    # Nothing leaves before it was shown, and what a killed worker leaves open is closed before everybody's eyes.
    otelexec.configure(store=url or f"sqlite:///{fresh_store()}", service_name="demo", relay=False, reconcile=False)
    runtime = _runtime.get()
    if runtime.store is None:
        raise AssertionError("only `none` has no store")
    return runtime, runtime.store


def fresh_store() -> Path:
    """Make an empty file for a store in the user's state folder, named by the first number that is free."""
    folder = _settings.state_home()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for number in itertools.count(1):
        path = folder / f"demo-{number}.db"
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        except FileExistsError:
            continue
        return path
    raise AssertionError


class Stage:
    """
    One run of the demo.

    Args:
        console: Where it is told.
        runtime: This process's runtime.
        store: The store.
        crew: The other processes.
        stories: What is asked for.
    """

    def __init__(self, console: Console, runtime: _runtime.Runtime, store: Store, crew: Crew, stories: Sequence[Story]) -> None:
        self._console = console
        self._runtime = runtime
        self._store = store
        self._told: set[tuple[str, int]] = set()
        self._done: set[str] = set()
        self._killed_unix_ns = 0
        self.stories = stories
        self.crew = crew
        newest = next(iter(store.executions(limit=1)), None)
        self._before = 0 if newest is None else newest.seq

    def records(self) -> list[ExecutionRecord]:
        """Give the executions of this run, the oldest first."""
        newer = itertools.takewhile(lambda record: record.seq > self._before, self._store.executions())
        return [record for record in newer if self._asked_for(json.loads(record.correlation))][::-1]

    def _asked_for(self, fields: Mapping[str, Any]) -> bool:
        # Nobody can tell Celery's beat or RQ's cron the name of this run.
        return fields.get("demo_run") == self.crew.run or fields.get("schedule_id") == SCHEDULE

    def perform(self) -> None:
        """Send everything, and do what has to be done until all of it has ended, or patience has."""
        self._say(self.crew.start())
        columns = (SpinnerColumn(), TextColumn("executions closed"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as progress:
            task = progress.add_task("", total=len(self.stories))
            lines.console = progress.console
            try:
                self._send_webhooks()
                self._attend(progress, task)
            finally:
                lines.console = None

    def _send_webhooks(self) -> None:
        for number, story in enumerate(self.stories, start=1):
            if story.provider is not None:
                path = f"/hooks/{story.provider}/{story.job}"
                status, _ = self.crew.request("POST", path, story.payload, x_webhook_id=f"wh_{number}")
                self._say(f"  POST {path:<30} [bold]{status}[/] {'queued' if status == 202 else 'turned away: rate limited'}")  # noqa: PLR2004 (HTTP)

    def _attend(self, progress: Progress, task: TaskID) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            records = self.records()
            for record in records:
                self._tell(record)
                if record.attempts:
                    self._act(record, record.attempts[-1])
            self._look_after_workers()
            # By the number of attempts too: a lost one is an end, until the message comes once more.
            ended = Counter((record.name, len(record.attempts)) for record in records if record.state in ENDED_STATES)
            if ended[SCHEDULED, 1] >= SCHEDULE_TIMES:
                self.crew.end_schedule()
            closed = (ended & Counter((story.job, len(story.attempts)) for story in self.stories)).total()
            progress.update(task, completed=closed)
            if closed >= len(self.stories):
                return
            time.sleep(POLL_SECONDS)

    def _tell(self, record: ExecutionRecord) -> None:
        for attempt in record.attempts:
            key = (record.execution_id, attempt.attempt)
            if attempt.ended_unix_ns is not None and key not in self._told and attempt.state != "rejected":
                self._told.add(key)
                child = record.parent_execution_id is not None
                colour = STYLES[attempt.state]
                number = f" attempt {attempt.attempt}" if attempt.attempt > 1 or attempt.state in ("lost", PAUSED) else ""
                if not child:
                    self._say(f"  {record.name:<16} [{colour}]{attempt.state}[/]{number}")

    def _act(self, record: ExecutionRecord, attempt: AttemptRecord) -> None:
        """Do from outside what a story needs: kill, approve, cancel; each once."""
        if record.name in self._done or record.parent_execution_id is not None:
            return
        done = json.loads(attempt.progress).get("done", 0) if attempt.progress else 0
        if record.name == "video.encode" and attempt.state == RUNNING and done >= KILL_AT_SEGMENT and attempt.pid is not None:
            self._done.add(record.name)
            self._killed_unix_ns = time.time_ns()
            if self.crew.kill(attempt.pid):
                middle = f"after segment {done} of {SEGMENTS}"
                self._say(f"  [bold]SIGKILL[/] to worker {attempt.pid}, in the middle of video.encode ({middle})")
        elif record.name == "contract.sign" and attempt.state == PAUSED:
            self._done.add(record.name)
            status, _ = self.crew.request("POST", f"/approvals/{record.execution_id}")
            self._say(f"  POST /approvals/…                    [bold]{status}[/] contract.sign may go on")
        elif record.name == "export.build" and attempt.state == RUNNING and done > 0:
            self._done.add(record.name)
            status, _ = self.crew.request("DELETE", f"/executions/{record.execution_id}")
            self._say(f"  DELETE /executions/…                 [bold]{status}[/] export.build is to stop")

    def _look_after_workers(self) -> None:
        """Close what a dead worker left open, deliver its message once more, and start another one in its place."""
        for pid, code in self.crew.dead_workers():
            death = Death(self._killed_unix_ns or time.time_ns(), signal=-code if code < 0 else None, exit_code=code if code >= 0 else None)
            reconciler = Reconciler(self._store, self._runtime.journal.spool, own=self._runtime.process_id)
            closed = reconciler.run_once({pid: death})
            given_back = self.crew.queue.give_back(pid)
            self.crew.start_worker()
            self._say(
                f"  worker {pid} is dead: closed for it {plural(closed.attempts, 'attempt')} as lost and "
                f"{plural(closed.outers + closed.spans, 'other span')}; {plural(given_back, 'message')} delivered once more"
            )

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)
