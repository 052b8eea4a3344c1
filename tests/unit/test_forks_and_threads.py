"""Forks, processes and threads: an execution belongs to the pid that opened it, and no context leaks."""

from __future__ import annotations

import asyncio
import contextvars
import multiprocessing
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace

import otelexec
from otelexec import runtime
from otelexec.store.sqlite import SqliteStore
from tests.forks import in_child
from tests.records import Records, until

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def test_in_a_forked_child_the_parent_s_handle_does_nothing_and_says_so_once(records: Records, tmp_path: Path) -> None:
    import logging

    said = tmp_path / "said"

    def child() -> None:
        handler = logging.FileHandler(said)
        logging.getLogger("otelexec").addHandler(handler)
        for _ in range(3):
            run.progress("child's")
            run.pause("child's")
            run.set_output("child's")
        assert not run._execution.is_open

    with otelexec.execution("job") as run:
        run.progress("parent's")
        assert in_child(child) == 0
    attempt = records.attempt()
    assert (attempt.state, attempt.output) == ("succeeded", None)
    assert "parent's" in str(attempt.progress)
    lines = said.read_text().splitlines()
    assert sorted(line.split("otelexec.execution.inherited: ")[1].split("(")[0] for line in lines) == ["pause", "progress", "set_output"]


def test_a_child_that_is_forked_while_another_thread_makes_the_first_runtime() -> None:
    """In an interpreter of its own: nothing may have made one before."""
    script = """
import faulthandler, os, threading
import otelexec
from otelexec import settings
begun, go, load = threading.Event(), threading.Event(), settings.load
def slow(**given):
    begun.set()
    go.wait(20)
    return load(**given)
settings.load = slow
thread = threading.Thread(target=otelexec.execution("parent")(lambda: None))
thread.start()
begun.wait(20)
pid = os.fork()
if pid == 0:
    faulthandler.dump_traceback_later(15, exit=True)
    settings.load = load
    otelexec.execution("child")(lambda: None)()
    os._exit(0)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
go.set()
thread.join()
raise SystemExit(code)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_child_that_runs_out_of_the_block_closes_nothing(records: Records, tmp_path: Path) -> None:
    """The child of a fork in the body returns through the same `with`: the parent's attempt stays the parent's."""
    pids = tmp_path / "pids"

    @otelexec.execution("job")
    def run() -> int:
        return os.fork()

    parent = os.getpid()
    pid = run()
    if os.getpid() != parent:
        os._exit(0 if pid == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not pids.exists()
    assert records.attempt().state == "succeeded"
    assert [span.name for span in records.spans()] == ["job"]


def test_a_child_s_own_executions_are_children_of_the_one_it_was_forked_in(records: Records) -> None:
    def child() -> None:
        with otelexec.execution("in the child", core=True), trace.get_tracer("app").start_as_current_span("query"):
            pass

    with otelexec.execution("job") as run:
        assert in_child(child) == 0
        assert run._execution.is_open
    found = records.named("in the child")
    assert (found.parent_execution_id, found.state) == (run.id, "succeeded")
    assert found.execution_id != run.id
    (attempt,) = found.attempts
    assert attempt.pid not in (os.getpid(), None)
    assert records.span(attempt.span_id).parent_span_id == records.named("job").attempts[0].span_id
    assert records.span_named("query").parent_span_id == attempt.span_id


def test_spans_of_a_tracer_from_before_the_fork_have_the_resource_of_the_child(records: Records) -> None:
    """A worker's modules get their tracers when they are imported, which is in its parent."""
    otelexec.configure(service_name="billing")
    tracer = trace.get_tracer("theirs")

    def child() -> None:
        with tracer.start_as_current_span("before any execution"):
            pass
        with otelexec.execution("job"), tracer.start_as_current_span("query"):
            pass

    assert in_child(child) == 0
    resources = [records.span_named(name).resource for name in ("before any execution", "job", "query")]
    assert resources[0]["process.pid"] == records.named("job").attempts[0].pid
    assert resources[0]["service.name"] == "billing"
    assert all(resource == resources[0] for resource in resources)


def test_a_child_has_a_resource_of_its_own_and_starts_no_thread_to_detect_it(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment=blue")
    otelexec.configure(service_name="billing")
    with otelexec.execution("parent"):
        pass

    def child() -> None:
        started: list[threading.Thread] = []
        monkeypatch.setattr(threading.Thread, "start", started.append)
        provider = runtime.get().provider
        assert provider.resource.attributes["process.pid"] == os.getpid()
        monkeypatch.undo()
        assert started == []
        with otelexec.execution("child"):
            pass

    assert in_child(child) == 0
    parent, child_s = (records.span_named(name).resource for name in ("parent", "child"))
    assert parent.keys() == child_s.keys()
    differing = {key for key, value in parent.items() if child_s[key] != value}
    assert differing == {"process.pid", "service.instance.id"}
    assert (child_s["service.name"], child_s["deployment"]) == ("billing", "blue")


def test_a_child_that_leaves_does_not_fold_the_store_s_file_up(records: Records) -> None:
    """Each of RQ's horses would pay two fsyncs for it, in place of the one that its record takes."""

    def child() -> None:
        with otelexec.execution("job"):
            pass
        otelexec.shutdown(leaves=True)

    otelexec.configure()
    assert in_child(child) == 0
    assert records.path.with_name(records.path.name + "-wal").stat().st_size > 0
    assert records.one().state == "succeeded"


@pytest.mark.parametrize("sends", [False, True])
def test_a_child_that_leaves_says_goodbye_only_if_there_is_more_to_write(
    records: Records, monkeypatch: pytest.MonkeyPatch, sends: bool
) -> None:
    commits: list[object] = []
    inner = SqliteStore.commit

    def counted(self: SqliteStore, *args: Any, **kwargs: Any) -> list[object]:
        commits.append(self)
        return inner(self, *args, **kwargs)

    def child() -> None:
        with otelexec.execution("job"):
            pass
        assert len(commits) == 2
        if sends:
            with otelexec.publish("later"):
                pass
            commits.clear()
        otelexec.shutdown(leaves=True)
        assert len(commits) == 2

    otelexec.configure()
    monkeypatch.setattr(SqliteStore, "commit", counted)
    assert in_child(child) == 0
    spans = {span.name for span in records.spans()}
    assert spans == ({"job", "send"} if sends else {"job"})
    assert records.query("SELECT ended FROM process") == [(int(sends),)]


def test_a_child_s_spans_and_ids_never_repeat_the_parent_s(records: Records) -> None:
    """Must-hold row 7: forks and `random.seed(0)` make no id twice."""

    def work() -> None:
        random.seed(0)
        for _ in range(20):
            with otelexec.execution("job"):
                random.seed(0)
                with trace.get_tracer("app").start_as_current_span("child"):
                    pass

    work()
    for _ in range(3):
        assert in_child(work) == 0
    spans = records.spans()
    assert len(spans) == 160
    assert len({span.span_id for span in spans}) == 160
    assert len({record.execution_id for record in records.all()}) == 80
    assert len({span.trace_id for span in spans}) == 80


_FORK_AMID_AN_IMPORT = """
import os, signal, sys, threading, time
import otelexec

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "otelexec.relay":
            reached.set()
            time.sleep(0.5)

reached = threading.Event()
sys.meta_path.insert(0, Slow())
otelexec.configure(store=sys.argv[1], relay=True)
with otelexec.execution("parent"):
    pass
assert reached.wait(30)
pid = os.fork()
if pid == 0:
    signal.alarm(10)
    import otelexec.relay
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_fork_waits_for_what_a_background_thread_imports(tmp_path: Path) -> None:
    """The child has the import lock of a thread that it has not, and would wait for it for ever."""
    command = [sys.executable, "-c", _FORK_AMID_AN_IMPORT, f"sqlite:///{tmp_path}/fork.db"]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


def test_a_span_that_is_open_at_a_fork_is_in_the_store_before_it(records: Records, caplog: pytest.LogCaptureFixture) -> None:
    def child() -> None:
        assert records.query("SELECT COUNT(*) FROM open_span") == [(1,)]

    with otelexec.execution("job"), trace.get_tracer("app").start_as_current_span("around the fork"):
        assert in_child(child) == 0
    assert [record.message for record in caplog.records if record.levelname != "INFO"] == []


def test_a_scope_s_id_is_not_handed_out_twice_over_a_fork(records: Records) -> None:
    with otelexec.correlate(source="x", execution_id="e"):
        assert in_child(otelexec.execution("job")(lambda: None)) == 0
        otelexec.execution("job")(lambda: None)()
    first, second = records.all()
    assert (first.execution_id == "e", second.execution_id == "e") == (False, True)
    assert first.request_id == second.request_id


def test_the_work_of_a_child_that_ends_by_os_exit_is_recorded(records: Records) -> None:
    """What the stock SDK loses: everything, when RQ's work horse ends."""

    def child() -> None:
        for _ in range(5):
            otelexec.execution("job")(lambda: None)()

    otelexec.execution("before")(lambda: None)()
    assert in_child(child) == 0
    assert [record.state for record in records.all()] == ["succeeded"] * 6
    assert len(records.spans()) == 6


def test_forking_while_other_threads_commit_hangs_nobody(records: Records) -> None:
    """The child starts with new locks, whoever held the old ones."""
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            otelexec.execution("busy")(lambda: None)()

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            assert in_child(otelexec.execution("child")(lambda: None)) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    runtime.get().journal.recover()  # a child that did not get its turn in time has its record in the spool
    children = [record for record in records.all() if record.name == "child"]
    assert [record.state for record in children] == ["succeeded"] * 10


def square(number: int) -> tuple[int, str | None]:
    with otelexec.execution("square") as run:
        return number * number, run.id


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing_workers_record_for_themselves(records: Records, method: str) -> None:
    otelexec.execution("parent")(lambda: None)()
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = pool.map(square, range(10))
        pool.close()
        pool.join()
    assert [value for value, _ in results] == [number * number for number in range(10)]
    squares = [record for record in records.all() if record.name == "square"]
    assert {record.execution_id for record in squares} == {own for _, own in results}
    assert len(squares) == 10
    assert {record.state for record in squares} == {"succeeded"}


def send(number: int) -> int:
    with otelexec.publish("sent", destination="queue"):
        pass
    with trace.get_tracer("mine").start_as_current_span("mine"):
        return number


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_what_a_multiprocessing_worker_has_in_memory_is_written_when_it_ends(records: Records, method: str) -> None:
    """A forked one leaves without exit handlers."""
    otelexec.execution("parent")(lambda: None)()
    context: Any = multiprocessing.get_context(method)
    single = context.Process(target=send, args=(0,))
    single.start()
    single.join()
    with context.Pool(1) as pool:
        assert pool.map(send, range(2)) == [0, 1]
        pool.close()
        pool.join()
    assert sorted((span.name, span.status) for span in records.spans()) == sorted(
        [("parent", "unset"), *3 * [("send queue", "unset"), ("mine", "unset")]]
    )


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_multiprocessing_worker_has_the_settings_of_its_parent(records: Records, tmp_path: Path, method: str) -> None:
    """A forked one inherits them; the default from Python 3.14 on starts afresh. One that configures itself has its own."""
    (tmp_path / "work.py").write_text("""
import multiprocessing
import sys
import otelexec

@otelexec.execution("job")
def job():
    return otelexec.runtime.settings().max_error_chars

def configured():
    otelexec.configure(store=sys.argv[2], max_error_chars=88)
    return job()

def nested():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(job)

def run(function, queue):
    queue.put(function())

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    otelexec.configure(store=sys.argv[2], signing_key="secret", max_error_chars=77)
    found = []
    for function in (job, configured, nested):
        queue = context.SimpleQueue()
        process = context.Process(target=run, args=(function, queue))
        process.start()
        found.append(queue.get())
        process.join()
        assert process.exitcode == 0
    print(*found)
""")
    command = [sys.executable, str(tmp_path / "work.py"), method, f"sqlite:///{records.path}"]
    environment = os.environ | {"OTELEXEC_STORE": f"sqlite:///{tmp_path / 'environment.db'}"}
    done = subprocess.run(command, env=environment, check=False, timeout=100, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "77 88 77\n"), done.stderr
    assert [(record.name, record.state) for record in records.all()] == 3 * [("job", "succeeded")]
    assert not (tmp_path / "environment.db").exists()


def test_threads_of_ours_have_no_context_of_whoever_needed_them_first(records: Records) -> None:
    """From Python 3.14 on threads can inherit it, and do so without a GIL: what they log or query would be of that request for ever."""
    code = """
import asyncio
import threading
from opentelemetry import context
import otelexec
from otelexec.heartbeat import HeartbeatThread
from otelexec.store.group_commit import GroupCommit

found, both = {}, threading.Event()

def watched(inner):
    def serve(self):
        found[threading.current_thread().name] = dict(context.get_current())
        if len(found) == 2:
            both.set()
        inner(self)
    return serve

HeartbeatThread._serve, GroupCommit._serve = watched(HeartbeatThread._serve), watched(GroupCommit._serve)

@otelexec.execution("job")
async def job():
    pass

with otelexec.correlate(source="web"):
    asyncio.run(job())
assert both.wait(60)
assert found == {"otelexec-heartbeat": {}, "otelexec-committer": {}}, found
"""
    command = [sys.executable, "-X", "thread_inherit_context=1", "-c", code]
    done = subprocess.run(command, check=False, timeout=100, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


async def test_a_thousand_tasks_leak_no_context_into_the_next_job(records: Records) -> None:
    """Must-hold row 7."""

    @otelexec.execution("job")
    async def run(number: int) -> str | None:
        own = otelexec.current_execution().id
        await asyncio.sleep(random.random() / 100)
        if number % 10 == 0:
            raise ValueError(number)
        assert otelexec.current_execution().id == own
        return own

    async def job(number: int) -> None:
        with otelexec.extract({"executionId": f"e{number}", "requestId": f"r{number}"}):
            try:
                assert await run(number) == f"e{number}"
            except ValueError:
                assert number % 10 == 0
        assert not otelexec.current_execution()

    await asyncio.gather(*(job(number) for number in range(1000)))
    assert otel_context.get_current() == {}
    found = {record.execution_id: record for record in records.all()}
    assert set(found) == {f"e{number}" for number in range(1000)}
    assert all(record.request_id == "r" + record.execution_id[1:] for record in found.values())
    assert sum(record.state == "failed" for record in found.values()) == 100
    assert runtime.get().executions == {}


def test_what_a_program_left_open_that_is_replaced_by_another_one_is_lost(records: Records, tmp_path: Path) -> None:
    """Pid and start time stay over an exec, which some reloaders do."""
    code = """
import os
import sys
import threading
import time
import otelexec

otelexec.configure(reconcile=True)
if sys.argv[1:] == ["again"]:
    with otelexec.execution("after"):
        sys.stdin.read()
else:
    inside = threading.Event()

    @otelexec.execution("before")
    def work():
        inside.set()
        time.sleep(60)

    threading.Thread(target=work, daemon=True).start()
    inside.wait()
    otelexec.configure(reconcile=True, service_name="again")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], "again"])
"""
    environ = os.environ | {"PYTHONPATH": str(Path(otelexec.__file__).parent.parent)}
    with subprocess.Popen([sys.executable, "-c", code], env=environ, cwd=tmp_path, stdin=subprocess.PIPE) as program:
        until(lambda: [record for record in records.all() if (record.name, record.state) == ("before", "lost")], 30)
        assert records.named("after").state == "running"
        program.communicate()
    assert records.named("after").state == "succeeded"


def test_a_thread_that_outlives_the_main_thread_may_run_the_first_execution(records: Records, tmp_path: Path) -> None:
    """What starts after the main thread's end can use no thread pool, and the SDK looks for its resource in one."""
    code = """
import threading
import otelexec

def work():
    threading.main_thread().join()
    with otelexec.execution("late"):
        print("worked", flush=True)

threading.Thread(target=work).start()
"""
    environ = os.environ | {"OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=late", "OTEL_SERVICE_NAME": "outliving"}
    root = str(Path(otelexec.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environ | {"PYTHONPATH": root},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (done.stdout, "Traceback" in done.stderr) == ("worked\n", False), done.stderr
    assert records.named("late").state == "succeeded"
    resource = records.span_named("late").resource
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("outliving", "late")
    assert {"host.name", "telemetry.sdk.version"} <= resource.keys()


def test_32_threads_leak_no_context_into_the_next_job(records: Records) -> None:
    """Must-hold row 7: each thread does many jobs, one after the other, as a pool's threads do."""

    @otelexec.execution("job")
    def run(number: int) -> str | None:
        with trace.get_tracer("app").start_as_current_span(f"s{number}"):
            return otelexec.current_execution().id

    def job(number: int) -> None:
        assert not otelexec.current_execution()
        assert otel_context.get_current() == {}
        with otelexec.extract({"executionId": f"e{number}"}):
            assert run(number) == f"e{number}"

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(job, range(640)))
    assert {record.execution_id for record in records.all()} == {f"e{number}" for number in range(640)}
    spans = {span.name: span for span in records.spans() if span.name != "job"}
    assert all(span.parent_span_id is not None for span in spans.values())
    assert len(spans) == 640


def test_a_thread_that_is_given_the_context_works_for_the_execution(records: Records) -> None:
    seen: list[str | None] = []

    def work() -> None:
        current = otelexec.current_execution()
        seen.append(current.id)
        current.progress("from the thread")

    with otelexec.execution("job") as run:
        for target in (work, lambda: contextvars.copy_context().run(work)):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join(10)
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(work,))
        thread.start()
        thread.join(10)
    assert seen == [None, None, run.id]
    assert "from the thread" in str(records.attempt().progress)
