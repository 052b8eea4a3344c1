"""`otelexec prune`: delete old executions."""

from __future__ import annotations

import re
import time
from collections import Counter
from typing import Annotated, Final

import typer

from otelexec.cli import console, options
from otelexec.cli.progress import Advance
from otelexec.errors import StoreError
from otelexec.store.pruning import deletions
from otelexec.store.upkeep import Prune, Pruned

_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_MOST_SECONDS: Final = 100 * 366 * 86_400


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

    What is still open stays, and so does every execution with spans that were not delivered. Workers go on meanwhile. The
    file does not shrink; its free pages are used again.
    """
    age = parse_duration(older_than)
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


def parse_duration(text: str) -> float:
    """
    Read a duration like `30d` or `1.5h` and give its seconds.

    Raises:
        Failure: It is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*", text, re.ASCII)
    seconds = float(match[1]) * _UNITS[match[2]] if match else -1.0
    if not 0 <= seconds <= _MOST_SECONDS:
        raise options.Failure(f"--older-than: must be a number and a unit like 90m, 12h, 30d or 4w, not {text!r}", 2)
    return seconds
