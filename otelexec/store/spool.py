"""
The spool: a folder of append-only files for writes that the store could not take.

Each process appends to segments of its own, one JSON line a write, under the segment's lock. Whoever takes segments in
holds the folder's lock, and the lock of the one that it reads: a process that finds its segment locked starts another
one, so that no execution waits for an ingestion. How far a segment was taken in is committed in the same transaction,
so that one that is read twice is written once. A closed execution is fsynced here; all else survives the process.

During a deployment processes of two versions may share a spool. What only a newer one can read stays for it, with all
that follows it in the segment.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import stat
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from otelexec.clock import monotonic
from otelexec.store import rows, writes
from otelexec.store.rows import ProcessRow
from otelexec.store.writes import Ingested, Write

logger = logging.getLogger("otelexec.spool")

SUFFIX = ".jsonl"
PATIENCE_SECONDS = 2.0
"""How long an ingestion waits for another one. What it leaves behind is taken in by whoever comes next."""

_POLL_SECONDS = 0.02
_GROUP = 200
_MAX_SEGMENT_BYTES = 8 * 1024 * 1024  # whoever takes a segment in has it in memory

_ROWS = {
    cls.__name__: cls
    for cls in (
        writes.AddSpans,
        writes.AmendAttempt,
        writes.CloseAttempt,
        writes.CloseOuter,
        writes.Contribute,
        rows.ExecutionRow,
        rows.Frozen,
        writes.Heartbeat,
        writes.NameMessage,
        writes.OpenAttempt,
        rows.Outcome,
        rows.ProcessRow,
        writes.ReadContributions,  # a question, which earlier versions kept as well
        writes.RecordObserved,
        writes.RecordProgress,
        writes.RecordQueued,
        writes.RefuseQueued,
        writes.RequestCancel,
        rows.Cancellation,
        rows.SpanRow,
    )
}


def encode(write: Write) -> str:
    """
    Give a write as one line of JSON.

    Also what a CRITICAL log line holds, so that a record can be put back by hand.
    """
    return json.dumps(_plain(write), separators=(",", ":"))


def log_homeless(own: logging.Logger, line: str, error: Exception) -> None:
    """Put a write that has no other place left into one CRITICAL log line."""
    # `logging.config` disables the loggers that are there already, unless it is told not to.
    last = logging.getLogger() if own.disabled else own
    last.critical('{"otelexec.record.homeless": %s, "record": %s}', json.dumps(str(error)), line)


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


class UnknownWrite(ValueError):
    """A line holds a write that only a newer version knows."""


def decode(line: str) -> Write:
    """
    Give back a write from its line.

    Raises:
        UnknownWrite: It is one of a newer version.
        ValueError: It is none.
    """
    try:
        write: Write = _row(json.loads(line))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a write: {error}") from error
    if not isinstance(write, Write):
        raise ValueError(f"not a write: {type(write).__name__}")  # noqa: TRY004 (it is the line's fault, not the caller's)
    return write


def _row(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_row(item) for item in value)
    if not isinstance(value, dict):
        return value
    name = value.pop("_")
    if name == "b":
        return base64.b64decode(value["v"])
    if name not in _ROWS:
        raise UnknownWrite(name)
    fields = {key: _row(item) for key, item in value.items()}
    try:
        return _ROWS[name](**fields)
    except TypeError as error:  # it has a field more
        raise UnknownWrite(str(error)) from error


class Spool:
    """
    This process's way into the spool.

    Args:
        folder: The folder; made when first needed, for its owner only.
        process: Gives the row of this process, which goes first in every segment.

    Attributes:
        left: Who wrote the segments that the last ingestion left, since only a newer otelexec can read them: process ids, each with
            pid and start time of its parent, which may have opened what is closed there.
    """

    def __init__(self, folder: Path, process: Callable[[], ProcessRow]) -> None:
        self.folder = folder
        self._process = process
        self._lock = threading.RLock()
        self._own: list[Path] = []
        self._sealed = False
        self._said: set[Path] = set()
        self.left: dict[str, tuple[int, int]] = {}

    def append(self, write: Write, *, durable: bool) -> None:
        """
        Append a write to this process's segment.

        Args:
            write: What to keep.
            durable: Whether to fsync it.

        Raises:
            OSError: It could not be kept here either.
            TypeError: Nobody could read it back, and all behind it would wait for a newer version.
        """
        if type(write).__name__ not in _ROWS:
            raise TypeError(f"the spool holds no {type(write).__name__}")
        line = _frame(encode(write))
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Reentrant: the garbage collector or a signal handler may append in the middle of another append of this
        # thread; the segment's lock then sends it to a new one.
        with self._lock, self._segment() as descriptor:
            start = os.fstat(descriptor).st_size
            data = line if start else _frame(encode(writes.Heartbeat(self._process()))) + line
            # A segment is as old as its last line, and a wish must be in before another process's end that it is about.
            self._sealed = isinstance(write, writes.RequestCancel)
            try:
                _write_all(descriptor, data)
                if durable:
                    os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, start)
                raise

    @contextlib.contextmanager
    def _segment(self) -> Iterator[int]:
        """Give a segment of this process under its lock; the newest one, unless it is full or being taken in."""
        fresh = False
        while True:
            new = fresh or self._sealed or not self._own or not self._own[-1].exists()
            if new:
                # A name that was never used: how far a segment was taken in is remembered by name.
                path = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"
                self._own = [*(known for known in self._own if known.exists()), path]
            else:
                path = self._own[-1]
            fresh = True
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | (os.O_CREAT | os.O_EXCL if new else 0), 0o600)
            except FileNotFoundError:
                if new:
                    raise
                continue
            try:
                if _lock_now(descriptor) and _is_at(descriptor, path) and os.fstat(descriptor).st_size < _MAX_SEGMENT_BYTES:
                    yield descriptor
                    return
            finally:
                _let_go(descriptor)

    @property
    def filled(self) -> bool:
        """Tell whether what this process appended still waits here."""
        return any(path.exists() for path in self._own)

    def segments(self) -> list[Path]:
        """Give the segments in the folder, of every process. What is no file (a link, a pipe) is none: nobody here made it."""
        found: list[tuple[int, str, Path]] = []
        try:
            for path in self.folder.glob(f"*{SUFFIX}"):
                with contextlib.suppress(FileNotFoundError):  # taken in just now
                    status = path.lstat()
                    if stat.S_ISREG(status.st_mode):
                        found.append((status.st_mtime_ns, path.name, path))
        except OSError:
            return []
        return [path for _, _, path in sorted(found)]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """
        Hold the folder's lock: one takes in at a time.

        Raises:
            OSError: The folder can't be used, or somebody else holds the lock for longer than `PATIENCE_SECONDS`.
        """
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            _lock_soon(descriptor)
            yield
        finally:
            _let_go(descriptor)

    def ingest(self, commit: Callable[[Sequence[Write]], object], ingested: Callable[[str], int]) -> int:
        """
        Commit what waits here and delete what is in; see `left`.

        Args:
            commit: Commits writes in one durable transaction; what it raises ends the ingestion.
            ingested: Gives how far a segment is in the store already, in bytes.

        Returns:
            How many writes went in.

        Raises:
            OSError: A segment can't be read, or somebody else holds a lock for longer than `PATIENCE_SECONDS`; it stays.
        """
        if not self.folder.is_dir():
            return 0
        with self.locked():
            left: dict[str, tuple[int, int]] = {}
            count, refused = 0, None
            for path in self.segments():
                try:
                    count += self._take_in(path, commit, ingested, left)
                except PermissionError as error:  # another user's: what stands behind it is not to wait for it
                    text = "otelexec.spool.unreadable: %s is another user's; dead workers' attempts stay open until it is taken in"
                    self._say_once(path, logging.WARNING, text)
                    refused = error
            self.left = left
            if refused is not None:
                raise refused
            return count

    def _take_in(
        self, path: Path, commit: Callable[[Sequence[Write]], object], ingested: Callable[[str], int], left: dict[str, tuple[int, int]]
    ) -> int:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)  # neither where a link leads, nor waiting at a pipe
        except FileNotFoundError:
            return 0
        try:
            _lock_soon(descriptor)  # its process is in the middle of a line at most
            with open(descriptor, "rb", closefd=False) as segment:
                data = segment.read()
            if left and _writer_of(data)[0] in left:  # what it wrote before waits, so this does
                return 0
            done = ingested(path.name)
            count, whole = self._commit(path, data, done, commit)
            if whole:
                path.unlink()
            else:
                writer, parent = _writer_of(data)
                left[writer] = parent
        finally:
            _let_go(descriptor)
        return count

    def _commit(self, path: Path, data: bytes, done: int, commit: Callable[[Sequence[Write]], object]) -> tuple[int, bool]:
        """Commit what is not in yet; gives how many writes that were, and whether there is nothing behind them."""
        found: list[tuple[int, Write]] = []
        damaged: list[bytes] = []
        offset, whole = 0, True
        for line in data.splitlines(keepends=True):
            offset += len(line)
            try:
                write = decode(_unframe(line))
            except UnknownWrite as error:
                if offset > done:
                    text = "%s was written by a newer otelexec (%s) and stays until that takes it in, or this one is upgraded"
                    self._say_once(path, logging.ERROR, f"otelexec.spool.newer: {text}", error)
                    whole = False
                    break  # what follows may build on it, so the order stays
            except ValueError:
                damaged.append(line)
            else:
                if offset > done:
                    found.append((offset, write))
        if damaged:
            # The last line of a killed process may be torn: nobody was told that it was kept. Keep it for people.
            # All of them anew, and before anything is committed: this ingestion may be killed and repeated.
            aside = path.with_suffix(".damaged")
            aside.unlink(missing_ok=True)  # not written over: it may be a link that somebody put there
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                _write_all(descriptor, b"".join(damaged))
            finally:
                os.close(descriptor)
            logger.error("otelexec.spool.damaged: %d lines of %s could not be read and were set aside", len(damaged), path)
        for start in range(0, len(found), _GROUP):
            group = found[start : start + _GROUP]
            commit([*(write for _, write in group), Ingested(path.name, group[-1][0])])
        return len(found), whole

    def _say_once(self, path: Path, level: int, text: str, *arguments: object) -> None:
        if path not in self._said:
            self._said.add(path)
            logger.log(level, text, path, *arguments)


def _lock_now(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_soon(descriptor: int) -> None:
    # Whoever has the lock may be suspended, and must not keep others from their heartbeat and their end.
    deadline = monotonic() + PATIENCE_SECONDS
    while not _lock_now(descriptor):
        if monotonic() >= deadline:
            raise TimeoutError(errno.ETIMEDOUT, "another process has the lock of the spool")
        time.sleep(_POLL_SECONDS)


def _let_go(descriptor: int) -> None:
    # Closing alone is not enough: a child that another thread forked meanwhile has the same lock until it ends.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _frame(line: str) -> bytes:
    data = line.encode("utf-8")
    return b"%08x %s\n" % (zlib.crc32(data), data)


def _unframe(line: bytes) -> str:
    checksum, _, data = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(data):
        raise ValueError("torn")
    return data.decode("utf-8")


def _writer_of(data: bytes) -> tuple[str, tuple[int, int]]:
    """Give the process id of who wrote a segment, and its parent, whatever else its first line says; empty where that can't be told."""
    try:
        process = json.loads(_unframe(data.splitlines(keepends=True)[0]))["process"]
        return str(process["process_id"]), (process.get("parent_pid", 0), process.get("parent_start", 0))
    except (ValueError, LookupError, TypeError, AttributeError):
        return "", (0, 0)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
