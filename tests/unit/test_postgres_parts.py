"""The parts of the PostgreSQL store that need no server: its URL, packed writes, and what it keeps of its last commits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from otelexec import settings as _settings
from otelexec.errors import SettingsError
from otelexec.runtime import open_store
from otelexec.store.postgres import PostgresStore
from otelexec.store.postgres_packing import Packed, stretches
from otelexec.store.postgres_pool import Place
from otelexec.store.postgres_tail import MAX_KEPT, Tail
from otelexec.store.rows import Frozen, Outcome
from otelexec.store.writes import AddSpans, CloseAttempt, OpenAttempt, RecordQueued
from otelexec.testing.rows import closing, execution, opening, span


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:s3cret@db.example:5433/jobs", "postgresql://me@db.example:5433/jobs"),
        ("postgres://db.example/jobs?user=me&password=s3cret&sslmode=require", "postgresql://me@db.example/jobs"),
        ("postgresql://me:s3cret@one,two:5433/jobs", "postgresql://me@/jobs?host=one%2Ctwo&port=%2C5433"),
        ("postgresql://me@/jobs?host=/run/postgresql&sslpassword=s3cret", "postgresql://me@/jobs?host=%2Frun%2Fpostgresql"),
        ("postgresql://me:s3cret@[::1]:5433/jobs", "postgresql://me@[::1]:5433/jobs"),
        ("postgresql://me:a[s3cret]b@db/jobs", "postgresql://me@db/jobs"),
        ("postgresql://", "postgresql:///"),
    ],
)
def test_a_shown_url_has_no_password_and_leads_to_the_same_place(url: str, shown: str) -> None:
    place = Place(url, writes=True)
    assert place.shown == shown
    assert "s3cret" not in place.shown
    assert Place(place.shown, writes=True).key == place.key


def test_of_several_hosts_a_writer_takes_one_that_can_be_written() -> None:
    assert "target_session_attrs=read-write" in Place("postgresql://one,two/jobs", writes=True).conninfo
    assert "target_session_attrs" not in Place("postgresql://one,two/jobs", writes=False).conninfo
    assert "target_session_attrs" not in Place("postgresql://one/jobs", writes=True).conninfo
    assert "target_session_attrs=any" in Place("postgresql://one,two/jobs?target_session_attrs=any", writes=True).conninfo


def test_a_wrong_url_is_one_line_without_any_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTELEXEC_STORE", "postgresql://me:s3%cret@db/jobs")
    with pytest.raises(SettingsError, match="percent-encoded") as caught:
        open_store(_settings.load())
    assert "cret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_settings_don_t_show_the_store() -> None:
    assert "s3cret" not in repr(_settings.load(store="postgresql://me:s3cret@db/jobs"))


def test_each_database_has_a_spool_of_its_own_whoever_logs_in(tmp_path: Path) -> None:
    mine, theirs, other = (
        PostgresStore(url).spool_folder for url in ("postgresql://a:b@db/jobs", "postgresql://c@db/jobs", "postgresql://a:b@db/else")
    )
    assert mine == theirs != other
    assert mine.is_relative_to(tmp_path)


def test_a_database_that_the_url_leaves_to_libpq_has_a_spool_of_its_own_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(url: str, **environ: str) -> str:
        with monkeypatch.context() as patch:
            for name in ("PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGSERVICE", "PGUSER"):
                patch.delenv(name, raising=False)
            for name, value in environ.items():
                patch.setenv(name, value)
            return Place(url, writes=True).key

    assert key("postgresql://alice@db") == key("postgresql://bob@db/alice") == key("postgresql://db", PGUSER="alice")
    assert key("postgresql://alice@db") != key("postgresql://bob@db")
    assert key("postgresql://a@db", PGDATABASE="jobs") == key("postgresql://a@db/jobs") == key("postgresql://a@/jobs", PGHOST="db")
    assert key("postgresql://a@db/jobs", PGDATABASE="else", PGHOST="elsewhere") == key("postgresql://a@db/jobs")
    assert key("postgresql://a@/jobs", PGHOST="one") != key("postgresql://a@/jobs", PGHOST="two")


def test_writes_for_one_execution_keep_their_order() -> None:
    first, second = opening("a", "one"), opening("b", "one")
    assert stretches([first, opening("c", "two"), closing(first), AddSpans(b"x", 1)]) == [(True, [0, 1, 2, 3])]
    assert stretches([first, closing(first), second, closing(second)]) == [(True, [0, 1]), (True, [2, 3])]
    assert stretches([closing(first), first]) == [(True, [0]), (True, [1])]
    assert stretches([first, closing(second)]) == [(True, [0]), (True, [1])]
    assert stretches([first, AddSpans(b"x", 1, execution_id="one"), closing(first)]) == [(True, [0]), (True, [1]), (True, [2])]
    assert stretches([first, opening("c", "two", takes_over=True), closing(first)]) == [(True, [0]), (False, [1]), (True, [2])]
    assert stretches([opening(takes_over=True)]) == [(False, [0])]
    assert stretches([opening("a", "one"), opening("b", "two")]) == [(True, [0, 1])]


def test_a_nul_is_replaced_and_a_written_backslash_is_not() -> None:
    outcome = Outcome("failed", 1, error_message="a\0b\\u0000c\\\0", output=json.dumps("\0"))
    close = CloseAttempt(opening(), 1, Frozen(outcome, b""), "n")
    _, parameters = Packed([close, opening("b", "two")], [0, 1]).statement(durable=True, server=0)
    [row] = json.loads(parameters[3] or b"")
    assert row["em"] == "a\ufffdb\\u0000c\\\ufffd"
    assert json.loads(row["ou"]) == "\0"
    _, parameters = Packed([close], [0]).statement(durable=True, server=0)
    assert row["em"].encode() in parameters


def test_what_is_kept_is_what_no_commit_with_fsync_has_followed() -> None:
    tail = Tail()
    first, second = opening("a", "a"), RecordQueued(execution("b"), span("s"), "p", 1)
    tail.committed([first], tail.mark(), durable=False)
    durable = tail.mark()
    tail.committed([second], tail.mark(), durable=False)
    tail.committed([], durable, durable=True)
    [kept] = tail.writes()
    assert isinstance(kept, RecordQueued)
    assert kept.repeated
    tail.committed([closing(first)], tail.mark(), durable=True)
    assert tail.writes() == []


def test_what_is_kept_is_bounded_in_number_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("otelexec.store.postgres_tail.time.monotonic", lambda: now[0])
    tail = Tail()
    tail.keep_for(0.5)
    for number in range(MAX_KEPT + 10):
        tail.committed([opening(f"t{number}")], tail.mark(), durable=False)
    assert len(tail.writes()) == MAX_KEPT
    now[0] += 3.1
    tail.committed([opening("last")], tail.mark(), durable=False)
    [kept] = tail.writes()
    assert isinstance(kept, OpenAttempt)
    assert (kept.token, kept.repeated) == ("last", True)
