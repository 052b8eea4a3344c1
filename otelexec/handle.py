"""
The handle of an execution: what the code that runs in it may ask, and what it may tell.

All of it is kept on the `RunningExecution` behind the handle.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from typing import TYPE_CHECKING, Any, Literal
from weakref import ref

from otelexec import context
from otelexec.running import RunningExecution

if TYPE_CHECKING:
    from otelexec.correlation import Correlation

logger = logging.getLogger("otelexec.execution")


class Execution:
    """The execution that runs here, for the code that runs in it."""

    __slots__ = ("__weakref__", "_execution")

    def __init__(self, execution: RunningExecution) -> None:
        self._execution = execution

    def __bool__(self) -> Literal[True]:
        """Give True: this is an execution."""
        return True

    def __repr__(self) -> str:
        return f"<Execution {self.name} {self.id} attempt {self.attempt}>"

    # What the code in it may ask

    @property
    def id(self) -> str:
        """The execution id."""
        return self._execution.id

    @property
    def name(self) -> str:
        """Its name."""
        return self._execution.name

    @property
    def correlation(self) -> Correlation:
        """Who asked for it."""
        return self._execution.correlation

    @property
    def attempt(self) -> int:
        """The attempt's number, from 1. While the store is away it is not known, and 1."""
        return self._execution.number or 1

    @property
    def deadline(self) -> float | None:
        """When it should be done, in seconds since 1970; None without a timeout."""
        deadline = self._execution.deadline_unix_ns
        return None if deadline is None else deadline / 1e9

    @property
    def cancel_requested(self) -> bool:
        """Whether somebody asked for the execution to be cancelled."""
        return self._execution.cancel_requested

    @property
    def snapshot(self) -> Any:
        """What the paused attempt before this one left; None when there is nothing."""
        text = self._execution.snapshot
        return None if text is None else json.loads(text)

    # What it may tell

    def progress(self, message: str, *, done: float | None = None, total: float | None = None) -> None:
        """
        Say how far it is. The last marker stands on the record, also when the process dies.

        Args:
            message: What is being done; cut to `max_error_chars`, since the span of a lost attempt carries it.
            done: How much of it; None, or no finite number, when that can't be said.
            total: Of how much; likewise.
        """
        execution = self._execution
        if _is_closed(execution, "progress"):
            return
        text = str(message)[: execution.runtime.settings.max_error_chars]
        marker = {"message": text, "done": _finite(done), "total": _finite(total), "at_unix_ns": time.time_ns()}
        execution.progress_marker = _json({key: value for key, value in marker.items() if value is not None})
        execution.runtime.progressed(execution)

    def set_output(self, value: Any) -> None:
        """
        Keep a result on the record.

        Args:
            value: Anything that JSON can hold; other objects are kept as their text. Over `max_output_bytes` of JSON it
                is not kept, and a WARNING says so. Around a core, what its own handle is told counts, of output and progress.
        """
        execution = self._execution
        if _is_closed(execution, "set_output"):
            return
        text = _json(value)
        limit = execution.options.max_output_bytes
        if len(text.encode("utf-8", "replace")) > (execution.runtime.settings.max_output_bytes if limit is None else limit):
            logger.warning("otelexec.output.dropped: %s gave %d characters of output", execution.name, len(text))
            return
        execution.output = text

    def pause(self, reason: str, *, snapshot: Any = None) -> None:
        """
        End this attempt as `paused` once the code returns; a resume is a new attempt at the same execution.

        Args:
            reason: Why; the classification of the attempt.
            snapshot: What the next attempt finds in `.snapshot`: anything that JSON can hold. What can't be stored
                fails the attempt, since a pause that can't be resumed would look like one that can.
        """
        execution = self._execution
        if _is_closed(execution, "pause"):
            return
        execution.pause_reason = str(reason)
        execution.snapshot_error = None
        if snapshot is None:
            return
        try:
            text = json.dumps(snapshot, separators=(",", ":"), allow_nan=False)
            text.encode("utf-8")
        except (TypeError, ValueError, RecursionError) as error:
            execution.snapshot_error = f"the snapshot can't be stored as JSON: {error}"
            return
        if len(text) > execution.runtime.settings.max_output_bytes:
            execution.snapshot_error = f"the snapshot has {len(text)} bytes, more than max_output_bytes"
            return
        execution.snapshot = text


class NoExecution:
    """What `current_execution()` gives outside any execution: false, without an id, and its methods do nothing."""

    __slots__ = ()

    id: None = None
    name: None = None
    attempt: None = None
    correlation: None = None
    deadline: None = None
    snapshot: None = None
    cancel_requested: bool = False

    def __bool__(self) -> Literal[False]:
        """Give False: there is no execution."""
        return False

    def progress(self, message: str, *, done: float | None = None, total: float | None = None) -> None:
        """Do nothing."""

    def set_output(self, value: Any) -> None:
        """Do nothing."""

    def pause(self, reason: str, *, snapshot: Any = None) -> None:
        """Do nothing."""


_NO_EXECUTION = NoExecution()


def current_execution() -> Execution | NoExecution:
    """Give the execution that this code runs in; outside any, a handle that is false and does nothing."""
    found = context.current_execution()
    return handle_of(found) if isinstance(found, RunningExecution) else _NO_EXECUTION


def handle_of(execution: RunningExecution) -> Execution:
    """Give the handle of an execution: the same one as long as anybody holds it."""
    handle = None if execution.handle is None else execution.handle()
    if handle is None:
        handle = Execution(execution)
        # Weakly: a cycle would leave every execution to the garbage collector.
        execution.handle = ref(handle)
    return handle


def _is_closed(execution: RunningExecution, what: str) -> bool:
    if execution.pid != os.getpid():
        execution.warn_inherited(what)
    return not execution.is_open


def _finite(number: float | None) -> float | None:
    return None if isinstance(number, float) and not math.isfinite(number) else number


def _json(value: Any) -> str:
    # The objects' own methods may raise anything.
    with contextlib.suppress(Exception):
        return json.dumps(value, separators=(",", ":"), default=str, allow_nan=False)
    with contextlib.suppress(Exception):
        return json.dumps(repr(value))
    return json.dumps(f"<its text could not be made: {type(value).__name__}>")
