"""The local engine on PostgreSQL: two workers of two processes each, one of them killed, and a server between caller and store."""

from __future__ import annotations

import os
import signal
from collections import Counter

import pytest
from otelexec_trigger import LocalBackend, TriggerDevBackend

import otelexec
from otelexec import runtime
from tests.integrations.trigger.conftest import Fresh
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
