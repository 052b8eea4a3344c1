"""PostgreSQL is killed, read-only, full, silent, cut off or closed to us: the work goes on, and nothing is lost or doubled."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

import otelexec
from otelexec import cli, runtime
from otelexec.errors import SettingsError, StoreError
from otelexec.receiver import OtlpReceiver
from otelexec.settings import Settings
from otelexec.store import schema
from otelexec.store.writes import CloseAttempt
from tests import stores
from tests.postgres_proxy import MOMENTS, Proxy, running_proxy
from tests.postgres_servers import (
    ADMIN,
    ADMIN_PASSWORD,
    PASSWORD,
    USER,
    Server,
    at,
    caught_up,
    database_of,
    debian,
    running_pgbouncer,
    running_server,
    running_standby,
)
from tests.records import Records, until
from tests.servers import ROOT, missing
from tests.trouble import FINALIZE, OPEN, SLACK, Boom, Work, assert_nobody_waited, at_home, check_all_in, run_in_trouble, spooled

SILENCE = 1.0
"""How long the store waits for an answer at the least, whatever its caller's timeout."""

HOME_SECONDS = 20.0


def configured(url: str) -> Work:
    """Make the runtime for a store, with a heartbeat that finds out soon that it is back."""
    otelexec.configure(
        store=url, open_timeout_seconds=OPEN, finalize_timeout_seconds=FINALIZE, cancel_poll_seconds=0.05, heartbeat_seconds=0.1
    )
    return Work()


@pytest.fixture
def url(postgres: Server, isolated: None) -> Iterator[str]:
    """Give a database of the test's own on the server that all share."""
    url = postgres.new_database()
    yield url
    runtime.shutdown()
    postgres.drop_database(url)


@pytest.fixture
def work(url: str) -> Work:
    return configured(url)


@pytest.fixture
def own(postgres_folder: Path, isolated: None) -> Iterator[Server]:
    """Give a server that the test may kill."""
    with running_server(postgres_folder) as server:
        yield server
        runtime.shutdown()


@pytest.fixture
def proxy(postgres: Server, isolated: None) -> Iterator[Proxy]:
    with running_proxy(postgres.url()) as proxy:
        yield proxy
        proxy.release()
        runtime.shutdown()


def home() -> None:
    until(at_home, HOME_SECONDS)


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
    kept = [write for write in spooled(runtime.get().spool.folder) if isinstance(write, CloseAttempt)]
    assert [write.attempt.execution.name for write in kept] == work.names[1:]
    assert caplog.text.count("otelexec.store.unavailable") == 1
    own.start()
    home()
    until(lambda: caplog.text.count("otelexec.store.recovered") == 1)
    work.run("after")
    check_all_in(url, work.names, {"waits no more 7"})
    assert spooled(runtime.get().spool.folder) == []
    assert PASSWORD not in caplog.text


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
    assert run.number == 1
    home()
    work.run("after")
    check_all_in(url, ["before", "across", "after"], set())


@pytest.fixture
def bounced(own: Server, postgres_folder: Path) -> Iterator[str]:
    """Give a database of the server that may be killed, through a PgBouncer, whose clients don't notice when its server dies."""
    with running_pgbouncer(own, postgres_folder) as port:
        yield at(own.new_database(), port=port)
        runtime.shutdown()


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


def test_no_connection_is_left_for_us(own: Server, caplog: pytest.LogCaptureFixture) -> None:
    url = own.new_database()
    name = database_of(url)
    with own.administrator() as administrator:
        administrator.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 0")
    work = configured(url)
    run_in_trouble(work)
    assert "too many connections" in caplog.text
    with own.administrator() as administrator:
        administrator.execute(f"ALTER DATABASE {name} CONNECTION LIMIT -1")
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
        found = until(lambda: _states(postgres, url))
        assert found <= {"idle"}


def _states(server: Server, url: str) -> set[str]:
    """Give the states of the sessions once none of them is at a statement."""
    with server.administrator() as administrator:
        rows = administrator.execute("SELECT state FROM pg_stat_activity WHERE datname = %s", (database_of(url),)).fetchall()
    found = {state for (state,) in rows}
    return set() if "active" in found else found


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
        administrator.execute(f"ALTER DATABASE {database_of(url)} SET statement_timeout = '50ms'")
    runtime.get().store.close()  # type: ignore[union-attr]
    with stores.locked(url):
        run_in_trouble(work)
    home()
    work.run("after")
    check_all_in(url, work.names, {"waits no more 7"})


def test_disk_full(own: Server, caplog: pytest.LogCaptureFixture) -> None:
    """The store's tables are in a tablespace on a small disk, which somebody fills."""
    url = own.new_database()
    work = configured(url)
    work.run("before")
    with small_tablespace(own, url) as disk:
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


_ONE = """
import sys, time
import otelexec
patience = 20 if sys.argv[2] == "patient" else 1
otelexec.configure(store=sys.argv[1], reconcile=False, relay=sys.argv[2] == "relay", open_timeout_seconds=patience)
with otelexec.execution("job"):
    pass
print("ran", flush=True)
"""


@pytest.mark.parametrize("relay", ["relay", "no relay"])
def test_a_process_whose_server_never_answered_runs_its_work_and_exits(
    proxy: Proxy, postgres: Server, relay: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the default timeouts: a second for the open, five for the close, two for the exit."""
    url = proxy.url(postgres.new_database())
    proxy.hold()
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", _ONE, url, relay], capture_output=True, text=True, timeout=60, check=False)
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
        until(runtime.get().recover)  # the request that is cut may be one of its own
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


# Rights, names and versions


def said(capsys: pytest.CaptureFixture[str], url: str, *arguments: str) -> tuple[int, str]:
    """Run a command and give its exit status and all that it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTELEXEC_STORE", url)
        code = cli.main(list(arguments))
    out, errors = capsys.readouterr()
    assert "Traceback" not in errors
    return code, out + errors


SECRETS = (PASSWORD, "hunter-seventeen")


def _secretless(text: str) -> None:
    assert not [secret for secret in SECRETS if secret in text]


@pytest.mark.parametrize(
    "spelled",
    [
        "postgresql://{user}:{password}@{place}/{database}",
        "postgres://{user}:{password}@{place}/{database}?application_name=app",
        "postgresql://{place}/{database}?user={user}&password={password}",
        "postgresql://{user}@{place}/{database}?password={password}&sslmode=prefer",
    ],
)
def test_however_a_password_is_given_nothing_shows_it(
    own: Server, spelled: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    where = own.new_database()
    place = f"{own.host}:{own.port}"
    url = spelled.format(user=USER, password=PASSWORD, place=place, database=database_of(where))
    wrong = spelled.format(user=USER, password="hunter-seventeen", place=place, database=database_of(where))
    work = configured(url)
    work.run("job")
    settings = runtime.get().settings
    store = runtime.get().store
    assert store is not None
    shown = [repr(settings), str(settings), repr(store), store.url, str(runtime.get().spool.folder)]
    commands = (["doctor"], ["doctor", "--json"], ["list"], ["prune", "--older-than", "1d"], ["show", "00"], ["reconcile", "--once"])
    shown += [said(capsys, url, *command)[1] for command in commands]
    for command in (["doctor"], ["list"]):
        code, text = said(capsys, wrong, *command)
        assert code != 0
        assert "password authentication failed" in text
        shown.append(text)
    own.stop()
    work.run("in trouble")
    for command in (["doctor"], ["list"]):
        code, text = said(capsys, url, *command)
        assert code != 0
        shown.append(text)
    with pytest.raises(StoreError) as raised:
        stores.opened(url).execution("x")
    error: BaseException | None = raised.value
    while error is not None:
        shown.append(f"{error} {error!r}")
        error = error.__cause__ or error.__context__
    for text in [*shown, caplog.text, *capsys.readouterr()]:
        _secretless(text)
    spool = runtime.get().spool.folder
    assert not [path for path in spool.iterdir() if PASSWORD.encode() in path.read_bytes()]
    own.start()
    home()
    check_all_in(url, work.names, set())
    for column in ("resource", "scope"):
        assert not [row for row in stores.rows(url, f"SELECT {column} FROM process") if PASSWORD.encode() in bytes(row[0])]


def test_tls_options_are_honoured(postgres_folder: Path, isolated: None, caplog: pytest.LogCaptureFixture) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        missing("the openssl command is not there")
    with running_server(postgres_folder, programs=debian()) as server:  # the wheel's is built without TLS
        certificate, key = server.data / "server.crt", server.data / "server.key"
        files = ("-keyout", str(key), "-out", str(certificate))
        names = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1")
        subprocess.run(
            [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *files, *names], check=True, capture_output=True
        )
        owner = server.data.stat()
        for path in (certificate, key):
            os.chown(path, owner.st_uid, owner.st_gid)
        key.chmod(0o600)
        url = server.new_database()
        work = configured(f"{url}?sslmode=verify-full&sslrootcert={certificate}")
        work.run("refused without TLS")
        assert not at_home()
        assert "SSL" in caplog.text
        server.settings["ssl"] = "on"
        server.restart()
        home()
        work.run("over TLS")
        with server.administrator() as administrator:
            encrypted = administrator.execute(
                "SELECT DISTINCT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE datname = %s", (database_of(url),)
            ).fetchall()
        assert encrypted == [(True,)]
        check_all_in(url, work.names, set())
        runtime.shutdown()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://127.0.0.1:not-a-port/x",
        "postgresql://me:hunter/seventeen@127.0.0.1/x",
        "postgresql://me:hunter@seventeen@127.0.0.1/x",
        "postgresql://me:hunter-seventeen@[127.0.0.1/x",
        "postgresql://me:hunter-seventeen@host/x?no_such_option=hunter-seventeen",
        "postgresql://me:hunter%zzseventeen@host/x",
        "postgresql:/me:hunter-seventeen@host/x",
        "mysql://me:hunter-seventeen@host/x",
    ],
)
def test_a_wrong_url_is_said_in_one_line_that_repeats_no_part_of_it(url: str, isolated: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError) as raised:
        otelexec.configure(store=url)
    assert "\n" not in str(raised.value)
    for part in ("hunter", "seventeen", "127.0.0.1", "not-a-port", "no_such_option", "me:"):
        assert part not in str(raised.value)
    assert "store" in str(raised.value).lower()
    code, text = said(capsys, url, "list")
    assert code == 2
    assert "hunter" not in text
    assert "seventeen" not in text


def test_a_role_without_rights_is_told_what_it_needs(
    postgres: Server, url: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    login(postgres, "worker")
    theirs = at(url, port=postgres.port, user="worker")
    work = configured(theirs)
    run_in_trouble(work)
    assert caplog.text.count("otelexec.store.unavailable") == 1
    assert "permission denied" in caplog.text
    _secretless(caplog.text)
    code, text = said(capsys, theirs, "doctor")
    assert code != 0
    _secretless(text)
    # The owner makes the schema and lets the role in, and what it could not write goes in by itself.
    stores.make(url)
    with postgres.administrator(database_of(url)) as administrator:
        for statement in rights("worker"):
            administrator.execute(statement.encode())
    home()
    check_all_in(url, work.names, {"waits no more 7"})


def rights(role: str) -> list[str]:
    """Give the statements of the README that let a role in."""
    lines = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("GRANT ")]
    statements = [line.partition(";")[0] for line in lines]
    named = [statement for statement in statements if role in statement.rpartition(" TO ")[2].split(", ")]
    return [f"{statement.rpartition(' TO ')[0]} TO {role}" for statement in named]


def login(server: Server, role: str, password: str = PASSWORD) -> None:
    """Make a role of the server's, if there is none yet, that may log in and nothing else."""
    with server.administrator() as administrator:
        if administrator.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (role,)).fetchone() is None:
            administrator.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{password}'".encode())


def test_a_worker_and_a_reader_get_by_with_the_least_rights(postgres: Server, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    stores.make(url)
    for role in ("worker", "reader"):
        login(postgres, role)
        with postgres.administrator(database_of(url)) as administrator:
            for statement in rights(role):
                administrator.execute(statement.encode())
    worker, reader = (at(url, port=postgres.port, user=role) for role in ("worker", "reader"))
    work = configured(worker)
    work.run("job")
    work.run("fails", Boom("mine"))
    with otelexec.publish("queued", destination="q"):
        otelexec.inject({})
    otelexec.request_cancel("somebody")
    runtime.shutdown()
    for command in (["reconcile", "--once"], ["prune", "--older-than", "1d"]):
        assert said(capsys, worker, *command)[0] == 0, command
    ids = dict(stores.rows(url, "SELECT name, execution_id FROM execution"))
    for command in (["list"], ["show", ids["fails"]]):
        code, text = said(capsys, reader, *command)
        assert (code, "fails" in text) == (0, True), text
    _, text = said(capsys, reader, "doctor", "--json")
    assert '"reachable": true' in text
    code, text = said(capsys, reader, "cancel", ids["queued"])
    assert code != 0
    assert "permission denied" in text


def test_a_newer_schema_is_left_alone_and_said_clearly(
    work: Work, url: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    work.run("before")
    runtime.get().store.close()  # type: ignore[union-attr]
    with stores.connected(url) as connection:
        connection.execute(f"UPDATE schema_version SET version = {schema.SCHEMA_VERSION + 1}".encode())
    run_in_trouble(work)
    assert f"has schema {schema.SCHEMA_VERSION + 1}, this otelexec knows {schema.SCHEMA_VERSION}" in caplog.text
    assert "pip install -U otelexec" in caplog.text
    code, text = said(capsys, url, "list")
    assert code != 0
    assert "pip install -U otelexec" in text
    runtime_says = "otelexec.store.unavailable"  # this process's own line, which the command's log handler shows too
    assert len([line for line in text.strip().splitlines() if runtime_says not in line]) == 1
    with stores.connected(url) as connection:
        connection.execute(f"UPDATE schema_version SET version = {schema.SCHEMA_VERSION}".encode())
    home()
    check_all_in(url, work.names, {"waits no more 7"})


def test_a_dropped_schema_is_made_again(work: Work, url: str, postgres: Server, caplog: pytest.LogCaptureFixture) -> None:
    work.run("lost with its schema")
    with otelexec.execution("across"):
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA otelexec CASCADE")
        work.run("in the new one")
    home()
    work.run("after")
    assert "otelexec.store.replaced" in caplog.text
    until(at_home, HOME_SECONDS)
    records = Records(url)
    assert Counter(record.name for record in records.all()) == {"across": 1, "in the new one": 1, "after": 1}
    assert {record.state for record in records.all()} == {"succeeded"}
    records.check_agreement()
    records.close()


def test_a_database_that_is_not_there_yet(own: Server, caplog: pytest.LogCaptureFixture) -> None:
    url = own.url("later")
    work = configured(url)
    run_in_trouble(work)
    assert "does not exist" in caplog.text
    with own.administrator() as administrator:
        administrator.execute(f"CREATE DATABASE later OWNER {USER}")
    home()
    check_all_in(url, work.names, {"waits no more 7"})


def test_the_schema_is_made_by_one_of_many_processes_that_start_at_once(postgres: Server, isolated: None) -> None:
    url = postgres.new_database()
    started = [
        subprocess.Popen([sys.executable, "-c", _ONE, url, "patient"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in started:
        out, errors = process.communicate(timeout=60)
        assert (process.returncode, out, errors) == (0, "ran\n", "")
    records = Records(url)
    assert Counter(record.state for record in records.all()) == {"succeeded": 4}
    records.check_agreement()
    records.close()
    postgres.drop_database(url)


def test_an_application_on_the_same_database_is_left_alone(url: str, postgres: Server) -> None:
    """Tables of the same names in `public` are the application's."""
    with psycopg.connect(at(url, port=postgres.port, user=ADMIN, password=ADMIN_PASSWORD), autocommit=True) as connection:
        for table in stores.TABLES:
            connection.execute(f"CREATE TABLE public.{table} (mine int)".encode())
    work = configured(url)
    work.run("job")
    check_all_in(url, ["job"], set())
    with psycopg.connect(at(url, port=postgres.port, user=ADMIN, password=ADMIN_PASSWORD)) as connection:
        for table in stores.TABLES:
            assert connection.execute(f"SELECT count(*) FROM public.{table}".encode()).fetchone() == (0,)


def test_settings_hide_the_password() -> None:
    settings = Settings(store=f"postgresql://me:{PASSWORD}@host/x?password={PASSWORD}")
    _secretless(f"{settings!r} {settings}")
