"""The local engine on PostgreSQL: two workers of two processes each, one of them killed, and a server between caller and store."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

import httpx
import pytest
from otelexec_trigger import LocalBackend, TriggerDevBackend
from otelexec_trigger.settings import CANCEL_GRACE_SECONDS

import otelexec
from otelexec import runtime
from tests.integrations.trigger.conftest import Fresh
from tests.integrations.trigger.stage import KEY
from tests.postgres_servers import Server
from tests.records import until


def test_runs_are_attempted_once_each_though_a_worker_dies(postgres: Server, fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    url = postgres.new_database()
    stage = fresh(OTELEXEC_STORE=url)
    monkeypatch.setenv("OTELEXEC_STORE", url)
    _, address = stage.serve()
    backend = LocalBackend()
    with TriggerDevBackend(address) as client:
        runs = [(client if number % 2 else backend).trigger("who", {"n": number}) for number in range(40)]
        held = {"mark": stage.mark(), "held": str(stage.folder / "held")}
        lane = [client.trigger("alone", held, concurrency_key="k") for _ in range(4)]
        workers = [stage.worker(2) for _ in range(2)]
        dying = client.trigger("die", stage.mark())
        mark = stage.mark()
        stuck = client.trigger("sleep", {"mark": mark, "seconds": 4})
        pid = stage.wait_for_run(mark)
        victim = next(worker for worker in workers if pid in worker.children())
        for pid in (*victim.children(), victim.pid):
            os.kill(pid, signal.SIGKILL)
        wanted = [*runs, *lane, dying, stuck]
        until(lambda: all(backend.get(run).has_ended for run in wanted), 60)
        assert Counter(backend.get(run).state for run in wanted) == {"succeeded": len(wanted)}
        assert [backend.get(run).output for run in lane] == [True] * 4
        assert (backend.get(dying).attempts, backend.get(stuck).attempts) == (2, 2)
        late = client.trigger("echo", 1, delay="1h")
        assert client.cancel(late)
        assert client.get(late).state == "cancelled"
    store = runtime.get().store
    assert store is not None
    records = list(store.executions())
    assert len(records) == len(wanted) + 1
    assert all(attempt.ended_unix_ns is not None for record in records for attempt in record.attempts)
    assert len({record.execution_id for record in records}) == len(records)
    otelexec.shutdown()


@pytest.mark.parametrize("minutes", [-5, 5])
def test_a_clock_that_is_minutes_off_changes_nothing(postgres: Server, fresh: Fresh, monkeypatch: pytest.MonkeyPatch, minutes: int) -> None:
    """The caller's is off one way, and the worker's and the server's the other way."""
    url = postgres.new_database()
    stage = fresh(OTELEXEC_STORE=url)
    off = stage.folder / "off"
    off.mkdir()
    (off / "sitecustomize.py").write_text(
        f"import time\nns, s = time.time_ns, time.time\ntime.time_ns = lambda: ns() - {minutes * 60_000_000_000}\n"
        f"time.time = lambda: s() - {minutes * 60}\n"
    )
    path = os.pathsep.join((str(off), stage.environment["PYTHONPATH"]))
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + minutes * 60_000_000_000)
    monkeypatch.setenv("OTELEXEC_STORE", url)
    _, address = stage.serve(PYTHONPATH=path)
    stage.worker(2, PYTHONPATH=path)
    backend = LocalBackend()
    with TriggerDevBackend(address) as client:
        mark = stage.mark()
        stubborn = backend.trigger("sleep", {"mark": mark, "seconds": 60})
        stage.wait_for_run(mark)
        asked = time.monotonic()
        assert backend.cancel(stubborn)
        runs = [each.trigger("echo", 1, ttl="1m") for each in (backend, client)]
        delayed = [each.trigger("echo", 1, delay="1m") for each in (backend, client)]
        again = backend.trigger("flaky", stage.mark())
        until(lambda: all(backend.get(run).has_ended for run in (*runs, again)), 20)
        assert [backend.get(run).state for run in (*runs, again)] == ["succeeded"] * 3
        assert [(each.get(run).raw or {})["status"] for each in (backend, client) for run in delayed] == ["DELAYED"] * 4
        assert backend.reschedule(delayed[0], "0s").id == delayed[0]
        until(lambda: backend.get(delayed[0]).has_ended, 10)
        until(lambda: backend.get(stubborn).has_ended, 30)
        assert time.monotonic() - asked > CANCEL_GRACE_SECONDS - 1
        assert backend.get(stubborn).state == "cancelled"
    store = runtime.get().store
    assert store is not None
    (retried,) = (record for record in store.executions() if len(record.attempts) == 2)
    first, second = retried.attempts
    assert second.started_unix_ns - (first.ended_unix_ns or 0) > 0.9e9
    otelexec.shutdown()


def test_a_text_with_a_nul_arrives_as_it_is(postgres: Server, fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    url = postgres.new_database()
    stage = fresh(OTELEXEC_STORE=url)
    monkeypatch.setenv("OTELEXEC_STORE", url)
    _, address = stage.serve()
    stage.worker(1)
    backend = LocalBackend()
    with TriggerDevBackend(address) as client, httpx.Client(base_url=address, headers={"authorization": f"Bearer {KEY}"}) as raw:
        target = raw.put("/api/v2/packets/nul.txt").json()["presignedUrl"]
        assert httpx.put(target, content=b"a\0b", headers={"content-type": "text/plain"}).status_code == 200
        options = {"payloadType": "application/store"}
        uploaded = raw.post("/api/v1/tasks/echo/trigger", json={"payload": "nul.txt", "options": options}).json()["id"]
        runs = [backend.trigger("echo", "a\0b"), client.trigger("echo", "a\0b"), client.trigger("echo", {"a": "a\0b"}), uploaded]
        runs.append(backend.replay(runs[0]))
        until(lambda: all(backend.get(run).has_ended for run in runs), 60)
        assert [backend.get(run).output for run in runs] == ["a\0b", "a\0b", {"a": "a\0b"}, "a\0b", "a\0b"]
        assert (client.get(runs[0]).raw or {})["payload"] == "a\0b"
    otelexec.shutdown()
