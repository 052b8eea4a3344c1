"""`otelexec migrate`: make a PostgreSQL store or bring it up to date, and move a SQLite store over."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from otelexec.cli import console, options
from otelexec.cli.progress import Advance
from otelexec.reconcile import take_in
from otelexec.runtime import open_store
from otelexec.store.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from otelexec.store.base import Store
    from otelexec.store.postgres import PostgresStore


def migrate(
    *,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="URL", help="Move everything from this SQLite store, `sqlite:///PATH`.", show_default=False),
    ] = None,
    store: options.StoreOption = None,
) -> None:
    """
    Make the store or bring its schema up to this version; with --from, move a SQLite store into it.

    Workers do the first by themselves where their role may; run it as the owner of the schema where it may not. A move needs every
    process that uses the SQLite store to have been stopped. Its spool is taken in first; the file is renamed when all has arrived.
    Killed in the middle, it may be run again.
    """
    settings = options.load(store=store)
    target = open_store(settings)
    if target is None:
        raise AssertionError("load() lets no `none` through")
    try:
        target.ingested("")  # the first session makes the schema
        if source is None:
            console.say(f"{target.url} has schema {SCHEMA_VERSION}.")
            return
        _move(source, target)
    finally:
        target.close()


def _move(source: str, target: Store) -> None:
    from otelexec.store.sqlite import SqliteStore

    settings = options.load(store=source)
    if not settings.store.startswith("sqlite:///"):
        raise options.Failure("--from: must be sqlite:///PATH", 2)
    if isinstance(target, SqliteStore):
        raise options.Failure("--from: goes into a PostgreSQL store only; name it with --store postgresql://...", 2)
    from otelexec.store.moving import move

    old = SqliteStore(Path(settings.store.removeprefix("sqlite:///")), create=False)
    try:
        spool = options.spool_of(settings, old)
        take_in(old, spool)
        if spool.left:
            raise options.Failure(f"{spool.folder} holds records that only a newer otelexec can read; nothing was moved")
        with Advance("Moving", "rows") as advance:
            moved = move(old, cast("PostgresStore", target), advanced=advance.add)
    finally:
        old.close()
    if not moved.rows:
        console.say(f"{old.url} had been moved before; the file is now {moved.aside}.")
        return
    console.say(f"Moved {console.plural(moved.rows['execution'], 'execution')} to {target.url}; the file is now {moved.aside}.")
    if moved.left:
        console.complain(f"{console.plural(moved.left, 'execution')} were there already and stay as they were", kind="note")
