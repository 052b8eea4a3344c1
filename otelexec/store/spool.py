"""
The spool: a folder of append-only files for writes that the store could not take.

Each process appends to a segment of its own, one JSON line a write, under the folder's lock. Whoever takes a segment in
commits, in the same transaction, how far it got, so that a segment that is read twice is written once. A closed
execution is fsynced here; everything else survives the process.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from otelexec.store import base
from otelexec.store.base import Ingested, ProcessRow, Write

logger = logging.getLogger("otelexec.spool")

SUFFIX = ".jsonl"
_GROUP = 200

_ROWS = {
    cls.__name__: cls
    for cls in (
        base.AddSpans,
        base.CloseAttempt,
        base.CloseOuter,
        base.ExecutionRow,
        base.Frozen,
        base.Heartbeat,
        base.OpenAttempt,
        base.Outcome,
        base.ProcessRow,
        base.RecordObserved,
        base.RecordProgress,
        base.RecordQueued,
        base.RefuseQueued,
        base.RequestCancel,
        base.Cancellation,
        base.SpanRow,
    )
}


def encode(write: Write) -> str:
    """
    Give a write as one line of JSON.

    Also what a CRITICAL log line holds, so that a record can be put back by hand.
    """
    return json.dumps(_plain(write), separators=(",", ":"))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value) if getattr(value, item.name) != item.default
        }
        return {"_": type(value).__name__, **fields}
    if isinstance(value, bytes):
        return {"_": "b", "v": base64.b64encode(value).decode("ascii")}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def decode(line: str) -> Write:
    """
    Give back a write from its line.

    Raises:
        ValueError: The line is damaged.
    """
    try:
        write: Write = _row(json.loads(line))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a write: {error}") from error
    return write


def _row(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_row(item) for item in value)
    if not isinstance(value, dict):
        return value
    name = value.pop("_")
    if name == "b":
        return base64.b64decode(value["v"])
    return _ROWS[name](**{key: _row(item) for key, item in value.items()})


class Spool:
    """
    This process's way into the spool.

    Args:
        folder: The folder; made when first needed, for its owner only.
        process: Gives the row of this process, which goes first in every segment.
    """

    def __init__(self, folder: Path, process: Callable[[], ProcessRow]) -> None:
        self.folder = folder
        self._process = process
        self._segment: Path | None = None

    def append(self, write: Write, *, durable: bool) -> None:
        """
        Append a write to this process's segment.

        Args:
            write: What to keep.
            durable: Whether to fsync it.

        Raises:
            OSError: It could not be kept here either.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self.locked():
            if self._segment is None or not self._segment.exists():
                # A name that was never used: how far a segment was taken in is remembered by name.
                self._segment = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"
            descriptor = os.open(self._segment, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                start = os.fstat(descriptor).st_size
                lines = [] if start else [base.Heartbeat(self._process())]
                data = b"".join(_frame(encode(item)) for item in (*lines, write))
                try:
                    _write_all(descriptor, data)
                    if durable:
                        os.fsync(descriptor)
                except OSError:
                    with contextlib.suppress(OSError):
                        os.ftruncate(descriptor, start)
                    raise
            finally:
                os.close(descriptor)

    @property
    def filled(self) -> bool:
        """Tell whether what this process appended still waits here."""
        return self._segment is not None and self._segment.exists()

    def segments(self) -> list[Path]:
        """Give the segments in the folder, of every process."""
        try:
            return sorted(self.folder.glob(f"*{SUFFIX}"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        except OSError:
            return []

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """
        Hold the folder's lock.

        Raises:
            OSError: The folder can't be used.
        """
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def ingest(
        self, commit: Callable[[Sequence[Write]], object], ingested: Callable[[str], int], segments: Sequence[Path] | None = None
    ) -> int:
        """
        Commit what waits here and delete what is in.

        Args:
            commit: Commits writes in one durable transaction; what it raises ends the ingestion.
            ingested: Gives how far a segment is in the store already, in bytes.
            segments: Which ones; None means all.

        Returns:
            How many writes went in.

        Raises:
            OSError: A segment can't be read; it stays.
        """
        if not self.folder.is_dir():
            return 0
        with self.locked():
            return sum(self._take_in(path, commit, ingested) for path in (self.segments() if segments is None else segments))

    def _take_in(self, path: Path, commit: Callable[[Sequence[Write]], object], ingested: Callable[[str], int]) -> int:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return 0
        count = 0
        damaged: list[bytes] = []
        group: list[Write] = []
        offset = done = ingested(path.name)
        for line in data[done:].splitlines(keepends=True):
            offset += len(line)
            try:
                group.append(_unframe(line))
            except ValueError:
                damaged.append(line)
            if len(group) >= _GROUP:
                commit([*group, Ingested(path.name, offset)])
                count += len(group)
                group = []
        if damaged:
            # The last line of a killed process may be torn: nobody was told that it was kept. Keep it for people.
            with path.with_suffix(".damaged").open("ab") as aside:
                aside.writelines(damaged)
            logger.error("otelexec.spool.damaged: %d lines of %s could not be read and were set aside", len(damaged), path)
        if group:
            commit([*group, Ingested(path.name, offset)])
            count += len(group)
        path.unlink()
        return count


def _frame(line: str) -> bytes:
    data = line.encode("utf-8")
    return b"%08x %s\n" % (zlib.crc32(data), data)


def _unframe(line: bytes) -> Write:
    checksum, _, data = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(data):
        raise ValueError("torn")
    return decode(data.decode("utf-8"))


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
