"""The store is locked, full, gone, damaged or newer: the work goes on, nothing is lost, and it comes back by itself."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import otelexec
from otelexec import runtime
from otelexec.decoded import decode
from otelexec.store import schema
from otelexec.store import spool as spool_module
from otelexec.store.spool import Spool
from otelexec.store.sqlite import SqliteStore
from otelexec.store.writes import AddSpans, CloseAttempt, Write
from otelexec.testing.rows import process
from tests import stores
from tests.forks import in_child
from tests.records import Records, until
from tests.trouble import (
    FINALIZE,
    OPEN,
    SLACK,
    Boom,
    Work,
    assert_nobody_waited,
    at_home,
    check_all_in,
    run_in_trouble,
    spooled,
)

_LOCKER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.readline()
connection.execute("ROLLBACK")
"""


@pytest.fixture
def work(tmp_path: Path, isolated: None) -> Work:
    otelexec.configure(open_timeout_seconds=OPEN, finalize_timeout_seconds=FINALIZE, cancel_poll_seconds=0.05, heartbeat_seconds=0.1)
    return Work()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the database from another process."""
    locker = subprocess.Popen([sys.executable, "-c", _LOCKER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert locker.stdin is not None
    assert locker.stdout is not None
    try:
        assert locker.stdout.readline() == b"locked\n"
        yield
    finally:
        locker.stdin.close()
        locker.stdout.close()
        assert locker.wait(10) == 0


def test_locked_for_seconds_by_another_process(work: Work, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    work.run("before")
    with locked(path):
        run_in_trouble(work)
        kept = [write for write in spooled(runtime.get().journal.spool.folder) if isinstance(write, CloseAttempt)]
        assert [write.attempt.execution.name for write in kept] == work.names[1:]
        assert all(decode(write.frozen.request)[0].attributes["otelexec.outcome"] == write.frozen.outcome.state for write in kept)
        assert caplog.text.count("otelexec.store.unavailable") == 1
        assert "Records go to the spool until it is back; the work goes on." in caplog.text
        assert str(path) in caplog.text
    until(at_home)
    assert caplog.text.count("otelexec.store.recovered") == 1
    work.run("after")
    check_all_in(path, work.names, {"waits no more 7"})
    assert spooled(runtime.get().journal.spool.folder) == []
    found = Records(path)
    assert {record.attempts[0].finalized_by for record in found.all()} == {"executor", "spool"}
    found.close()


def test_locked_for_less_than_the_timeout_is_waited_for(work: Work, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    otelexec.configure(open_timeout_seconds=10, finalize_timeout_seconds=10)
    work.run("before")
    with locked(path):
        thread = threading.Thread(target=work.run, args=("during",))
        thread.start()
        time.sleep(0.5)
        assert thread.is_alive()
    thread.join(10)
    assert not thread.is_alive()
    assert "unavailable" not in caplog.text
    check_all_in(path, work.names, set())


def test_a_new_store_waits_for_who_opens_it_at_the_same_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        pauses = []

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            other.execute("COMMIT")

        monkeypatch.setattr(time, "sleep", pause)
        with closing(SqliteStore(path)) as store:
            store.commit([AddSpans(b"request", 1)], durable=True, timeout_seconds=5)
    assert len(pauses) == 1


def test_locked_while_32_threads_work(work: Work, path: Path) -> None:
    work.run("before")
    works = [Work() for _ in range(32)]

    def run(mine: Work, name: int) -> None:
        for number in range(3):
            mine.run(f"{name}/{number}")

    with locked(path):
        threads = [threading.Thread(target=run, args=(mine, name)) for name, mine in enumerate(works)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
        assert max(seconds for mine in works for seconds in mine.seconds) < OPEN + FINALIZE + SLACK + 1.0
    until(at_home)
    records = Records(path)
    assert Counter(record.name for record in records.all()) == dict.fromkeys(["before", *(n for mine in works for n in mine.names)], 1)
    records.check_agreement()
    records.close()


async def test_locked_while_coroutines_run(work: Work, path: Path) -> None:
    work.run("before")

    @otelexec.execution("coroutine")
    async def function(number: int) -> int:
        await asyncio.sleep(0)
        return number

    with locked(path):
        started = time.monotonic()
        assert await asyncio.gather(*(function(number) for number in range(100))) == list(range(100))
        assert time.monotonic() - started < OPEN + FINALIZE + SLACK + 2.0
    await asyncio.to_thread(until, at_home)
    records = Records(path)
    assert Counter(record.state for record in records.all()) == {"succeeded": 101}
    records.check_agreement()
    records.close()


@pytest.mark.parametrize("with_sides", [False, True])
def test_deleted_under_us(work: Work, path: Path, with_sides: bool, caplog: pytest.LogCaptureFixture) -> None:
    work.run("lost with its file")
    for name in [path, *([Path(f"{path}-wal"), Path(f"{path}-shm")] if with_sides else [])]:
        name.unlink()
    work.run("in the new file")
    work.run("fails", Boom("mine"))
    assert "otelexec.store.replaced" in caplog.text
    assert_nobody_waited(work.seconds)
    check_all_in(path, ["in the new file", "fails"], {"fails"})


def test_deleted_between_open_and_close(work: Work, path: Path) -> None:
    with otelexec.execution("survives"):
        path.unlink()
    check_all_in(path, ["survives"], set())


def test_deleted_with_its_folder(tmp_path: Path, isolated: None) -> None:
    folder = tmp_path / "state"
    otelexec.configure(store=f"sqlite:///{folder / 'store.db'}", cancel_poll_seconds=0.05)
    work = Work()
    work.run("lost with its folder")
    shutil.rmtree(folder)
    work.run("in the new folder")
    check_all_in(folder / "store.db", ["in the new folder"], set())


def test_replaced_by_another_store(work: Work, path: Path, tmp_path: Path) -> None:
    work.run("in the old file")
    other = SqliteStore(tmp_path / "other.db")
    other.commit([], durable=True, timeout_seconds=5)
    other.close()
    with otelexec.execution("across"):
        (tmp_path / "other.db").replace(path)
    work.run("in the new file")
    check_all_in(path, ["across", "in the new file"], set())
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_replaced_by_something_else_which_is_set_aside(work: Work, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    work.run("in the old file")
    text = path.with_name("letter.txt")
    text.write_text("Dear reader, this is no database. " * 200)
    text.replace(path)
    work.run("in the new file")
    check_all_in(path, ["in the new file"], set())
    (aside,) = path.parent.glob("store.db.corrupt-*[0-9]")
    assert aside.read_text().startswith("Dear reader")
    assert "otelexec.store.corrupt" in caplog.text
    assert aside.name in caplog.text


@pytest.mark.parametrize("damage", [b"garbage " * 1000, b"SQLite format 3\x00" + b"\xff" * 8000])
def test_corrupt_at_the_start_is_set_aside_under_a_name_that_says_so(work: Work, path: Path, damage: bytes) -> None:
    path.write_bytes(damage)
    work.run("first")
    check_all_in(path, ["first"], set())
    (aside,) = path.parent.glob("store.db.corrupt-*[0-9]")
    assert aside.read_bytes() == damage


def test_corrupted_while_running(work: Work, path: Path) -> None:
    for number in range(30):
        work.run(f"before {number}")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))
    for name in ("one", "two", "three"):
        work.run(name)
        assert work.seconds[-1] < OPEN + FINALIZE + SLACK
    until(at_home)
    assert list(path.parent.glob("store.db.corrupt-*"))
    records = Records(path)
    assert {"one", "two", "three"} <= {record.name for record in records.all()}
    records.check_agreement()
    records.close()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize("version", [0, *range(1, schema.SCHEMA_VERSION + 2), -5])
def test_another_programs_file_is_left_alone_and_said_clearly(
    work: Work, path: Path, version: int, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE customer (name TEXT)")
        connection.execute(f"PRAGMA user_version = {version}")
        before = path.read_bytes()
    run_in_trouble(work)
    assert "is another program's SQLite file. Set OTELEXEC_STORE to a file of its own." in caplog.text
    assert path.read_bytes() == before
    path.unlink()
    check_all_in(path, work.names, {"waits no more 7"})


def test_a_newer_schema_is_left_alone_and_said_clearly(work: Work, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    work.run("before")
    runtime.get().store.close()  # type: ignore[union-attr]
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}")
    run_in_trouble(work)
    assert f"has schema {schema.SCHEMA_VERSION + 1}, this otelexec knows {schema.SCHEMA_VERSION}" in caplog.text
    assert "pip install -U otelexec`. Records go to the spool" in caplog.text
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION}")
    check_all_in(path, work.names, {"waits no more 7"})


def test_a_newer_schema_is_not_waited_for(tmp_path: Path, isolated: None) -> None:
    """A forked child of an old worker finds it anew: each job would wait."""
    path = tmp_path / "store.db"
    stores.make(f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}")
    otelexec.configure(store=f"sqlite:///{path}", open_timeout_seconds=60, finalize_timeout_seconds=60)
    work = Work()
    work.run("at once")
    assert work.seconds[-1] < 30
    assert spooled(runtime.get().journal.spool.folder)


@contextmanager
def no_place(tmp_path: Path) -> Iterator[Path]:
    """Give a folder that can't be made, not even by root, until the block ends."""
    blocker = tmp_path / "blocker"
    blocker.write_text("a file where a folder should be")
    yield blocker / "inside"
    blocker.unlink(missing_ok=True)


def test_neither_store_nor_spool_leaves_one_critical_line_with_everything(
    tmp_path: Path, isolated: None, caplog: pytest.LogCaptureFixture
) -> None:
    with no_place(tmp_path) as folder:
        otelexec.configure(
            store=f"sqlite:///{folder / 'store.db'}",
            open_timeout_seconds=OPEN,
            finalize_timeout_seconds=FINALIZE,
            cancel_poll_seconds=0.05,
        )
        work = Work()
        work.run("fails", Boom("mine"))
        work.run("works")
        lines = [record.getMessage() for record in caplog.records if record.levelno == logging.CRITICAL]
        assert all(record.name.startswith("otelexec") for record in caplog.records if record.levelno == logging.CRITICAL)
        assert len(lines) == 2
        for line, name, state in zip(lines, ("fails", "works"), ("failed", "succeeded"), strict=True):
            assert "\n" not in line
            write = spool_module.decode(json.dumps(json.loads(line)["record"]))
            assert isinstance(write, CloseAttempt)
            assert write.attempt.execution.name == name
            assert write.frozen.outcome.state == state
            (span,) = decode(write.frozen.request)
            assert (span.name, span.attributes["otelexec.outcome"], span.end_unix_ns) == (name, state, write.frozen.outcome.ended_unix_ns)
        assert max(work.seconds) < OPEN + FINALIZE + SLACK
        assert not runtime.get().journal.spool.filled
    check_all_in(folder / "store.db", ["fails", "works"], {"fails"})


def test_whoever_does_nothing_learns_that_the_store_is_away_and_so_do_its_forked_children(
    tmp_path: Path, isolated: None, caplog: pytest.LogCaptureFixture
) -> None:
    folder, said = tmp_path / "of the store", tmp_path / "said"
    otelexec.configure(store=f"sqlite:///{folder / 'store.db'}", spool=tmp_path / "spool", heartbeat_seconds=0.1, cancel_poll_seconds=0.05)
    runtime.get().attend()
    folder.rename(tmp_path / "elsewhere")
    folder.write_text("a file where a folder should be")
    until(lambda: runtime.get().journal.spooling)
    assert caplog.text.count("otelexec.store.unavailable") == 1

    def child() -> None:
        logging.getLogger("otelexec").addHandler(logging.FileHandler(said))
        assert runtime.get().journal.spooling
        Work().run("of a child")

    assert in_child(child) == 0
    assert "otelexec.store.unavailable" not in said.read_text()
    folder.unlink()
    check_all_in(folder / "store.db", ["of a child"], set())


def test_the_critical_line_comes_although_the_logging_configuration_has_disabled_the_logger(
    tmp_path: Path, isolated: None, caplog: pytest.LogCaptureFixture
) -> None:
    """`dictConfig` and `fileConfig` disable the loggers that were made before them, which is their default."""
    logger = logging.getLogger("otelexec")
    with no_place(tmp_path) as folder:
        otelexec.configure(store=f"sqlite:///{folder / 'store.db'}", open_timeout_seconds=OPEN, finalize_timeout_seconds=FINALIZE)
        logger.disabled = True
        try:
            Work().run("works")
        finally:
            logger.disabled = False
        (line,) = [record.getMessage() for record in caplog.records]
        assert json.loads(line)["record"]["attempt"]["execution"]["name"] == "works"
        otelexec.shutdown()


def test_a_store_that_is_back_is_used_although_the_spool_is_not(
    tmp_path: Path, isolated: None, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with no_place(tmp_path) as folder:
        otelexec.configure(spool=folder, open_timeout_seconds=OPEN, finalize_timeout_seconds=FINALIZE, cancel_poll_seconds=0.05)
        work = Work()
        work.run("before")
        with locked(path):
            work.run("during")
            assert any(record.levelno == logging.CRITICAL for record in caplog.records)
        check_all_in(path, ["before", "during"], set())
        work.run("after")
        check_all_in(path, ["before", "during", "after"], set())


_SCENARIO = """
import json, logging, os, resource, signal, sys, time
from pathlib import Path
import otelexec
from otelexec import runtime

logging.basicConfig(filename=sys.argv[2], level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
otelexec.configure(store="sqlite:///" + sys.argv[1], relay=False, reconcile=False, open_timeout_seconds=0.3,
                   finalize_timeout_seconds=0.8, cancel_poll_seconds=0.05)
path = Path(sys.argv[1])

def run(name, output="x"):
    value = object()
    @otelexec.execution(name)
    def function():
        otelexec.current_execution().set_output(output)
        return value
    started = time.monotonic()
    assert function() is value
    return time.monotonic() - started

def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

names = ["before"]
run("before")
"""

_FULL = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = 300_000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
number = 0
while not runtime.get().journal.spooling:
    names.append(f"fills {number}")
    run(names[-1], "y" * 20_000)
    number += 1
    assert number < 200
taken = 0
for number in range(10):
    names.append(f"full {number}")
    taken += run(names[-1])
assert taken < 10 * 0.3 / 2, taken
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
until(lambda: not runtime.get().journal.homeless)
names.append("after")
run("after")
print(json.dumps(names))
"""

_READ_ONLY = """
files = [path, *path.parent.glob(path.name + "-*")]
runtime.get().store.close()
files = [file for file in files if file.exists()]
for file in files:
    file.chmod(0o400)
if sys.argv[3] == "folder":
    path.parent.chmod(0o500)
try:
    file = path.open("r+b")
except PermissionError:
    pass
else:
    print("privileged")
    sys.exit()
first = run("first")
names.append("first")
assert first < 0.3 + 0.8 + 0.6, first
taken = 0
for number in range(10):
    names.append(f"read-only {number}")
    taken += run(names[-1])
assert taken < 10 * 0.3 / 2, taken
if sys.argv[3] == "folder":
    path.parent.chmod(0o700)
for file in files:
    file.chmod(0o600)
until(lambda: not runtime.get().journal.homeless)
names.append("after")
run("after")
print(json.dumps(names))
"""


def _as_if_not_root() -> None:
    """Drop what lets root ignore permissions: it then is an owner like any other."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH; PR_CAPBSET_DROP holds from the next exec on
        prctl(24, capability, 0, 0, 0)


def run_scenario(script: str, path: Path, *arguments: str, before: Callable[[], None] | None = None) -> tuple[list[str], str]:
    """Run a scenario in a process of its own; gives the names of what it ran and its log."""
    log = path.with_name("scenario.log")
    done = subprocess.run(
        [sys.executable, "-c", _SCENARIO + script, str(path), str(log), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=before,
    )
    assert done.returncode == 0, done.stderr + log.read_text()
    if done.stdout.strip() == "privileged":
        pytest.skip("permissions don't bind this user")
    return json.loads(done.stdout), log.read_text()


def test_disk_full(path: Path) -> None:
    names, log = run_scenario(_FULL, path)
    assert "otelexec.store.unavailable" in log
    assert "otelexec.store.recovered" in log
    records = Records(path)
    assert Counter(record.name for record in records.all()) == dict.fromkeys(names, 1)
    assert {record.state for record in records.all()} == {"succeeded"}
    records.check_agreement()
    records.close()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_read_only(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    path = folder / "store.db"
    names, log = run_scenario(_READ_ONLY, path, what, before=_as_if_not_root)
    assert "otelexec.store.unavailable" in log
    assert ("CRITICAL" in log) == (what == "folder")
    assert "otelexec.store.recovered" in log
    records = Records(path)
    assert [record.name for record in records.all()] == names
    records.check_agreement()
    records.close()


def test_files_belong_to_their_owner_only(tmp_path: Path, isolated: None) -> None:
    folder = tmp_path / "made"
    path = folder / "store.db"
    otelexec.configure(store=f"sqlite:///{path}", open_timeout_seconds=OPEN, finalize_timeout_seconds=FINALIZE, cancel_poll_seconds=30)
    work = Work()
    work.run("before")
    with locked(path):
        work.run("during")
        spool = runtime.get().journal.spool.folder
        modes = {file.name.removeprefix("store.db"): stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir() if file != spool}
        assert modes == {"": 0o600, "-wal": 0o600, "-shm": 0o600, ".lock": 0o600}
        assert [stat.S_IMODE(place.stat().st_mode) for place in (folder, spool)] == [0o700, 0o700]
        assert {stat.S_IMODE(file.stat().st_mode) for file in spool.iterdir()} == {0o600}


def test_another_process_may_take_the_spool_in_while_its_writer_lives(work: Work, path: Path) -> None:
    """What the reconciler and the command line do: the writer goes on, in a new segment, and nothing is there twice."""
    runtime.get().heartbeat.stop(5)  # it would take the spool in
    work.run("before")
    with locked(path):
        for number in range(30):
            work.run(f"spooled {number}")
    done = threading.Event()
    failures: list[str] = []

    def ingest() -> None:
        while not done.is_set():
            ended = subprocess.run(
                [sys.executable, "-m", "otelexec", "reconcile", "--once"], capture_output=True, text=True, timeout=60, check=False
            )
            if ended.returncode:
                failures.append(ended.stderr)

    thread = threading.Thread(target=ingest)
    thread.start()
    try:
        deadline = time.monotonic() + 4
        number = 0
        while time.monotonic() < deadline:
            number += 1
            work.run(f"meanwhile {number}")
    finally:
        done.set()
        thread.join(60)
    assert failures == []
    assert_nobody_waited(work.seconds[31:])
    assert runtime.get().journal.recover()
    check = Records(path)
    assert Counter(record.name for record in check.all()) == dict.fromkeys(work.names, 1)
    assert {record.state for record in check.all()} == {"succeeded"}
    check.check_agreement()
    check.close()


_INGEST_AND_DIE = """
import os, signal, sys
from pathlib import Path
from otelexec.store import spool
from otelexec.store.sqlite import SqliteStore

spool._GROUP = 3
store = SqliteStore(Path(sys.argv[1]))
left = int(sys.argv[3])

def commit(writes):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    store.commit(writes, durable=True, timeout_seconds=5)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

spool.Spool(Path(sys.argv[2]), lambda: None).ingest(commit, store.ingested)
"""


def test_an_ingestion_killed_anywhere_is_repeated_and_doubles_nothing(work: Work, path: Path) -> None:
    runtime.get().heartbeat.stop(5)  # it would take the spool in
    work.run("before")
    folder = runtime.get().journal.spool.folder
    with locked(path):
        for number in range(6):
            work.run(f"spooled {number}", Boom("mine") if number == 2 else None)
    killed = 0
    for moment in range(1, 40):
        ended = subprocess.run(
            [sys.executable, "-c", _INGEST_AND_DIE, str(path), str(folder), str(1 + moment % 2)], check=False, timeout=60
        )
        if ended.returncode == 0:
            break
        killed += 1
    assert killed > 3
    assert spooled(folder) == []
    assert runtime.get().journal.recover()
    check_all_in(path, work.names, {"spooled 2"})


def test_torn_and_damaged_lines_are_set_aside_and_the_rest_goes_in(work: Work, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runtime.get().heartbeat.stop(5)  # it would take the spool in
    work.run("before")
    folder = runtime.get().journal.spool.folder
    with locked(path):
        for number in range(4):
            work.run(f"spooled {number}")
    (segment,) = folder.glob("*.jsonl")
    lines = segment.read_bytes().splitlines(keepends=True)
    closes = [number for number, line in enumerate(lines) if b'"_":"CloseAttempt"' in line]
    flipped = lines[closes[1]].replace(b'"succeeded"', b'"faileddd"')
    torn = lines[closes[3]][:-20]
    lines[closes[1]], lines[closes[3]] = flipped, torn
    segment.write_bytes(b"".join(lines))
    assert runtime.get().journal.recover()
    (damaged,) = folder.glob("*.damaged")
    assert damaged.read_bytes() == flipped + torn
    assert stat.S_IMODE(damaged.stat().st_mode) == 0o600
    assert "2 lines" in caplog.text
    records = Records(path)
    states = {record.name: record.state for record in records.all()}
    assert states.pop("before") == "succeeded"
    assert states == {f"spooled {number}": state for number, state in enumerate(("succeeded", "running") * 2)}
    records.check_agreement()
    records.close()


def test_an_append_never_waits_for_an_ingestion(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", process)
    spool.append(AddSpans(b"one", 1), durable=False)
    taken: list[Write] = []

    def commit(writes: object) -> None:
        started = time.monotonic()
        spool.append(AddSpans(b"meanwhile", 1), durable=True)
        assert time.monotonic() - started < 1
        taken.extend(writes)  # type: ignore[arg-type]

    assert spool.ingest(commit, lambda _: 0) == 2
    assert spool.filled
    assert [write.request for write in spooled(spool.folder) if isinstance(write, AddSpans)] == [b"meanwhile"]
    assert [write.request for write in taken if isinstance(write, AddSpans)] == [b"one"]
