"""Who may do what in a PostgreSQL store, over which connection, with which schema, and that no password is ever shown."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psycopg
import pytest

import otelexec
from otelexec import runtime
from otelexec.errors import SettingsError, StoreError
from otelexec.settings import Settings
from otelexec.store import schema
from otelexec.store.postgres import PostgresStore
from tests import stores
from tests.postgres_servers import ADMIN, ADMIN_PASSWORD, PASSWORD, USER, Server, at, database_of, debian, running_server
from tests.records import Records, until
from tests.servers import ROOT, missing
from tests.trouble import HOME_SECONDS, ONE_EXECUTION, Boom, Work, at_home, check_all_in, configured, home, run_in_trouble, said

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
    shown = [repr(settings), str(settings), repr(store), store.url, str(runtime.get().journal.spool.folder)]
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
    spool = runtime.get().journal.spool.folder
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
        work = configured(f"{url}?sslmode=verify-full&sslrootcert={certificate}", reachable=False)
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
        "postgresql://me:hunter%E9seventeen@host/x",
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
    work = configured(theirs, reachable=False)
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
    code, text = said(capsys, reader, "doctor")
    assert "and written" not in text
    assert "permission denied for table attempt, table" in " ".join(text.split())
    code, text = said(capsys, worker, "doctor")
    assert "can be read and written" in text
    with postgres.administrator(database_of(url)) as administrator:
        administrator.execute("REVOKE EXECUTE ON FUNCTION otelexec.close_attempt FROM PUBLIC, worker")
    assert "permission denied for function close_attempt" in " ".join(said(capsys, worker, "doctor")[1].split())
    for statement in ("ALTER ROLE worker SET default_transaction_read_only TO on", "ALTER ROLE worker RESET ALL"):
        with postgres.administrator() as administrator:
            administrator.execute(statement.encode())
        assert ("is read-only" in " ".join(said(capsys, worker, "doctor")[1].split())) == ("read_only" in statement)
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


def test_a_role_that_may_not_upgrade_an_older_schema_is_told_who_may(
    postgres: Server, url: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    stores.make(url)
    login(postgres, "worker")
    older = ("DROP TABLE run, run_key, run_batch, run_lane, run_packet", "UPDATE schema_version SET version = 2")
    with postgres.administrator(database_of(url)) as administrator:
        for statement in ("SET search_path TO otelexec", *older, *rights("worker")):
            administrator.execute(statement.encode())
    theirs = at(url, port=postgres.port, user="worker")
    work = configured(theirs, reachable=False)
    run_in_trouble(work)
    needs = f"has schema 2, this otelexec needs {schema.SCHEMA_VERSION}: run `otelexec migrate` as the role that owns it"
    assert needs in caplog.text
    assert needs in said(capsys, theirs, "migrate")[1]
    assert said(capsys, url, "migrate")[0] == 0
    with postgres.administrator(database_of(url)) as administrator:
        for statement in rights("worker"):
            administrator.execute(statement.encode())
    home()
    check_all_in(url, work.names, {"waits no more 7"})


def test_a_role_that_was_given_the_schema_makes_the_store_in_it(postgres: Server, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    login(postgres, "worker")
    with postgres.administrator(database_of(url)) as administrator:
        administrator.execute("CREATE SCHEMA otelexec AUTHORIZATION worker")
    code, text = said(capsys, at(url, port=postgres.port, user="worker"), "migrate")
    assert (code, f"has schema {schema.SCHEMA_VERSION}" in text) == (0, True), text


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


def test_a_database_in_another_encoding_is_said_clearly_and_nothing_is_lost(
    own: Server, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    url = own.new_database()
    name = database_of(url)
    create = f"CREATE DATABASE {name} OWNER {USER} TEMPLATE template0 ENCODING"
    own.drop_database(url)
    with own.administrator() as administrator:
        administrator.execute(f"{create} 'LATIN1' LOCALE 'C'".encode())
    work = configured(url, reachable=False)
    work.run("a 🙂 job", Boom("🙂"))
    assert "encoding is LATIN1; otelexec needs one that was created with UTF8" in caplog.text
    code, text = said(capsys, url, "doctor")
    assert (code, "encoding is LATIN1" in " ".join(text.split())) == (1, True)
    own.drop_database(url)
    with own.administrator() as administrator:
        administrator.execute(f"{create} 'UTF8' LOCALE 'C'".encode())
    home()
    check_all_in(url, ["a 🙂 job"], {"a 🙂 job"})


def test_a_spool_under_another_name_of_the_database_is_pointed_at(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A corrected URL is how an outage ends, and the spool of the wrong one is nobody's then."""
    said(capsys, url, "migrate")
    assert "records wait" not in said(capsys, url, "doctor")[1]
    work = configured(at(url, port=1), reachable=False)
    work.run("job")
    folder = runtime.get().journal.spool.folder
    otelexec.shutdown()
    text = " ".join(said(capsys, url, "doctor")[1].split())
    assert "records wait in" in text
    assert "otelexec relay --drain --spool FOLDER" in text
    assert json.loads(said(capsys, url, "doctor", "--json")[1])["spool"]["others"] == [str(folder)]
    said(capsys, url, "reconcile", "--once", "--spool", str(folder))
    records = Records(url)
    assert [record.name for record in records.all()] == ["job"]
    records.close()
    assert "records wait" not in said(capsys, url, "doctor")[1]


def test_a_roles_default_isolation_does_not_count_for_the_store(url: str) -> None:
    stores.execute(url, f"ALTER DATABASE {database_of(url)} SET default_transaction_isolation TO 'repeatable read'")
    store = stores.opened(url)
    assert isinstance(store, PostgresStore)
    with store.moving() as (session, _):
        assert session.execute("SHOW transaction_isolation").fetchone() == ("read committed",)
    store.close()


def test_a_database_that_is_not_there_yet(own: Server, caplog: pytest.LogCaptureFixture) -> None:
    url = own.url("later")
    work = configured(url, reachable=False)
    run_in_trouble(work)
    assert "does not exist" in caplog.text
    with own.administrator() as administrator:
        administrator.execute(f"CREATE DATABASE later OWNER {USER}")
    home()
    check_all_in(url, work.names, {"waits no more 7"})


def test_the_schema_is_made_by_one_of_many_processes_that_start_at_once(postgres: Server, isolated: None) -> None:
    url = postgres.new_database()
    started = [
        subprocess.Popen([sys.executable, "-c", ONE_EXECUTION, url, "patient"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
