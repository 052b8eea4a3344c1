"""Deaths that are not a SIGKILL between two lines, and what other processes do in the meantime."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from otelexec.reconcile import Reconciler
from otelexec.store.records import ExecutionRecord
from otelexec.store.spool import Spool
from tests.acceptance.agreement import disagreements, drained, settle
from tests.servers import ROOT
from tests.stores import DroppedStore, beside

PRELUDE = """
import os, signal, sys, time
import otelexec
from opentelemetry import trace
tracer = trace.get_tracer("app")
"""


def start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PRELUDE + code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def records(path: Path) -> dict[str, ExecutionRecord]:
    return {record.name: record for record in DroppedStore(path, create=False).executions()}


def settled(path: Path) -> dict[str, ExecutionRecord]:
    """Reconcile and drain; every record, span and parent must agree."""
    assert not disagreements(beside(path), settle(beside(path), drain_first=False)).failures
    return records(path)


@pytest.mark.parametrize("death", ["os._exit(0)", "os._exit(3)", "os.kill(os.getpid(), signal.SIGTERM)", "os.abort()"])
def test_an_execution_whose_process_ends_without_a_word_is_lost_and_those_before_it_are_not(tmp_path: Path, death: str) -> None:
    with start(f"""
with otelexec.execution("before"), tracer.start_as_current_span("step"):
    pass
with otelexec.execution("during"), tracer.start_as_current_span("open"), otelexec.execution("child"):
    {death}
""") as process:
        process.communicate(timeout=60)
    found = settled(tmp_path / "store.db")
    assert {name: record.state for name, record in found.items()} == {"before": "succeeded", "during": "lost", "child": "lost"}


def test_spans_open_around_a_fork_are_there_although_the_parent_is_killed(tmp_path: Path) -> None:
    """The child's execution has the parent's open span as its parent, whose id left the process with the fork."""
    with start("""
with otelexec.execution("parent"), tracer.start_as_current_span("outer step"), tracer.start_as_current_span("inner step"):
    pid = os.fork()
    if pid == 0:
        with otelexec.execution("child"):
            pass
        otelexec.shutdown()
        os._exit(0)
    os.waitpid(pid, 0)
    os.kill(os.getpid(), signal.SIGKILL)
""") as process:
        process.communicate(timeout=60)
    found = settled(tmp_path / "store.db")
    assert {name: record.state for name, record in found.items()} == {"parent": "lost", "child": "succeeded"}


def test_a_child_that_leaves_the_body_it_was_forked_in_neither_closes_nor_spoils_the_parents_execution(tmp_path: Path) -> None:
    """The child goes back through the parent's code and exits as Python programs do, while the parent goes on writing."""
    with start("""
with otelexec.execution("parent") as run, tracer.start_as_current_span("step"):
    pids = [0]
    for number in range(5):
        pids.append(os.fork())
        if pids[-1] == 0:
            break
        with otelexec.execution("busy"):
            pass
    if 0 not in pids[1:]:
        for pid in pids[1:]:
            os.waitpid(pid, 0)
        run.set_output("by the parent")
with otelexec.execution("after"):
    pass
""") as process:
        process.communicate(timeout=60)
        assert process.returncode == 0
    path = tmp_path / "store.db"
    found = settled(path)
    assert {name: record.state for name, record in found.items()} == {"parent": "succeeded", "busy": "succeeded", "after": "succeeded"}
    assert found["parent"].attempts[0].output == '"by the parent"'
    assert len(list(DroppedStore(path).executions())) == 1 + 5 + 6


def test_a_child_that_is_forked_while_the_spool_is_locked_does_not_keep_its_lock(tmp_path: Path) -> None:
    with start(f"""
import fcntl
from pathlib import Path
from otelexec.store.spool import Spool
spool = Spool(Path({str(tmp_path)!r}), lambda: None)
with spool.locked():
    pid = os.fork()  # as another thread might
    if pid == 0:
        time.sleep(60)
try:
    fcntl.flock(os.open(spool.folder / ".lock", os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
finally:
    os.kill(pid, signal.SIGKILL)
""") as process:
        process.communicate(timeout=60)
        assert process.returncode == 0


def test_what_a_process_spooled_just_before_its_death_counts_although_the_spool_was_read_before(tmp_path: Path) -> None:
    """It ends its execution in the spool, tells its caller, and is killed, all after the reconciler has read the spool."""
    path = tmp_path / "store.db"
    with start("""
otelexec.configure(open_timeout_seconds=0.05, finalize_timeout_seconds=0.05)
with otelexec.execution("job"):
    print("running", flush=True)
    sys.stdin.readline()
print("returned", flush=True)
time.sleep(60)
""") as process:
        to, answers = pipes(process)
        assert answers.readline() == "running\n"

        class ReadTooEarly(Spool):
            """Lets the worker end, and kills it, right after the spool was read for the first time."""

            def ingest(self, *args: object, **kwargs: object) -> int:
                taken = super().ingest(*args, **kwargs)  # type: ignore[arg-type]
                if process.poll() is None:
                    other = sqlite3.connect(path, isolation_level=None)
                    other.execute("BEGIN IMMEDIATE")
                    print(file=to, flush=True)
                    assert answers.readline() == "returned\n"
                    process.kill()
                    process.wait()
                    other.close()
                return taken

        store = DroppedStore(path)
        Reconciler(store, ReadTooEarly(store.spool_folder, lambda: None)).run_once()  # type: ignore[arg-type, return-value]
    [attempt] = records(path)["job"].attempts
    assert (attempt.state, attempt.finalized_by) == ("succeeded", "spool")
    assert not disagreements(beside(path), drained(store)).failures
    store.close()
