"""A PostgreSQL that crashes forgets what was committed without fsync: it comes back, and was not sent before."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

import otelexec
from otelexec import cli
from otelexec.receiver import OtlpReceiver
from otelexec.store.postgres_pool import Session
from otelexec.store.writes import RecordQueued
from otelexec.testing.rows import execution, opening, span
from tests import stores
from tests.postgres_servers import Server, at, running_server
from tests.records import Records, until
from tests.trouble import HOME_SECONDS, check_all_in, configured, home


@pytest.mark.parametrize("crash", ["kill9", "kill_backend"])
def test_an_open_that_a_crash_took_comes_back_with_its_close(own: Server, crash: str) -> None:
    """A server also crashes when one of its processes is killed; it starts anew by itself then, under the same pid."""
    url = own.new_database()
    work = configured(url)
    work.run("before")
    with otelexec.execution("across") as run:
        getattr(own, crash)()
        if crash == "kill9":
            own.start()
    assert run._execution.number == 1
    home()
    work.run("after")
    check_all_in(url, ["before", "across", "after"], set())


def test_an_exclusive_attempt_outlives_a_crash_of_the_server_at_once(own: Server) -> None:
    """Before its process notices: another worker would begin a second one while the first is at work."""
    url = own.new_database()
    store = stores.opened(url)
    store.commit([], durable=True, timeout_seconds=HOME_SECONDS)
    store.commit([replace(opening(), exclusive=True)], durable=False, timeout_seconds=HOME_SECONDS)
    own.kill9()
    own.start()
    until(lambda: stores.rows_or_none(url, "SELECT state FROM attempt") == [("running",)], HOME_SECONDS)
    store.close()


def test_what_a_busy_process_wrote_last_comes_back_in_a_few_round_trips(own: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """At some milliseconds each they took longer than a commit may, so that the process never got back to its server."""
    url = own.new_database()
    store = stores.opened(url)
    store.commit([], durable=True, timeout_seconds=HOME_SECONDS)
    names = [f"e{number}" for number in range(600)]
    queued = [RecordQueued(execution(name), span(f"queued {name}"), "p", 1) for name in names]
    opens = [opening(f"t {name}", name) for name in names[:100]]
    for some in (queued[:300], queued[300:], opens):
        store.commit(some, durable=False, timeout_seconds=HOME_SECONDS)
    own.kill9()
    own.start()
    trips, wait = Counter[str](), Session.wait

    def counted(*arguments: Any, **keywords: Any) -> Any:
        trips["wait"] += 1
        return wait(*arguments, **keywords)

    monkeypatch.setattr(Session, "wait", counted)
    store.commit([], durable=True, timeout_seconds=HOME_SECONDS)
    assert trips["wait"] < 40  # a connection and its greeting among them
    found = {record.execution_id: record.state for record in store.executions(limit=700)}
    assert found == {name: "running" if number < 100 else "queued" for number, name in enumerate(names)}
    assert len(stores.rows(url, "SELECT span_id FROM open_span")) == 600
    store.close()


def check_what_runs_comes_back(server: Server, url: str, crash: str) -> None:
    """Crash a server that has not flushed an open and a queued record yet; they must be there again while their process lives."""
    direct = at(url, port=server.port)
    work = configured(url)
    work.run("before")
    with otelexec.publish("queued", destination="q"):
        pass
    with otelexec.execution("running"):
        getattr(server, crash)()
        if crash == "kill9":
            server.start()

        def states() -> dict[str, str]:
            with contextlib.suppress(psycopg.OperationalError):
                return dict(stores.rows_or_none(direct, "SELECT name, state FROM execution") or ())
            return {}

        until(lambda: states() == {"before": "succeeded", "queued": "queued", "running": "running"}, HOME_SECONDS)
    home()
    records = Records(direct)
    assert {record.name: record.state for record in records.all()} == {"before": "succeeded", "queued": "queued", "running": "succeeded"}
    assert Counter(span.name for span in records.spans()).most_common(1)[0][1] == 1
    records.check_agreement()
    records.close()


@pytest.mark.parametrize("crash", ["kill9", "kill_backend"])
def test_an_open_that_a_crash_took_comes_back_while_its_process_lives(own: Server, crash: str) -> None:
    """Else the running attempt would be invisible until its end, and lost without a trace if its process died."""
    check_what_runs_comes_back(own, own.new_database(), crash)


def test_an_open_that_a_crash_took_comes_back_through_pgbouncer_too(own: Server, bounced: str) -> None:
    check_what_runs_comes_back(own, bounced, "kill9")


_TASK = """
import otelexec

@otelexec.execution("core", core=True)
def core():
    pass

@otelexec.execution("task")
def task():
    core()

task()
"""


@pytest.mark.parametrize("sent_first", [True, False])
def test_what_a_crash_takes_from_a_process_that_has_ended_was_not_sent_before(
    postgres_folder: Path, isolated: None, monkeypatch: pytest.MonkeyPatch, sent_first: bool
) -> None:
    """Else the reconciler would write the span of the outer code again, with other bytes; its end is committed without fsync."""
    with (
        running_server(postgres_folder, settings={"wal_writer_delay": "10s"}) as server,
        OtlpReceiver() as receiver,
    ):
        monkeypatch.setenv("OTELEXEC_STORE", server.new_database())
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        subprocess.run([sys.executable, "-c", _TASK], check=True, timeout=60)
        if sent_first:
            assert cli.main(["relay", "--drain"]) == 0
        server.kill9()
        server.start()
        for command in (["reconcile", "--once"], ["relay", "--drain"]):
            assert cli.main(command) == 0
        sent: dict[str, set[bytes]] = {}
        for span in receiver.spans:
            sent.setdefault(span.span_id, set()).add(span.encoded)
        assert len(sent) == 2
        assert [len(versions) for versions in sent.values()] == [1, 1]
        records = Records(os.environ["OTELEXEC_STORE"])
        attempt = records.attempt()
        assert (attempt.state, attempt.outer_outcome) == ("succeeded", "succeeded")
        records.close()
