"""How far a long command is: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Self

from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from otelexec.cli import console

if TYPE_CHECKING:
    from rich.progress import ProgressColumn, TaskID

NOTE_CHARS: Final = 60
PLAIN_SECONDS: Final = 5.0
"""Between two plain lines: a log file should not fill with them."""


class Advance:
    """
    Shows how far a command is, on stderr; the methods may be called from any thread.

    Args:
        doing: What it does: `Delivering`.
        unit: What is counted: `rows`.
        total: How many there are to do; None when nobody knows.
    """

    def __init__(self, doing: str, unit: str, total: int | None = None) -> None:
        self._doing = doing
        self._unit = unit
        self._total = total
        self._done = 0
        self._said = time.monotonic()
        console_ = console.err()
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        if console_.is_terminal:
            columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}", markup=False)]
            counts = [TextColumn("{task.completed:,}")] if total is None else [BarColumn(bar_width=None), MofNCompleteColumn()]
            columns += [*counts, TextColumn(unit), TimeElapsedColumn()]
            self._bar = Bar(*columns, console=console_, transient=True, expand=total is not None)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            console.lines.console = self._bar.console
            self._task = self._bar.add_task(self._doing, total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            console.lines.console = None
            self._bar.stop()

    def add(self, count: int, note: str = "") -> None:
        """Count what was done, and say what it waits for, if it does."""
        self._done += count
        if self._total is not None:
            self._total = max(self._total, self._done)
        note = console.clean(note)
        text = self._doing + (f" ({note if len(note) <= NOTE_CHARS else note[: NOTE_CHARS - 1] + '…'})" if note else "")
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, total=self._total, description=text)
        elif time.monotonic() - self._said >= PLAIN_SECONDS:
            self._said = time.monotonic()
            of = "" if self._total is None else f" of {self._total:,}"
            console.err().print(f"{text}: {self._done:,}{of} {self._unit}", soft_wrap=True)
