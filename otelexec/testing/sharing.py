"""Contract: several connections, threads and processes on one database."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial

from otelexec.store.base import Receipt, Store
from otelexec.store.rows import FAILED, LOST, RUNNING, SUCCEEDED
from otelexec.store.upkeep import ClaimOutbox, RetryParked, SettleOutbox
from otelexec.store.writes import AddSpans, Closed
from otelexec.testing.rows import OpenStore, claim, closed, closing, losing, opened, opening, outbox, record, span, states, write

_WORKER = """
import sys
from otelexec import runtime, settings
from otelexec.testing.rows import closed, closing, opened, opening

store = runtime.open_store(settings.load(store=sys.argv[1]))
me, rounds = sys.argv[2], int(sys.argv[3])
sys.stdin.readline()
for number in range(rounds):
    shared, own = opening(f"{me}/{number}", "shared"), opening(f"{me}/{number}", f"{me}/{number}")
    opened(store, shared)
    opened(store, own)
    assert closed(store, closing(shared, "failed")).won
    assert closed(store, closing(own)).won
store.close()
"""


def at_once(*functions: Callable[[], object]) -> None:
    """Call functions in a thread each, all starting together; raises what the first of them raised."""
    gate = threading.Barrier(len(functions))
    failures: list[BaseException] = []

    def call(function: Callable[[], object]) -> None:
        try:
            gate.wait()
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class SharingContract:
    """Concurrent writers."""

    def test_one_connection_sees_what_another_committed(self, store: Store, other_store: OpenStore) -> None:
        other = other_store()
        opened(store, opening())
        assert states(other) == (RUNNING, [RUNNING])
        closed(other, closing(opening()))
        assert states(store) == (SUCCEEDED, [SUCCEEDED])
        other.close()

    def test_one_of_many_finalizers_wins_and_the_others_are_told_who(self, store: Store, other_store: OpenStore) -> None:
        for number in range(10):
            self._race(store, other_store, number)
        written = Counter(request.split()[1] for request in outbox(store))
        assert written == {f"t{number}".encode(): 1 for number in range(10)}

    def _race(self, store: Store, other_store: OpenStore, number: int) -> None:
        row = opening(f"t{number}", f"e{number}")
        opened(store, row)
        answers: list[Closed] = []
        lost: list[object] = []
        others = [other_store() for _ in range(4)]

        def finalize(place: int) -> None:
            answers.append(closed(others[place], closing(row, (SUCCEEDED, FAILED)[place % 2], nonce=f"n{place}")))

        at_once(*(partial(finalize, place) for place in range(3)), lambda: lost.extend(write(others[3], losing(row))))
        (attempt,) = record(store, f"e{number}").attempts
        assert [answer.won for answer in answers].count(True) + lost.count(True) == 1
        assert {answer.state for answer in answers} == {attempt.state}
        assert {answer.finalized_by for answer in answers} == {attempt.finalized_by}
        assert (attempt.state == LOST) == (lost == [True])
        for other in others:
            other.close()

    def test_two_relays_never_have_one_row_in_hand(self, store: Store, other_store: OpenStore) -> None:
        write(store, *(AddSpans(b"%d" % number, 1) for number in range(200)))
        taken: list[int] = []

        def relay(name: str) -> None:
            mine = other_store()
            while True:
                (rows,) = mine.commit([ClaimOutbox(name, 60.0, max_rows=7)], durable=False, timeout_seconds=10.0)
                assert isinstance(rows, list)
                if not rows:
                    break
                taken.extend(row.id for row in rows)
                mine.commit([SettleOutbox(name, delivered=[row.id for row in rows])], durable=False, timeout_seconds=10.0)
            mine.close()

        at_once(lambda: relay("one"), lambda: relay("two"), lambda: relay("three"))
        assert len(taken) == len(set(taken)) == 200
        assert claim(store) == []

    def test_a_recorded_span_is_ended_by_one_of_two(self, store: Store, other_store: OpenStore) -> None:
        other = other_store()
        for number in range(20):
            row = span(f"s{number}")
            write(store, AddSpans(opened=(row,), process_id="p"))
            at_once(*(partial(write, one, AddSpans(recorded=((row, row.span_id.encode()),))) for one in (store, other)))
        other.close()
        assert Counter(outbox(store)) == {span(f"s{number}").span_id.encode(): 1 for number in range(20)}

    def test_two_who_retry_parked_rows_move_each_row_once(self, store: Store, other_store: OpenStore) -> None:
        write(store, *(AddSpans(b"%d" % number, 1) for number in range(1200)))
        rows = claim(store, "relay")
        write(store, SettleOutbox("relay", parked=[(row.id, "no") for row in rows]))
        other = other_store()
        moved: list[object] = []

        def retry(one: Store) -> None:
            while (step := write(one, RetryParked(limit=100))) != [0]:
                moved.extend(step)

        at_once(partial(retry, store), partial(retry, other))
        other.close()
        assert sum(count for count in moved if isinstance(count, int)) == 1200
        assert sorted(outbox(store)) == sorted(b"%d" % number for number in range(1200))

    def test_many_threads_may_use_one_store(self, store: Store) -> None:
        def work(name: int) -> None:
            for number in range(10):
                row = opening(f"{name}/{number}", f"{name}/{number}")
                opened(store, row)
                assert closed(store, closing(row)).won
                assert store.execution(f"{name}/{number}") is not None

        at_once(*(partial(work, name) for name in range(8)))
        assert store.statistics().executions == {SUCCEEDED: 80}

    def test_processes_wait_for_each_other_and_lose_nothing(self, store: Store) -> None:
        opened(store, opening("first", "shared"))
        count, rounds = 3, 40
        workers = [
            subprocess.Popen([sys.executable, "-c", _WORKER, store.url, f"w{number}", str(rounds)], stdin=subprocess.PIPE)  # noqa: S603 (our own code)
            for number in range(count)
        ]
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write(b"go\n")
            worker.stdin.flush()
        assert [worker.wait(60) for worker in workers] == [0] * count
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.close()
        found = record(store, "shared")
        assert [attempt.attempt for attempt in found.attempts] == list(range(1, count * rounds + 2))
        assert store.statistics().executions[SUCCEEDED] == count * rounds
        ends = Counter(outbox(store))
        assert len(ends) == 2 * count * rounds
        assert set(ends.values()) == {1}

    def test_a_receipt_tells_that_the_transaction_is_through(self, store: Store) -> None:
        receipt = Receipt()
        assert not receipt.committed
        results = store.commit([opening()], durable=True, timeout_seconds=10.0, receipt=receipt)
        assert receipt.committed
        assert receipt.results == results
        failed = Receipt()
        store.commit([], durable=False, timeout_seconds=10.0, receipt=failed)
        assert failed.results == []
