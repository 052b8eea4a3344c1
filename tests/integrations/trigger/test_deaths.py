"""Workers and servers that are killed, stopped or told to end: every run has one terminal record and one span for each attempt."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
import time
from contextlib import closing, suppress
from typing import Any

import httpx
import pytest
from otelexec_trigger import LocalBackend

from otelexec.store.rows import ENDED_STATES
from tests.integrations.trigger.conftest import Fresh
from tests.integrations.trigger.stage import KEY, Stage
from tests.patience import PATIENCE
from tests.records import until


def ended(run_id: str, seconds: float = 40) -> Any:
    backend = LocalBackend()
    until(lambda: backend.get(run_id).has_ended, seconds)
    return backend.get(run_id)


def test_a_killed_worker_is_replaced_by_another_one_at_once(fresh: Fresh) -> None:
    stage = fresh()
    first = stage.worker(1)
    mark = stage.mark()
    run_id = LocalBackend().trigger("sleep", {"mark": mark, "seconds": 4})
    stage.wait_for_run(mark)
    stage.worker(1)
    children = first.children()
    first.kill()
    begun = time.monotonic()
    stage.wait_for_run(mark, 2, 15)
    assert time.monotonic() - begun < 10
    until(lambda: not any(_lives(pid) for pid in children), 10)
    run = ended(run_id)
    assert (run.state, run.output, run.attempts) == ("succeeded", "slept", 2)
    seen = stage.ended(run_id, "lost", "succeeded")
    assert seen.attempts[0].classification == "killed"
    stage.check_agreement()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_task_that_kills_its_process_is_attempted_again_and_the_signal_is_named(fresh: Fresh) -> None:
    stage = fresh()
    worker = stage.worker(1)
    run_id = LocalBackend().trigger("die", stage.mark())
    assert ended(run_id).output == "alive"
    seen = stage.ended(run_id, "lost", "succeeded")
    assert "SIGKILL" in (seen.attempts[0].error_message or "")
    second = seen.attempts[1]
    assert second.started_unix_ns - (seen.attempts[0].ended_unix_ns or 0) < 6e9
    assert worker.stop() == 0


def test_a_task_that_exits_fails_and_its_process_goes_on(fresh: Fresh) -> None:
    stage = fresh()
    worker = stage.worker(1)
    backend = LocalBackend()
    pids = [ended(backend.trigger("pid")).output]
    run = ended(backend.trigger("exits", 78))
    assert (run.state, run.attempts) == ("failed", 1)
    assert run.error["name"] == "SystemExit"
    pids.append(ended(backend.trigger("pid")).output)
    assert len(set(pids)) == 1
    assert worker.process.poll() is None


@pytest.mark.parametrize("code", [0, 3, 78])
def test_a_task_that_leaves_without_a_word_has_crashed_once_its_attempts_are_used_up(fresh: Fresh, code: int) -> None:
    stage = fresh()
    stage.worker(1)
    run_id = LocalBackend().trigger("leave", code, max_attempts=2)
    run = ended(run_id)
    assert (run.state, (run.raw or {})["status"], run.attempts) == ("failed", "CRASHED", 2)
    assert stage.ended(run_id, "lost", "lost").record.state == "lost"
    stage.check_agreement()


def test_a_worker_that_hangs_loses_its_lease_and_its_run_has_one_outcome(fresh: Fresh) -> None:
    """It is stopped, not dead: nobody closes its attempt but itself, and another worker makes the next one."""
    stage = fresh(OTELEXEC_LEASE_SECONDS="2", OTELEXEC_HEARTBEAT_SECONDS="0.3")
    first = stage.worker(1)
    mark = stage.mark()
    run_id = LocalBackend().trigger("sleep", {"mark": mark, "seconds": 3})
    stage.wait_for_run(mark)
    stopped = [first.pid, *first.children()]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        second = stage.worker(1)
        stage.wait_for_run(mark, 2, 30)
        run = ended(run_id)
        assert (run.state, run.output, run.attempts) == ("succeeded", "slept", 2)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    seen = stage.ended(run_id, "succeeded", "succeeded")
    assert seen.record.state == "succeeded"
    assert [first.stop(), second.stop()] == [0, 0]
    stage.check_agreement()


def test_limits_and_cancellations_that_are_not_heeded_are_enforced(fresh: Fresh) -> None:
    stage = fresh()
    _, url = stage.serve()
    worker = stage.worker(2)
    late, stubborn = stage.mark(), stage.mark()
    limited = httpx.post(
        f"{url}/api/v1/tasks/sleep/trigger",
        json={"payload": {"mark": late, "seconds": 60}, "options": {"maxDuration": 1}},
        headers={"authorization": f"Bearer {KEY}"},
    ).json()["id"]
    run = ended(limited)
    assert (run.state, (run.raw or {})["status"]) == ("timed_out", "TIMED_OUT")
    assert stage.ended(limited, "timed_out").record.state == "timed_out"
    backend = LocalBackend()
    cancelled = backend.trigger("sleep", {"mark": stubborn, "seconds": 60})
    stage.wait_for_run(stubborn)
    assert backend.cancel(cancelled)
    assert ended(cancelled).state == "cancelled"
    seen = stage.ended(cancelled, "cancelled")
    assert seen.record.state == "cancelled"
    assert stage.runs(stubborn) == 1
    assert worker.stop() == 0


def test_a_coroutine_is_stopped_at_once(fresh: Fresh) -> None:
    stage = fresh()
    worker = stage.worker(1)
    mark = stage.mark()
    backend = LocalBackend()
    run_id = backend.trigger("nap", {"mark": mark, "seconds": 60})
    pid = stage.wait_for_run(mark)
    assert backend.cancel(run_id)
    assert ended(run_id, 10).state == "cancelled"
    assert ended(backend.trigger("pid")).output == pid, "the process goes on with other runs"
    assert worker.stop() == 0


def test_what_a_coroutine_leaves_behind_does_not_keep_its_process_from_other_runs(fresh: Fresh) -> None:
    stage = fresh()
    worker = stage.worker(1)
    mark = stage.mark()
    backend = LocalBackend()
    run_id = backend.trigger("lingers", {"mark": mark, "seconds": 600})
    pid = stage.wait_for_run(mark)
    assert backend.cancel(run_id)
    assert ended(run_id, 10).state == "cancelled"
    assert ended(backend.trigger("pid")).output != pid
    stage.ended(run_id, "cancelled")
    assert f"{run_id} of lingers has ended; what was left running is ended with its process" in worker.text()
    assert worker.stop() == 0
    stage.check_agreement()


def test_a_thread_that_a_task_leaves_does_not_keep_an_idle_worker_from_its_end(fresh: Fresh) -> None:
    stage = fresh()
    worker = stage.worker(1)
    assert ended(LocalBackend().trigger("leaves a thread", 600)).state == "succeeded"
    begun = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - begun < 20
    assert "otelexec.trigger.child" not in worker.text(), "nothing had to be killed"


def test_a_worker_that_is_told_to_end_lets_its_run_end(fresh: Fresh) -> None:
    stage = fresh()
    worker = stage.worker(1)
    mark = stage.mark()
    backend = LocalBackend()
    run_id = backend.trigger("sleep", {"mark": mark, "seconds": 2})
    stage.wait_for_run(mark)
    waiting = backend.trigger("echo", 1)
    assert worker.stop() == 0
    assert (backend.get(run_id).state, backend.get(waiting).state) == ("succeeded", "pending")
    worker.check_log()


def test_a_worker_whose_application_is_broken_ends_and_says_why(fresh: Fresh) -> None:
    stage = fresh()
    worker = stage.start_worker(2, app="tests.integrations.no_such_application")
    assert worker.process.wait(40) == 2
    assert "No module named 'tests.integrations.no_such_application'" in worker.text()
    assert "can't be used as an application" in worker.text()


def test_a_worker_that_still_imports_its_application_ends_at_once(fresh: Fresh) -> None:
    stage = fresh()
    (stage.folder / "app_that_takes_its_time.py").write_text(
        "import os, pathlib, time\npathlib.Path(os.environ['MARK']).write_text(str(os.getpid()))\ntime.sleep(600)\n"
    )
    mark = stage.mark()
    path = os.pathsep.join((stage.environment["PYTHONPATH"], str(stage.folder)))
    worker = stage.start_worker(1, app="app_that_takes_its_time", PYTHONPATH=path, MARK=mark)
    stage.wait_for_run(mark)
    begun = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - begun < 10
    assert "ended with" not in worker.text()


def test_a_store_that_can_not_be_opened_is_told_once(fresh: Fresh) -> None:
    stage = fresh()
    store = f"sqlite:///{stage.folder / 'missing' / 'runs.db'}"
    (stage.folder / "missing").write_text("a file, and no folder")
    worker = stage.worker(1, OTELEXEC_STORE=store)
    server, url = stage.serve(OTELEXEC_STORE=store)
    until(lambda: "runs.db" in worker.text() and "runs.db" in server.text(), 20)
    assert httpx.get(f"{url}/api/v1/runs", headers={"authorization": f"Bearer {KEY}"}, timeout=20).status_code == 503
    assert [worker.stop(), server.stop()] == [0, 0]
    assert len([line for line in worker.text().splitlines() if "otelexec.trigger.sweep" in line]) == 1


def test_a_server_that_is_killed_after_it_accepted_gives_the_same_run_to_the_same_call(fresh: Fresh) -> None:
    stage = fresh()
    server, url = stage.serve()
    port = int(url.rsplit(":", 1)[1])
    headers = {"authorization": f"Bearer {KEY}", "x-trigger-request-idempotency-key": "call-1"}
    call = {"payload": {"a": 1}, "options": {}}
    first = httpx.post(f"{url}/api/v1/tasks/echo/trigger", json=call, headers=headers).json()
    server.kill()
    stage.serve(port)
    again = httpx.post(f"{url}/api/v1/tasks/echo/trigger", json=call, headers=headers).json()
    assert again == first
    assert again["isCached"] is False
    other = httpx.post(f"{url}/api/v1/tasks/echo/trigger", json=call, headers=headers | {"x-trigger-request-idempotency-key": "2"}).json()
    assert other["id"] != first["id"]
    stage.worker(1)
    assert ended(first["id"]).output == {"a": 1}


def test_a_server_that_is_killed_between_its_commit_and_its_answer_has_one_run(fresh: Fresh) -> None:
    """The kill follows the commit as soon as that can be seen; where the answer was faster, the repetition gets it again."""
    stage = fresh()
    server, url = stage.serve()
    port = int(url.rsplit(":", 1)[1])
    LocalBackend().trigger("echo", 1)
    for number in range(2, 7):
        headers = {"authorization": f"Bearer {KEY}", "x-trigger-request-idempotency-key": f"call-{number}"}
        answers: list[str] = []

        def call(headers: dict[str, str] = headers, answers: list[str] = answers) -> None:
            with suppress(httpx.HTTPError):
                answer = httpx.post(f"{url}/api/v1/tasks/echo/trigger", json={"payload": 1}, headers=headers, timeout=20)
                answers.append(answer.json()["id"])

        with closing(sqlite3.connect(stage.path)) as connection:
            thread = threading.Thread(target=call)
            thread.start()
            deadline = time.monotonic() + PATIENCE * 20
            while connection.execute("SELECT COUNT(*) FROM run").fetchone()[0] < number and time.monotonic() < deadline:
                pass  # any pause would let the answer out
            server.kill()
            thread.join(30)
            server, _ = stage.serve(port)
            call()
            assert len(set(answers)) == 1
            assert connection.execute("SELECT COUNT(*) FROM run").fetchone()[0] == number


def test_runs_with_workers_killed_at_random_are_all_accounted_for(fresh: Fresh) -> None:
    stage = fresh()
    backend = LocalBackend()
    runs = [backend.trigger("who", {"n": number}, max_attempts=100) for number in range(60)]
    workers = [stage.worker(2) for _ in range(2)]
    for _ in range(4):
        time.sleep(0.4)
        for worker in list(workers):
            children = worker.children()
            if children:
                os.kill(children[0], signal.SIGKILL)
        workers[0].kill()
        workers = [workers[1], stage.worker(2)]
    assert {ended(run).state for run in runs} == {"succeeded"}
    until(lambda: all(record.state in ENDED_STATES for record in stage.records()), 20)
    assert len(stage.records()) == len(runs)
    for worker in workers:
        assert worker.stop() == 0
    stage.reconcile()
    stage.check_agreement()


def test_an_idle_worker_and_server_end_soon(fresh: Fresh) -> None:
    stage: Stage = fresh()
    server, _ = stage.serve()
    worker = stage.worker(2)
    begun = time.monotonic()
    assert [worker.stop(), server.stop()] == [0, 0]
    assert time.monotonic() - begun < 10
