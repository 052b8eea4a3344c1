"""PostgreSQL is down, read-only, full, locked, silent or cut off: the work goes on, and nothing is lost or doubled."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import otelexec
from otelexec import runtime
from otelexec.store.writes import CloseAttempt
from otelexec.testing.rows import opening
from tests import stores
from tests.patience import PATIENCE
from tests.postgres_proxy import MOMENTS, Proxy, running_proxy
from tests.postgres_servers import (
    PASSWORD,
    USER,
    Server,
    at,
    caught_up,
    database_of,
    running_server,
    running_standby,
)
from tests.records import Records, until
from tests.servers import missing
from tests.trouble import (
    FINALIZE,
    HOME_SECONDS,
    ONE_EXECUTION,
    OPEN,
    SILENCE,
    SLACK,
    Boom,
    Work,
    assert_nobody_waited,
    at_home,
    check_all_in,
    configured,
    home,
    run_in_trouble,
    said,
    spooled,
)

# The server ends and comes back


@pytest.mark.parametrize("how", ["restart", "stop_immediate", "kill9"])
def test_a_server_that_is_down_for_a_while_gets_everything_when_it_is_back(own: Server, how: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    url = own.new_database()
    work = configured(url)
    work.run("before")
    if how == "restart":
        own.restart()
        work.run("first behind a restart")
        assert max(work.seconds) < OPEN + FINALIZE
        home()
        check_all_in(url, work.names, set())
        return
    getattr(own, how)()
    run_in_trouble(work)
    kept = [write for write in spooled(runtime.get().journal.spool.folder) if isinstance(write, CloseAttempt)]
    assert [write.attempt.execution.name for write in kept] == work.names[1:]
    assert caplog.text.count("otelexec.store.unavailable") == 1
    own.start()
    home()
    until(lambda: caplog.text.count("otelexec.store.recovered") == 1)
    work.run("after")
    check_all_in(url, work.names, {"waits no more 7"})
    assert spooled(runtime.get().journal.spool.folder) == []
    assert PASSWORD not in caplog.text


@pytest.mark.parametrize("command", ["relay", "reconcile"])
def test_a_command_that_stays_waits_for_a_server_that_is_down_when_it_starts(own: Server, command: str) -> None:
    url = own.new_database()
    configured(url).run("before")
    own.stop()
    environ = {**os.environ, "OTELEXEC_STORE": url}
    arguments = [sys.executable, "-m", "otelexec", command]
    with subprocess.Popen(arguments, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert process.stdout is not None
            assert process.stderr.readline().endswith("; waiting for it\n")
            own.start()
            assert process.stdout.readline().endswith("Ctrl-C ends it.\n")
            process.terminate()
            _, complaints = process.communicate(timeout=20 * PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "waiting for it" not in complaints


def test_a_server_behind_pgbouncer_is_away_for_a_while(own: Server, bounced: str) -> None:
    work = configured(bounced)
    work.run("before")
    own.stop_immediate()
    work.run("during")
    work.run("during, too", Boom("mine"))
    assert max(work.seconds) < 2 * SILENCE + OPEN + FINALIZE + SLACK
    own.start()
    home()
    work.run("after")
    check_all_in(at(bounced, port=own.port), work.names, {"during, too"})


def test_refusing_then_read_only_then_writable_as_in_a_failover(
    postgres_folder: Path, isolated: None, caplog: pytest.LogCaptureFixture
) -> None:
    """The address stays and leads to the standby, as a cloud's or an operator's does."""
    with running_server(postgres_folder) as primary, running_standby(primary, postgres_folder) as standby:
        url = primary.new_database()
        with running_proxy(url) as proxy:
            work = configured(proxy.url(url))
            work.run("before")
            caught_up(primary, standby)
            proxy.refuse()
            primary.stop()
            work.run("refused")
            work.run("refused again")
            proxy.lead_to(standby.url())
            proxy.listen()
            for number in range(5):
                work.run(f"read-only {number}", Boom("mine") if number == 2 else None)
                assert work.seconds[-1] < OPEN + FINALIZE + SLACK
            assert not at_home()
            standby.promote()
            home()
            work.run("after")
            check_all_in(standby.url(database_of(url)), work.names, {"read-only 2"})
            assert PASSWORD not in caplog.text
            runtime.shutdown()


def test_a_url_with_both_servers_finds_the_new_primary(postgres_folder: Path, isolated: None) -> None:
    with running_server(postgres_folder) as primary, running_standby(primary, postgres_folder) as standby:
        url = primary.new_database()
        hosts = f"{primary.host}:{primary.port},{standby.host}:{standby.port}"
        both = f"postgresql://{USER}:{PASSWORD}@{hosts}/{database_of(url)}"
        work = configured(both)
        work.run("before")
        caught_up(primary, standby)
        primary.stop()
        work.run("during")
        standby.promote()
        home()
        work.run("after")
        check_all_in(standby.url(database_of(url)), work.names, set())
        runtime.shutdown()


def test_read_only_for_a_while(own: Server, caplog: pytest.LogCaptureFixture) -> None:
    url = own.new_database()
    work = configured(url)
    work.run("before")
    own.read_only(True)
    run_in_trouble(work)
    assert "read-only" in caplog.text
    own.read_only(False)
    home()
    work.run("after")
    check_all_in(url, work.names, {"waits no more 7"})


def test_a_session_that_was_closed_while_it_stood_idle_is_no_outage(own: Server, caplog: pytest.LogCaptureFixture) -> None:
    url = own.new_database()
    store = stores.opened(url)

    def close_all() -> None:
        with own.administrator() as administrator:
            administrator.execute("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s", (database_of(url),))

    store.commit([], durable=True, timeout_seconds=HOME_SECONDS)
    close_all()
    assert store.commit([opening()], durable=True, timeout_seconds=HOME_SECONDS)
    close_all()
    assert store.execution("e") is not None
    assert not caplog.text
    store.close()


def test_no_connection_is_left_for_us(own: Server, caplog: pytest.LogCaptureFixture) -> None:
    url = own.new_database()
    name = database_of(url)
    with own.administrator() as administrator:
        administrator.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 0".encode())
    work = configured(url, reachable=False)
    run_in_trouble(work)
    assert "too many connections" in caplog.text
    with own.administrator() as administrator:
        administrator.execute(f"ALTER DATABASE {name} CONNECTION LIMIT -1".encode())
    home()
    check_all_in(url, work.names, {"waits no more 7"})


def test_32_threads_share_a_few_sessions(work: Work, url: str, postgres: Server) -> None:
    work.run("before")
    most = 0

    def run(name: int) -> None:
        for number in range(3):
            Work().run(f"{name}/{number}")

    threads = [threading.Thread(target=run, args=(name,)) for name in range(32)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with postgres.administrator() as administrator:
            ((count,),) = administrator.execute("SELECT COUNT(*) FROM pg_stat_activity WHERE datname = %s", (database_of(url),)).fetchall()
        most = max(most, int(count))
    assert 0 < most <= 4
    records = Records(url)
    assert Counter(record.state for record in records.all()) == {"succeeded": 97}
    records.check_agreement()
    records.close()


def test_no_session_is_in_a_transaction_while_the_users_code_runs(work: Work, url: str, postgres: Server) -> None:
    with otelexec.execution("job") as run:
        run.progress("half")
        # The heartbeat's transactions come and go; one that were kept for the execution would stay.
        until(lambda: _states(postgres, url) == {"idle"})


def _states(server: Server, url: str) -> set[str]:
    """Give the states of the sessions."""
    with server.administrator() as administrator:
        rows = administrator.execute("SELECT state FROM pg_stat_activity WHERE datname = %s", (database_of(url),)).fetchall()
    return {state for (state,) in rows}


# The server is there, and does not do it


def test_locked_by_somebodys_open_transaction(work: Work, url: str, caplog: pytest.LogCaptureFixture) -> None:
    work.run("before")
    with stores.locked(url):
        run_in_trouble(work)
        assert caplog.text.count("otelexec.store.unavailable") == 1
    home()
    work.run("after")
    check_all_in(url, work.names, {"waits no more 7"})


def test_a_statement_timeout_of_the_role_loses_nothing(url: str, postgres: Server) -> None:
    work = configured(url)
    work.run("before")
    with postgres.administrator() as administrator:
        administrator.execute(f"ALTER DATABASE {database_of(url)} SET statement_timeout = '50ms'".encode())
    runtime.get().store.close()  # type: ignore[union-attr]
    with stores.locked(url):
        run_in_trouble(work)
    home()
    work.run("after")
    check_all_in(url, work.names, {"waits no more 7"})


@pytest.fixture
def doomed(postgres_folder: Path, isolated: None) -> Iterator[Server]:
    """Give a server that no other test uses after this one."""
    with running_server(postgres_folder) as server:
        yield server
        runtime.shutdown()


def test_disk_full(doomed: Server, caplog: pytest.LogCaptureFixture) -> None:
    """The store's tables are in a tablespace on a small disk, which somebody fills."""
    url = doomed.new_database()
    work = configured(url)
    work.run("before")
    with small_tablespace(doomed, url) as disk:
        work.run("moved")
        filler = disk / "filler"
        fill(filler)
        number = 0
        while at_home():
            number += 1
            big = f"fills {number}"
            work.names.append(big)
            with otelexec.execution(big) as run:
                run.set_output("y" * 20_000)
            assert number < 500
        for number in range(5):
            work.run(f"full {number}")
            assert work.seconds[-1] < OPEN + FINALIZE + SLACK
        assert "No space left" in caplog.text
        filler.unlink()
        home()
        work.run("after")
        check_all_in(url, work.names, set())
        runtime.shutdown()


def fill(path: Path) -> None:
    """Write into a file until its disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 65536):
            pass


@contextlib.contextmanager
def small_tablespace(server: Server, url: str) -> Iterator[Path]:
    """Move a store's tables to a disk of 24 MB until the block ends."""
    disk = server.data.parent / "small"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=777", "tmpfs", disk], check=False, capture_output=True)
    if mounted.returncode:
        missing("a full disk needs root, who may mount a small one")
    try:
        place = disk / "tables"
        place.mkdir()
        owner = server.data.stat()
        os.chown(place, owner.st_uid, owner.st_gid)
        with server.administrator(database_of(url)) as administrator:
            administrator.execute(f"CREATE TABLESPACE small LOCATION '{place}'".encode())
            for (table,) in administrator.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'otelexec'").fetchall():
                administrator.execute(f"ALTER TABLE otelexec.{table} SET TABLESPACE small".encode())
        yield disk
    finally:
        server.kill9()
        subprocess.run(["umount", "--lazy", disk], check=True)


# The network


def test_a_server_that_never_answers_holds_nobody_up_for_long(proxy: Proxy, postgres: Server, caplog: pytest.LogCaptureFixture) -> None:
    url = postgres.new_database()
    work = configured(proxy.url(url))
    work.run("before")
    proxy.hold()
    work.run("first in the silence")
    assert work.seconds[-1] < 2 * SILENCE + OPEN + FINALIZE + SLACK
    for number in range(20):
        work.run(f"waits no more {number}", Boom("mine") if number == 7 else None)
    assert_nobody_waited(work.seconds[-20:])
    assert "otelexec.store.unavailable" in caplog.text
    proxy.release()
    home()
    check_all_in(url, work.names, {"waits no more 7"})


@pytest.mark.parametrize("relay", ["relay", "no relay"])
def test_a_process_whose_server_never_answered_runs_its_work_and_exits(
    proxy: Proxy, postgres: Server, relay: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the default timeouts: a second for the open, five for the close, two for the exit."""
    url = proxy.url(postgres.new_database())
    proxy.hold()
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", ONE_EXECUTION, url, relay], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr
    assert time.monotonic() - started < 1 + 5 + 2 + 6
    assert PASSWORD not in done.stderr
    proxy.release()
    assert said(capsys, url, "reconcile", "--once")[0] == 0
    found = Records(url)
    assert (found.one().state, len(found.one().attempts)) == ("succeeded", 1)
    found.check_agreement()
    found.close()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_connection_that_is_cut_at_any_request_of_an_execution_doubles_and_loses_nothing(
    proxy: Proxy, postgres: Server, moment: str
) -> None:
    """Also between a commit and its answer: the retry finds out by the fencing token."""
    url = postgres.new_database()
    work = configured(proxy.url(url))
    runtime.get().heartbeat.stop(5)  # its requests would be among those that are counted
    work.run("before")
    number = 0
    while True:
        number += 1
        name = f"cut at {number}"
        proxy.cut_at(number, moment)
        with otelexec.publish(name, destination="q"):
            payload = otelexec.inject({})
        with otelexec.extract(payload), otelexec.execution(name) as run:
            run.progress("half", done=1, total=2)
            work.run(f"child of {number}")
        work.names.append(name)
        if proxy.counts()["requests"] < number:
            break
        assert number < 100
        until(runtime.get().journal.recover)  # the request that is cut may be one of its own
    assert number > 4
    records = Records(url)
    assert Counter(record.name for record in records.all()) == dict.fromkeys(work.names, 1)
    assert {record.state for record in records.all()} == {"succeeded"}
    assert {len(record.attempts) for record in records.all()} == {1}
    spans = Counter(span.span_id for span in records.spans())
    assert set(spans.values()) == {1}
    assert len(spans) == len(work.names) + number  # the publishes
    records.check_agreement()
    records.close()
