"""What every command prints with: the two consoles, log lines, and how times, sizes and texts from outside are written."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Mapping

STYLES: Final = {
    "succeeded": "green",
    "failed": "bold red",
    "timed_out": "bold red",
    "lost": "bold red",
    "rejected": "red",
    "cancelled": "yellow",
    "paused": "blue",
    "queued": "blue",
    "retrying": "magenta",
    "running": "cyan",
}
"""The colour of each state, here and in every other table of executions."""

PIPE_WIDTH: Final = 1_000
"""Columns of a pipe or a file, where nothing should be cut."""
_TRAILING: Final = re.compile(r" +(?=\n)")
_NS: Final = 1_000_000_000
_KIBI: Final = 1_024


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to `main`, so that every command ends the same way when its reader goes."""
        raise BrokenPipeError


class _Trimmed:
    """A pipe or a file, whose lines have no need of the blanks that fill a table up."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(_TRAILING.sub("", text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare() -> None:
    """Make the process fit for printing, whatever locale, streams and terminal it was started with."""
    if not is_open(sys.stderr):
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (for as long as the process runs)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # names and errors hold what not every encoding does
    if not os.environ.get("COLUMNS", "1").strip("0"):
        del os.environ["COLUMNS"]


def is_open(stream: object) -> bool:
    """Tell whether a standard stream was open when the process was started."""
    return stream is not None


def out() -> Console:
    """Give the console of results; in a pipe or a file nothing is cut to the width of a screen."""
    return _console(stderr=False)


def err() -> Console:
    """Give the console of everything that is no result: errors, warnings, progress."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        return _Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    width = None if os.environ.get("COLUMNS", "").isdigit() else PIPE_WIDTH
    trimmed: Any = _Trimmed(stream)
    return _Console(file=trimmed, stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def say(text: str) -> None:
    """Print one line of results, whatever the text holds."""
    out().print(Text(clean(text)), soft_wrap=True)


def complain(text: str, *, kind: str = "error") -> None:
    """Print one line on stderr, whatever the text holds."""
    line = Text.assemble((f"{kind}: ", "bold red" if kind == "error" else "bold yellow"), clean(text))
    err().print(line, soft_wrap=True)


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object in one line, in ASCII, so that no terminal or locale can damage it."""
    sys.stdout.write(json.dumps(value) + "\n")


def clean(text: str) -> str:
    """Make a text from outside harmless for a terminal and one line long: no escape sequences, no line breaks."""
    return "".join(character if character.isprintable() else " " for character in text.strip())


class _Lines(logging.Handler):
    """Writes what the library logs as readable lines; a running progress bar stays below them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.console: Console | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            kind = record.levelname.lower()
            style = "bold yellow" if record.levelno < logging.ERROR else "bold red"
            line = Text.assemble((f"{kind}: ", style), clean(record.getMessage()))
            if record.exc_info and record.exc_info[1] is not None:
                line.append(f" ({type(record.exc_info[1]).__name__}: {clean(str(record.exc_info[1]))})")
            (self.console or err()).print(line, soft_wrap=True)
        except Exception:
            self.handleError(record)


lines: Final = _Lines()


def log_to_stderr() -> None:
    """Show the library's warnings and errors on stderr."""
    logger = logging.getLogger("otelexec")
    if lines not in logger.handlers:
        logger.addHandler(lines)
        logger.propagate = False


def duration(nanoseconds: int) -> str:
    """Write a duration in at most 7 characters: `840 µs`, `12.3 ms`, `1.24 s`, `2m 03s`, `1h 02m`, `3d 04h`."""
    ns = max(0, nanoseconds)
    if ns < 1_000_000:  # noqa: PLR2004 (a millisecond)
        return f"{ns // 1_000} µs"
    if ns < _NS:
        return f"{ns / 1e6:.3g} ms" if ns < 999_500_000 else "1.00 s"  # noqa: PLR2004 (what would be rounded to 1e+03)
    if ns < 59_995_000_000:  # noqa: PLR2004 (what would be rounded to 60.0)
        return f"{ns / 1e9:.2f} s"
    seconds = round(ns / 1e9)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}h"
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {seconds:02}s"


def local_time(unix_ns: int | None, *, short: bool = False) -> str:
    """
    Write a moment in local time.

    Args:
        unix_ns: Nanoseconds since 1970; None gives an empty text.
        short: Without year and milliseconds; a moment of another year has its date only.
    """
    if unix_ns is None:
        return ""
    moment = time.localtime(unix_ns // _NS)
    if not short:
        return time.strftime("%Y-%m-%d %H:%M:%S", moment) + f".{unix_ns % _NS // 1_000_000:03} " + time.strftime("%z", moment)
    return time.strftime("%m-%d %H:%M:%S" if moment.tm_year == time.localtime().tm_year else "%Y-%m-%d", moment)


def size(count: int) -> str:
    """Write a number of bytes: `512 B`, `1.5 KiB`, `20.0 MiB`."""
    amount, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= _KIBI and len(units) > 1:
        amount /= _KIBI
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def plural(count: int, word: str, many: str | None = None) -> str:
    """Write a count with its word: `1 span`, `1,024 spans`."""
    return f"{count:,} {word if count == 1 else many or word + 's'}"
