"""Group commit: nothing lost, nothing doubled, nobody hangs, whoever is stopped wherever."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import signal
import sqlite3
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing as closing_now
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Self

import pytest

from otelexec.errors import StoreBusy, StoreUnavailable
from otelexec.store import group_commit
from otelexec.store.base import Receipt
from otelexec.store.group_commit import Entry, GroupCommit
from otelexec.store.sqlite import SqliteStore
from otelexec.store.writes import AddSpans, Closed, OpenAttempt, Opened, Write
from otelexec.testing.rows import closing, opening
from tests.records import until


class Interrupt(BaseException):
    """What the signal handler of these tests raises."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "group.db")
    yield store
    store.close()


@pytest.fixture
def group(store: SqliteStore) -> Iterator[GroupCommit]:
    group = GroupCommit(store)
    yield group
    group.close()


def requests(store: SqliteStore) -> list[bytes]:
    with closing_now(sqlite3.connect(store.path)) as connection:
        return [bytes(row[0]) for row in connection.execute("SELECT request FROM outbox ORDER BY id")]


def attempts(store: SqliteStore) -> int:
    with closing_now(sqlite3.connect(store.path)) as connection:
        return int(connection.execute("SELECT COUNT(*) FROM attempt").fetchone()[0])


# A signal of these tests may also hit a weak reference's callback, where Python swallows what a handler raises.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Alarm:
    """Raises `Interrupt` in the main thread after some microseconds, by a real signal."""

    def __init__(self) -> None:
        self.raised = 0

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGALRM, self._handle)
        # pytest's own would be hit as well, in the middle of formatting what a weak reference's callback swallowed.
        self._hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        return self

    def __exit__(self, *exc_info: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)
        sys.unraisablehook = self._hook
        # Python's logging takes its locks a step before it sees to their release. Struck there, this thread keeps them, and every
        # other one that logs (asyncio's, psycopg's pool's) would wait until the end of the test run.
        inside: Any = logging
        for lock in (inside._lock, *(handler.lock for ref in inside._handlerList if (handler := ref()) is not None)):
            while lock is not None and lock._is_owned():
                lock.release()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Not between two calls: an interrupt on the way to disarming the timer would leave it armed for what comes after.
        if frame is not None and frame.f_code.co_filename == __file__:
            return
        self.raised += 1
        raise Interrupt

    def within(self, seconds: float, function: Callable[[], object]) -> bool:
        """Call a function with the alarm set, as often as it is interrupted; gives whether it was."""
        interrupted = False
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                function()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupt:
            interrupted = True
        return interrupted


def test_a_lone_caller_commits_in_its_own_thread(store: SqliteStore, group: GroupCommit) -> None:
    before = threading.active_count()
    answer = group.commit(opening())
    assert isinstance(answer, Opened)
    assert threading.active_count() == before


def test_32_threads_share_commits_and_each_gets_its_own_answer(store: SqliteStore, group: GroupCommit) -> None:
    transactions: list[int] = []
    inner = store.commit

    def counted(writes: Sequence[Write], *, durable: bool, timeout_seconds: float, receipt: Receipt | None = None) -> list[object]:
        transactions.append(len(writes))
        return inner(writes, durable=durable, timeout_seconds=timeout_seconds, receipt=receipt)

    store.commit = counted  # type: ignore[method-assign]
    wrong: list[object] = []

    def work(name: int) -> None:
        for number in range(20):
            row = opening(f"{name}/{number}", f"{name}/{number}")
            if group.commit(row) != Opened(1):
                wrong.append(row)
            answer = group.commit(closing(row), durable=True, timeout_seconds=20)
            if not isinstance(answer, Closed) or not answer.won or answer.span_id != (row.span and row.span.span_id):
                wrong.append(answer)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert sum(transactions) == 32 * 40
    assert len(transactions) < sum(transactions) / 2
    assert sorted(requests(store)) == sorted(f"succeeded {name}/{number}".encode() for name in range(32) for number in range(20))


def test_a_follower_is_woken_as_soon_as_its_write_is_in(store: SqliteStore, group: GroupCommit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost wake-ups would show: a follower then only looks after the rescue interval, which is made long here."""
    monkeypatch.setattr(group_commit, "_RESCUE_SECONDS", 20.0)

    def work(name: int) -> None:
        for number in range(100):
            group.commit(AddSpans(b"%d/%d" % (name, number), 1), timeout_seconds=30)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert time.monotonic() - started < 15
    assert len(set(requests(store))) == len(requests(store)) == 800


def test_a_signal_at_any_moment_of_a_commit_loses_and_doubles_nothing(store: SqliteStore, group: GroupCommit) -> None:
    """A real signal, its moment swept over the whole commit, other threads committing meanwhile."""
    stop = threading.Event()
    others: list[bytes] = []

    def work(name: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            request = b"other %d/%d" % (name, number)
            group.commit(AddSpans(request, 1), timeout_seconds=30)
            others.append(request)
            time.sleep(0.002)

    group.commit(opening("warm", "warm"))
    threads = [threading.Thread(target=work, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    interrupted = 0
    try:
        with Alarm() as alarm:
            for number in range(1500):
                row = opening(f"t{number}", f"e{number}")
                close = closing(row, nonce=f"n{number}")
                if alarm.within(1e-6 * random.uniform(1, 300), lambda row=row: group.commit(row, timeout_seconds=30)):  # type: ignore[misc]
                    interrupted += 1
                    row = OpenAttempt(row.token, row.execution, row.process_id, row.started_unix_ns, span=row.span, repeated=True)
                    assert isinstance(group.commit(row, timeout_seconds=30), Opened)
                if alarm.within(1e-6 * random.uniform(1, 300), lambda close=close: group.commit(close, timeout_seconds=30)):  # type: ignore[misc]
                    interrupted += 1
                    answer = group.commit(close, timeout_seconds=30)
                    assert isinstance(answer, Closed)
                    assert answer.won
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert interrupted > 100
    group.flush()
    assert attempts(store) == 1501
    found = requests(store)
    assert len(found) == len(set(found))
    assert set(found) == {*others, *(f"succeeded t{number}".encode() for number in range(1500))}


def test_a_signal_in_the_leader_leaves_the_writes_of_others_whole(store: SqliteStore, group: GroupCommit) -> None:
    """Writes that can't be told from another one: doubled ones would show, even if the caller never repeats."""
    stop = threading.Event()
    others: list[bytes] = []

    def work(name: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            request = b"other %d/%d" % (name, number)
            group.commit(AddSpans(request, 1), timeout_seconds=30)
            others.append(request)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(2)]
    group.commit(AddSpans(b"warm", 1))
    for thread in threads:
        thread.start()
    uninterrupted: set[bytes] = set()
    started = time.perf_counter()
    for number in range(100):
        group.commit(AddSpans(b"before %d" % number, 1), timeout_seconds=30)
    typical = (time.perf_counter() - started) / 100  # so that the signals hit on a fast machine and miss on a slow one
    try:
        with Alarm() as alarm:
            for number in range(1500):
                request = b"main %d" % number
                commit = partial(group.commit, AddSpans(request, 1), timeout_seconds=30)
                if not alarm.within(random.uniform(1e-6, 2 * typical), commit):
                    uninterrupted.add(request)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    group.flush()
    found = requests(store)
    assert len(found) == len(set(found))
    assert uninterrupted | set(others) <= set(found)
    assert 50 < len(uninterrupted) < 1450


def test_signals_one_upon_another_stop_nobody(store: SqliteStore, group: GroupCommit) -> None:
    alarm = Alarm()
    with alarm:
        for number in range(100):
            row = opening(f"t{number}", f"e{number}")
            repeated = OpenAttempt(row.token, row.execution, "p", 1, repeated=True)
            for write in (row, repeated):
                try:
                    try:
                        signal.setitimer(signal.ITIMER_REAL, 1e-5, 3e-5)
                        group.commit(write, timeout_seconds=30)
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                except Interrupt:
                    continue
    for number in range(100):
        group.commit(OpenAttempt(f"t{number}", opening(f"t{number}", f"e{number}").execution, "p", 1, repeated=True))
    group.flush()
    assert alarm.raised > 100
    assert attempts(store) == 100


def test_coroutines_of_several_loops_share_the_committer(store: SqliteStore, group: GroupCommit) -> None:
    async def one(name: int, number: int) -> object:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[object] = loop.create_future()

        def notify(entry: Entry) -> None:
            loop.call_soon_threadsafe(future.set_result, entry.error or entry.result)

        group.submit(opening(f"{name}/{number}", f"{name}/{number}"), notify, durable=False, timeout_seconds=20)
        return await future

    async def many(name: int) -> list[object]:
        return await asyncio.gather(*(one(name, number) for number in range(200)))

    answers: list[object] = []
    threads = [threading.Thread(target=lambda name=name: answers.extend(asyncio.run(many(name)))) for name in range(4)]
    threads.append(threading.Thread(target=lambda: answers.extend(group.commit(opening(f"s{n}", f"s{n}")) for n in range(100))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert answers == [Opened(1)] * 900
    assert sum(thread.name == "otelexec-committer" for thread in threading.enumerate()) == 1
    group.close()
    until(lambda: not any(thread.name == "otelexec-committer" for thread in threading.enumerate()))


def test_a_write_submitted_after_the_close_is_committed_all_the_same(store: SqliteStore, group: GroupCommit) -> None:
    answers: list[object] = []
    group.submit(opening(), lambda entry: answers.append(entry.result), durable=False, timeout_seconds=5)
    until(lambda: answers)
    group.close()
    group.submit(opening("t2", "e2"), lambda entry: answers.append(entry.result), durable=False, timeout_seconds=5)
    assert answers == [Opened(1), Opened(1)]


def test_the_garbage_collector_may_leave_a_write_inside_a_commit(store: SqliteStore, group: GroupCommit) -> None:
    """It runs in the very thread that leads and holds the store's lock: waiting there would be for ever."""
    left: list[object] = []

    class Dropped:
        def __init__(self) -> None:
            self.circle = self

        def __del__(self) -> None:
            group.leave(AddSpans(b"left", 1), lambda entry: left.append(entry.result), durable=False, timeout_seconds=5)
            group.flush(wait=False)

    inner = store.commit

    def collecting(writes: Sequence[Write], *, durable: bool, timeout_seconds: float, receipt: Receipt | None = None) -> list[object]:
        Dropped()
        store.announce = announce
        return inner(writes, durable=durable, timeout_seconds=timeout_seconds, receipt=receipt)

    def announce() -> Sequence[Write]:
        gc.collect()  # inside the transaction
        return ()

    store.commit = collecting  # type: ignore[method-assign]
    done = threading.Thread(target=lambda: group.commit(AddSpans(b"own", 1)), daemon=True)
    done.start()
    done.join(10)
    assert not done.is_alive()
    # The same where the store is used past the group, as an ingestion does.
    store.close()
    done = threading.Thread(target=lambda: store.commit([AddSpans(b"direct", 1)], durable=True, timeout_seconds=5), daemon=True)
    done.start()
    done.join(10)
    assert not done.is_alive()
    store.commit = inner  # type: ignore[method-assign]
    group.flush()
    assert sorted(requests(store)) == [b"direct", b"left", b"left", b"own"]
    assert left == [None, None]


def test_nothing_piles_up_where_writes_are_left_without_a_committer(store: SqliteStore, group: GroupCommit) -> None:
    for number in range(50):
        group.leave(AddSpans(b"%d" % number, 1), lambda entry: None, durable=False, timeout_seconds=5)
        group.flush(wait=False)
    assert len(requests(store)) == 50
    assert group._signal.empty()


def test_a_deferred_write_goes_with_an_fsync(store: SqliteStore, group: GroupCommit) -> None:
    group.defer(AddSpans(b"deferred", 1), lambda _: None, timeout_seconds=1)
    row = opening()
    group.commit(row)
    assert requests(store) == []
    group.commit(closing(row), durable=True)
    assert requests(store) == [b"succeeded t", b"deferred"]


def test_deferred_writes_go_together_when_there_are_enough(store: SqliteStore, group: GroupCommit) -> None:
    for number in range(group_commit.MAX_DEFERRED):
        group.commit(opening(f"e{number}", f"t{number}"))
        assert requests(store) == []
        group.defer(AddSpans(b"%d" % number, 1), lambda _: None, timeout_seconds=1)
    group.commit(opening("last", "last"))
    assert requests(store) == [b"%d" % number for number in range(group_commit.MAX_DEFERRED)]


def test_a_flush_while_another_leads_leaves_no_write_deferred(store: SqliteStore, group: GroupCommit) -> None:
    group.defer(AddSpans(b"deferred", 1), lambda _: None, timeout_seconds=1)
    group._lead[group_commit._LEAD] = "another"
    group.flush()
    del group._lead[group_commit._LEAD]
    group.commit(opening())
    assert requests(store) == [b"deferred"]


def test_a_flush_ends_although_more_is_deferred_meanwhile(store: SqliteStore, group: GroupCommit) -> None:
    def defer_another(_: Entry) -> None:
        group.defer(AddSpans(b"another", 1), lambda _: None, timeout_seconds=1)

    group.defer(AddSpans(b"deferred", 1), defer_another, timeout_seconds=1)
    group.flush()
    assert requests(store) == [b"deferred"]
    assert group.waits
    group.flush()
    assert requests(store) == [b"deferred", b"another"]


def test_a_deferred_write_goes_with_a_flush(store: SqliteStore, group: GroupCommit) -> None:
    told: list[Entry] = []
    group.defer(AddSpans(b"deferred", 1), told.append, timeout_seconds=1)
    group.flush()
    assert requests(store) == [b"deferred"]
    assert [entry.error for entry in told] == [None]


def test_nobody_waits_longer_than_its_own_time_while_another_process_writes(store: SqliteStore, group: GroupCommit) -> None:
    group.commit(opening())
    blocker = sqlite3.connect(store.path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    waited: dict[float, float] = {}

    def work(timeout: float) -> None:
        started = time.monotonic()
        with pytest.raises(StoreBusy):
            group.commit(opening(f"t{timeout}", f"e{timeout}"), timeout_seconds=timeout)
        waited[timeout] = time.monotonic() - started

    threads = [threading.Thread(target=work, args=(timeout,)) for timeout in (2.5, 0.3, 0.8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    blocker.execute("ROLLBACK")
    blocker.close()
    assert set(waited) == {0.3, 0.8, 2.5}
    assert all(timeout <= seconds < timeout + 1.0 for timeout, seconds in waited.items())
    assert group.commit(opening("after", "after")) == Opened(1)
    assert attempts(store) == 2


def test_a_write_gets_in_when_the_other_process_is_done_in_time(store: SqliteStore, group: GroupCommit) -> None:
    group.commit(opening())
    blocker = sqlite3.connect(store.path, isolation_level=None, check_same_thread=False)
    blocker.execute("BEGIN IMMEDIATE")
    threading.Timer(0.6, lambda: blocker.execute("ROLLBACK")).start()
    assert group.commit(opening("t2", "e2"), timeout_seconds=10) == Opened(1)
    blocker.close()


def test_a_store_that_raises_what_it_should_not_is_unavailable_and_hangs_nobody(
    store: SqliteStore, group: GroupCommit, caplog: pytest.LogCaptureFixture
) -> None:
    inner = store.commit

    def broken(*_: object, **__: object) -> list[object]:
        raise RuntimeError("a fault")

    store.commit = broken  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailable, match="a fault"):
        group.commit(opening())
    assert "otelexec.store.commit" in caplog.text
    store.commit = inner  # type: ignore[method-assign]
    assert group.commit(opening()) == Opened(1)


def test_one_listener_that_raises_does_not_harm_the_others(
    store: SqliteStore, group: GroupCommit, caplog: pytest.LogCaptureFixture
) -> None:
    def raises(_: Entry) -> None:
        raise RuntimeError("listener")

    group.leave(AddSpans(b"left", 1), raises, durable=False, timeout_seconds=5)
    assert group.commit(opening()) == Opened(1)
    assert requests(store) == [b"left"]
    assert "otelexec.store.notify" in caplog.text


def test_a_child_forked_while_another_thread_leads_has_a_door_of_its_own(tmp_path: Path) -> None:
    """The child of a process in the middle of a commit: neither hangs on the parent's lead nor touches its connection."""
    import otelexec
    from otelexec import runtime
    from tests.records import Records

    @otelexec.execution("job")
    def job() -> str:
        return "done"

    job()
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            job()

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    codes: list[int] = []
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    signal.alarm(20)
                    with otelexec.execution("child"):
                        pass
                    runtime.shutdown()
                    code = 0
                finally:
                    os._exit(code)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert codes == [0] * 10
    reader = Records(tmp_path / "store.db")
    found = reader.all()
    assert {record.state for record in found} == {"succeeded"}
    assert sum(record.name == "child" for record in found) == 10
    reader.check_agreement()
    reader.close()


def test_a_lead_whose_call_is_over_is_taken_by_whoever_waits(store: SqliteStore, group: GroupCommit) -> None:
    """As after signal handlers that threw a leader out, one upon another, before it could let go."""
    call = group_commit._Call()
    group._lead[group_commit._LEAD] = weakref.ref(call)
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(group.commit(AddSpans(b"waits", 1), timeout_seconds=30)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    del call
    thread.join(10)
    assert answers == [None]
    assert requests(store) == [b"waits"]
