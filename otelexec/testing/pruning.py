"""Contract: what is old goes, step by step, and nothing that anybody still needs."""

from __future__ import annotations

from dataclasses import replace

from otelexec.store.base import Store
from otelexec.store.pruning import TABLES
from otelexec.store.rows import FAILED, Cancellation
from otelexec.store.runs import CreateBatch, PutPacket, RunKey
from otelexec.store.upkeep import Prune, Pruned
from otelexec.store.writes import Heartbeat, Ingested, RequestCancel
from otelexec.testing.outbox import deliver_all, fill, park_all
from otelexec.testing.rows import claim, closed, closing, opened, opening, outer_closing, process, pruned, write


class PruningContract:
    """Executions that ended long ago, and what outlived them."""

    def test_prune_deletes_what_is_old_and_delivered_with_all_that_belongs_to_it(self, store: Store) -> None:
        for number in range(3):
            row = opening(f"t{number}", f"e{number}")
            opened(store, row)
            wishes = [RequestCancel(name, Cancellation(7, None)) for name in (f"t{number}", f"e{number}")]
            write(store, *wishes)  # for the attempt alone, and for the execution
            closed(store, closing(row, ended=10 + number))
        deliver_all(store)
        assert pruned(store, 12) == 2
        assert pruned(store, 12) == 0
        assert set(store.cancellations(["t0", "e0", "t1", "e1", "t2", "e2"])) == {"t2", "e2"}
        assert [found.execution_id for found in store.executions()] == ["e2"]
        assert store.statistics().executions == {"succeeded": 1}
        assert opened(store, opening("new", "e0")).number == 1

    def test_prune_never_takes_what_is_undelivered_parked_or_open(self, store: Store) -> None:
        names = ("undelivered", "parked", "outer open", "running again", "children", "paused")
        for name in names:
            row = opening(f"t {name}", name)
            opened(store, row)
            if name == "outer open":
                core = opening(f"t {name}", name, outer_token=f"t {name}", takes_over=True)
                opened(store, core)
            closed(store, closing(row, "paused" if name == "paused" else FAILED, ended=10))
            if name == "parked":
                park_all(store, but=b"failed t undelivered")
            elif name != "undelivered":
                deliver_all(store, but=b"failed t undelivered")
        opened(store, opening("second", "running again"))
        fill(store, b"late child", execution_id="children")
        assert pruned(store, 2**62) == 0
        assert {found.execution_id for found in store.executions()} == set(names)
        write(store, outer_closing("t outer open", "outer open"))
        deliver_all(store, but=b"failed t undelivered")
        assert pruned(store, 2**62) == 2
        assert {found.execution_id for found in store.executions()} == {"undelivered", "parked", "running again", "paused"}

    def test_prune_keeps_a_process_that_has_something_open(self, store: Store) -> None:
        write(store, Heartbeat(process("busy")), Heartbeat(process("idle")), Heartbeat(process("claims")))
        opened(store, opening(process_id="busy"))
        fill(store, b"0")
        claim(store, "claims")
        assert pruned(store, 2**62) == 0
        assert {found.process_id for found in store.processes()} == {"busy", "claims"}
        assert store.statistics().processes == 2

    def test_a_step_of_prune_looks_at_a_bounded_number_of_rows_and_says_where_it_stopped(self, store: Store) -> None:
        for number in range(5):
            row = opening(f"t{number}", f"e{number}")
            opened(store, row)
            if number != 1:  # goes on
                closed(store, closing(row, ended=10))
        deliver_all(store)
        steps: list[Pruned] = []
        after: int | str | None = None
        while not steps or after is not None:
            (step,) = write(store, Prune(12, after=after, limit=2))
            assert isinstance(step, Pruned)
            steps.append(step)
            after = step.last
        assert [step.deleted for step in steps] == [1, 2, 1, 0]
        assert [found.execution_id for found in store.executions()] == ["e1"]

    def test_prune_looks_no_further_than_rows_that_began_in_time(self, store: Store) -> None:
        for number in range(4):
            row = replace(opening(f"t{number}", f"e{number}"), started_unix_ns=10 if number < 2 else 20)
            opened(store, row)
            closed(store, closing(row, ended=10 + number))
        deliver_all(store)
        assert write(store, Prune(12, limit=2), Prune(12, after=2, limit=2)) == [Pruned(2, 2), Pruned(0, None)]

    def test_prune_deletes_what_outlived_its_executions_step_by_step(self, store: Store) -> None:
        write(store, *(Heartbeat(process(f"p{number}")) for number in range(3)))
        write(store, *(PutPacket(f"packet{number}", "x", "text/plain") for number in range(3)))
        write(store, *(CreateBatch(f"b{number}", 1, "{}", (RunKey(f"k{number}", 1),)) for number in range(3)))
        write(store, *(Ingested(f"segment{number}", 7) for number in range(3)))
        for table in set(TABLES) - {"execution", "run_lane"}:  # lanes have rows where two can open at once
            (first,) = write(store, Prune(2**62, table, limit=2))
            assert isinstance(first, Pruned)
            assert (first.deleted, isinstance(first.last, str)) == (2, True)
            assert write(store, Prune(2**62, table, first.last, limit=2), Prune(2**62, table)) == [
                Pruned(1, f"{first.last}"[:-1] + "2"),
                Pruned(0, None),
            ]
