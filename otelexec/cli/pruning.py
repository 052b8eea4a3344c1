"""`otelexec prune`: delete old executions."""

from __future__ import annotations

import time
from collections import Counter
from typing import Annotated

import typer

from otelexec.cli import console, options
from otelexec.cli.progress import Advance
from otelexec.errors import StoreError
from otelexec.store.pruning import deletions
from otelexec.store.upkeep import Prune, Pruned


def prune(
    *,
    older_than: Annotated[
        str,
        typer.Option(metavar="DURATION", help="How long ago they must have ended: 90m, 12h, 30d, 4w (s, m, h, d, w).", show_default=False),
    ],
    store: options.StoreOption = None,
) -> None:
    """
    Delete executions that ended long ago, with their attempts.

    What is still open stays, and so does every execution with spans that were not delivered. Workers go on meanwhile. A
    SQLite file does not shrink; its free pages are used again.
    """
    age = options.duration("--older-than", older_than)
    settings = options.load(store=store)
    with options.opened(settings) as opened:
        before = opened.store.now_unix_ns() - int(age * 1e9)
        deleted: Counter[str] = Counter()

        def so_far() -> str:
            return console.plural(deleted["execution"], "execution")

        def step(write: Prune) -> Pruned:
            start = time.monotonic()
            try:
                [done] = opened.commit([write])
            except StoreError as error:
                raise options.Failure(f"deleted {so_far()}, then: {error}") from error
            if not isinstance(done, Pruned):
                raise options.Failure(f"deleted {so_far()}, then: {done}")
            time.sleep(time.monotonic() - start)  # workers get the store for as long as they had to wait for it
            return done

        with Advance("Deleting", "rows") as advance:
            for table, count in deletions(step, before):
                deleted[table] += count
                advance.add(count)
        others = deleted.total() - deleted["execution"]
        beside = f", and {console.plural(others, 'row')} of processes, keys and the like that nothing needs any more" if others else ""
        console.say(f"Deleted {so_far()} that ended before {console.local_time(before)}{beside}.")
