"""
No statement of the PostgreSQL store grows with the tables: each finds its rows by an index, whatever the planner knows of them.

The plans are those of the very statements that the store runs, also inside its functions, as `auto_explain` logs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final

import pytest

from otelexec.store.base import Store
from otelexec.store.postgres import PostgresStore
from otelexec.store.pruning import TABLES
from otelexec.store.rows import FAILED, PAUSED, RUNNING, SUCCEEDED, Cancellation
from otelexec.store.upkeep import ClaimOutbox, Prune, ReleaseClaims, SettleOutbox
from otelexec.store.writes import AddSpans, Heartbeat, RecordProgress, RecordQueued, RefuseQueued, RequestCancel
from otelexec.testing.rows import closing, execution, frozen, losing, observing, opening, outer_closing, process, span, write
from tests.benchmarks.postgres_fill import EPOCH_NS, Rows, execution_id, fill, fill_undelivered
from tests.benchmarks.postgres_plans import Plan, Recorder, from_end_to_end
from tests.postgres_servers import Server
from tests.stores import connected

ROWS: Final = 20_000
WAITING: Final = 4_000

# Half of them run: indexes of what is open are as large as those of everything.
STATE: Final = f"""CASE WHEN i % 2000 = 3 THEN '{PAUSED}' WHEN i % 10 = 1 THEN '{FAILED}' WHEN i % 2 = 0 THEN '{RUNNING}'
    ELSE '{SUCCEEDED}' END"""

Work = Callable[[Store], object]


def _grow(url: str, *, analyzed: bool) -> None:
    with connected(url) as connection:
        for table in ("execution", "attempt", "outbox", "open_span"):
            connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)".encode())
        fill(connection, Rows(ROWS, STATE, "'p' || i % 20"))
        fill_undelivered(connection, WAITING, "a.process_id")
        if analyzed:
            connection.execute("ANALYZE")


@pytest.fixture(scope="module", params=["analyzed", "never analyzed"])
def grown(request: pytest.FixtureRequest, postgres: Server) -> Iterator[tuple[Recorder, Store]]:
    """Give a store with many rows of every kind, and what records its plans."""
    url = postgres.new_database()
    first = PostgresStore(url)
    write(first, *(Heartbeat(process(f"p{number}")) for number in range(20)))
    first.close()
    _grow(url, analyzed=request.param == "analyzed")
    recorder = Recorder(postgres, url)
    store = PostgresStore(url)
    store.now_unix_ns()
    yield recorder, store
    store.close()
    postgres.drop_database(url)


def _plans(grown: tuple[Recorder, Store], work: Work) -> list[Plan]:
    recorder, store = grown
    with recorder.recorded() as plans:
        work(store)
    assert plans, "the server logged no plan"
    assert [line for line in from_end_to_end(plans) if "schema_version" not in line] == []
    return plans


READINGS: Final[dict[str, Work]] = {
    "the newest": lambda store: list(store.executions(limit=50)),
    "from the middle on": lambda store: list(store.executions(limit=50, before=ROWS // 2)),
    "that succeeded": lambda store: list(store.executions(limit=50, state=SUCCEEDED)),
    "that failed": lambda store: list(store.executions(limit=50, state=FAILED)),
    "that failed, from the middle on": lambda store: list(store.executions(limit=50, before=ROWS // 2, state=FAILED)),
    "of a rare state": lambda store: list(store.executions(limit=50, state=PAUSED)),
    "of a state that none is in": lambda store: list(store.executions(limit=50, state="timed_out")),
    "by its id": lambda store: store.execution(execution_id(77)),
    "by the beginning of its id": lambda store: store.ids_with_prefix(execution_id(77)[:-1], limit=4),
    "the processes at work": lambda store: store.processes(),
    "what a process has open": lambda store: store.open_work(["p3"], limit=100),
    "cancellations": lambda store: store.cancellations([execution_id(number) for number in range(1, 100)]),
}


@pytest.mark.parametrize("name", READINGS)
def test_what_is_read_is_found_by_an_index(grown: tuple[Recorder, Store], name: str) -> None:
    plans = _plans(grown, READINGS[name])
    assert max(scan.rows for plan in plans for scan in plan.scans) <= 1_000


def _spans(execution_id: str, name: str) -> AddSpans:
    recorded, opened = ((span(f"r{name}"), b"recorded"),), (span(f"o{name}"),)
    return AddSpans(b"plain", 1, recorded, opened, "p1", execution_id, last_end_unix_ns=5, nonce=f"n{name}")


def _lone_writes(store: Store) -> None:
    one, two, three = (opening(f"t{name}", f"x{name}", process_id="p1") for name in ("one", "two", "three"))
    write(store, one)
    write(store, closing(one))
    write(store, closing(one))  # it lost the race
    write(store, two)
    write(store, RecordProgress("xtwo", "ttwo", "{}"))
    write(store, RequestCancel("xtwo", Cancellation(5, terminate=True)))
    write(store, closing(two, FAILED, retrying=True, if_asked=True))
    write(store, opening("again", "xtwo", process_id="p1"))
    write(store, three)
    write(store, losing(three))
    write(store, observing(three))
    write(store, RecordQueued(execution("xqueued"), span("queued"), "p1", 5))
    write(store, RefuseQueued("xqueued", frozen("rejected", b"").outcome))
    write(store, _spans("xthree", "lone"))


def _takeover(store: Store) -> None:
    write(store, opening("core", "xouter", process_id="p1"))
    core = opening("core", "xouter", process_id="p1", outer_token="outer", takes_over=True)
    write(store, core)
    write(store, closing(core))
    write(store, outer_closing("outer", "xouter"))


def _groups(store: Store) -> None:
    attempts = [opening(f"g{number}", f"xg{number}", process_id="p1") for number in range(32)]
    write(store, *attempts)
    marks = [RecordProgress(f"xg{number}", f"g{number}", "{}") for number in range(32)]
    write(store, *marks)
    write(store, *(closing(each, SUCCEEDED if number % 2 else FAILED) for number, each in enumerate(attempts)))
    queued = [RecordQueued(execution(f"xq{number}"), span(f"q{number}"), "p1", 5) for number in range(32)]
    write(store, *queued)
    write(store, *(_spans(f"xg{number}", f"group{number}") for number in range(32)))


def _spooled(store: Store) -> None:
    opens = [replace(opening(f"s{number}", f"xs{number}", process_id="p1"), repeated=True) for number in range(32)]
    queued = [RecordQueued(execution(f"xt{number}"), span(f"u{number}"), "p1", 5, repeated=True) for number in range(32)]
    write(store, *opens[:16], *queued[:16])
    write(store, *opens, *queued, *map(closing, opens))


def _relay(store: Store) -> None:
    (claimed,) = write(store, ClaimOutbox("relay", 60.0, max_rows=100))
    assert isinstance(claimed, list)
    ids = [row.id for row in claimed]
    assert len(ids) == 100
    write(
        store, SettleOutbox("relay", delivered=ids[:80], released=ids[80:90], failed=ids[90:98], parked=[(ids[98], "no"), (ids[99], "no")])
    )
    write(store, ClaimOutbox("relay", 60.0, max_rows=100, not_after=ids[99]))
    write(store, ReleaseClaims(["relay"]))


WRITINGS: Final[dict[str, Work]] = {
    "one by one": _lone_writes,
    "a takeover": _takeover,
    "in groups": _groups,
    "from the spool": _spooled,
    "a relay's": _relay,
    "a heartbeat": lambda store: write(store, Heartbeat(process("p1"))),
    "a step of prune": lambda store: write(store, *(Prune(EPOCH_NS + ROWS // 4 * 1_000_000, table, limit=100) for table in TABLES)),
}


@pytest.mark.parametrize("name", WRITINGS)
def test_what_is_written_is_found_by_an_index(grown: tuple[Recorder, Store], name: str) -> None:
    _plans(grown, WRITINGS[name])


def test_a_plan_made_while_the_tables_were_empty_still_finds_its_rows_by_an_index(postgres: Server) -> None:
    """The server keeps the plans of a function as long as the session; nothing analyzes the tables meanwhile."""
    url = postgres.new_database()
    recorder = Recorder(postgres, url)
    store = PostgresStore(url)
    writings: Sequence[Work] = (_lone_writes, _takeover, _groups)
    for work in writings:
        work(store)
    _grow(url, analyzed=False)

    def again(store: Store) -> None:
        attempts = [opening(f"a{number}", f"y{number}", process_id="p1") for number in range(40)]
        for each in attempts[:4]:
            write(store, each)
        write(store, *attempts[4:])
        for each in attempts[:4]:
            write(store, closing(each))
        write(store, *(closing(each) for each in attempts[4:]))
        write(store, *(_spans("y1", f"again{number}") for number in range(8)))
        write(store, *(RecordProgress(f"y{number}", f"a{number}", "{}") for number in range(8)))

    plans = _plans((recorder, store), again)
    assert max(scan.rows for plan in plans for scan in plan.scans) <= 40
    store.close()
    postgres.drop_database(url)


def test_claims_stay_cheap_while_a_hundred_thousand_rows_go_through(postgres: Server) -> None:
    """Deleted rows stay in table and indexes until a vacuum; no claim may wade through all of them again and again."""
    url = postgres.new_database()
    store = PostgresStore(url)
    store.now_unix_ns()
    with connected(url) as connection:
        for table in ("outbox", "claim"):
            connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)".encode())
        connection.execute(
            """INSERT INTO outbox (request, count, execution_id, written_unix_ns)
               SELECT decode(repeat('00', 200), 'hex'), 1, 'e' || i, i FROM generate_series(1, 100000) i"""
        )
    recorder = Recorder(postgres, url)
    looking = PostgresStore(url)
    looking.now_unix_ns()
    touched = []
    for turn in range(200):
        if turn % 50:
            _through(store)
            continue
        with recorder.recorded() as plans:
            _through(looking)
        touched.append(sum(plan.buffers for plan in plans))
    assert store.outbox_rows() == 100_000 - 200 * 500
    # By then 75,000 rows lie dead in front of the first that lives: their index entries are marked dead by whoever met them first.
    assert touched[-1] < 3 * touched[0] + 500, touched
    looking.close()
    store.close()
    postgres.drop_database(url)


def _through(store: Store) -> None:
    (claimed,) = write(store, ClaimOutbox("relay", 60.0, max_rows=500))
    assert isinstance(claimed, list)
    write(store, SettleOutbox("relay", delivered=[row.id for row in claimed]))
