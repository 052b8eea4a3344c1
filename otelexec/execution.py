"""
The handle of an execution, and how an ending is classified: pure data, no I/O.

What a handle is told (progress, output, pause) is kept on it; the runtime's background thread and the close of the
attempt write it down.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from opentelemetry import trace

from otelexec import context
from otelexec.endings import RETURNED, Classifier, Ending, describe, raised_by_signal_handler
from otelexec.errors import ExecutionCancelled, SettingsError
from otelexec.store.writes import (
    CANCELLED,
    FAILED,
    PAUSED,
    REJECTED,
    SUCCEEDED,
    TIMED_OUT,
    Cancellation,
    CloseAttempt,
    CloseOuter,
    OpenAttempt,
    Opened,
)
from otelexec.w3c import clean

if TYPE_CHECKING:
    from opentelemetry.trace import Link, Span

    from otelexec.correlation import Correlation
    from otelexec.runtime import Runtime

logger = logging.getLogger("otelexec.execution")

INTERRUPTED = "interrupted"

INTERRUPTIONS = (asyncio.CancelledError, KeyboardInterrupt, GeneratorExit, ExecutionCancelled)
"""What says that somebody wanted the code to end, not that it failed."""

_RUNNING = "running"
_MAX_UNIX_NS = 2**63 - 1  # of both stores' integers
_NOTHING: Mapping[str, Any] = {}

_warned: set[str] = set()


@dataclass(frozen=True, slots=True)
class Options:
    """
    The options of `execution()`.

    Attributes:
        name: Name of the execution and of its span.
        core: Whether this is the job itself, which takes over the attempt of the execution around it.
        timeout: Seconds after which a coroutine is stopped; for anything else a deadline to look at. None: no limit.
        kind: The span's kind.
        attributes: Further span attributes.
        link_carried: Link to the carried context instead of taking it as the parent; None means as in the settings.
        links: Further span links.
        classify: Knows exceptions that are not failures; None means the default for all.
        cancel_wins: Whether a cancellation that was asked for makes the attempt `cancelled` although the code returned or failed.
        finalized_by: Which path is named on the record.
        token: The attempt's fencing token, where another process knows it as well; None mints one.
        accepted: Whether a parent process may have opened the attempt under the token: then it becomes this one's.
        exclusive: Whether the code is called only if no other attempt of the execution runs, which the store decides: an
            attempt that it can't open there is none.
        takes_lapsed: Whether, with `exclusive`, a running attempt of a process whose lease has lapsed does not count.
        expected_attempts: With `exclusive`, how many attempts the execution had when the caller looked; the code is not called
            when there were more since. None: any number.
        max_output_bytes: Largest output in bytes of JSON; None means as in the settings.
        number: The attempt's number where the backend counts the attempts itself; the store's own count is never gone below.
            None: the store counts.

    Raises:
        SettingsError: The timeout is no number of seconds above 0.
    """

    name: str
    core: bool = False
    timeout: float | None = None
    kind: trace.SpanKind = trace.SpanKind.INTERNAL
    attributes: Mapping[str, Any] | None = None
    link_carried: bool | None = None
    links: tuple[Link, ...] = ()
    classify: Classifier | None = None
    cancel_wins: bool = False
    finalized_by: str = "executor"
    token: str | None = None
    accepted: bool = False
    exclusive: bool = False
    takes_lapsed: bool = False
    expected_attempts: int | None = None
    max_output_bytes: int | None = None
    number: int | None = None

    def __post_init__(self) -> None:
        """Refuse a timeout that is none; a name that UTF-8 can't hold is written as near as it can be."""
        timeout: Any = self.timeout
        if timeout is not None and not (isinstance(timeout, int | float) and timeout > 0):
            raise SettingsError(f"timeout must be more than 0 seconds, not {timeout!r}. Leave it out for no limit.")
        if timeout is not None and timeout > threading.TIMEOUT_MAX:
            object.__setattr__(self, "timeout", threading.TIMEOUT_MAX)  # 292 years: what a deadline in nanoseconds can hold
        object.__setattr__(self, "name", clean(str(self.name)))


class Execution:
    """
    The execution that runs here, for the code that runs in it.

    Attributes:
        name: Its name.
        correlation: Who asked for it.
    """

    __slots__ = (
        "_cancellation",
        "_core_before",
        "_core_claim",
        "_core_lock",
        "_core_state",
        "_output",
        "_paused",
        "_progress",
        "_rejected",
        "_retries_sent",
        "_runtime",
        "_snapshot",
        "_snapshot_error",
        "_stopped",
        "attempt_row",
        "children",
        "claim",
        "clock_started_ns",
        "closed",
        "closing",
        "correlation",
        "deadline_unix_ns",
        "duplicate",
        "ending",
        "name",
        "number",
        "options",
        "outer",
        "pid",
        "progress_due",
        "progress_written",
        "span",
        "span_ended",
        "start_attributes",
        "start_links",
        "started_unix_ns",
        "stop",
        "timed_out",
        "token",
    )

    attempt_row: OpenAttempt

    def __init__(self, runtime: Runtime, options: Options, correlation: Correlation, token: str, outer: Execution | None = None) -> None:
        self._runtime = runtime
        self.options = options
        self.name = options.name
        self.correlation = correlation
        self.token = token
        self.outer = outer
        self.claim: object = None
        self.pid = os.getpid()
        self.number: int | None = None
        self.duplicate = False
        self.span: Span = trace.INVALID_SPAN
        self.span_ended = False
        self.start_attributes: Mapping[str, Any] = _NOTHING
        self.start_links = 0
        self.started_unix_ns = time.time_ns()
        self.clock_started_ns = time.perf_counter_ns()
        self.deadline_unix_ns = None if options.timeout is None else min(self.started_unix_ns + int(options.timeout * 1e9), _MAX_UNIX_NS)
        self.children: deque[Any] = deque()
        self.closed = False
        self.closing: CloseAttempt | CloseOuter | None = None
        self.timed_out = False
        self.ending: Ending | None = None
        self.stop: Callable[[], None] | None = None
        self.progress_due = False
        self.progress_written = 0.0
        self._cancellation: Cancellation | None = None if outer is None else outer.cancellation
        self._progress: str | None = None
        self._output: str | None = None
        self._paused: str | None = None
        self._rejected: str | None = None
        self._snapshot: str | None = None if outer is None else outer.snapshot_text
        self._snapshot_error: str | None = None
        self._retries_sent = 0
        self._stopped = False
        self._core_lock = threading.Lock()
        self._core_state: str | None = None
        self._core_before: str | None = None
        self._core_claim: object = None

    def __bool__(self) -> bool:
        """Give True: this is an execution."""
        return True

    def __repr__(self) -> str:
        return f"<Execution {self.name} {self.id} attempt {self.attempt}>"

    # What the code in it may ask

    @property
    def id(self) -> str:
        """The execution id."""
        return self.correlation.execution_id

    @property
    def attempt(self) -> int:
        """The attempt's number, from 1. While the store is away it is not known, and 1."""
        return self.number or 1

    @property
    def deadline(self) -> float | None:
        """When it should be done, in seconds since 1970; None without a timeout."""
        deadline = self.deadline_unix_ns
        return None if deadline is None else deadline / 1e9

    @property
    def cancel_requested(self) -> bool:
        """Whether somebody asked for the execution to be cancelled."""
        return self._cancellation is not None

    @property
    def snapshot(self) -> Any:
        """What the paused attempt before this one left; None when there is nothing."""
        return None if self._snapshot is None else json.loads(self._snapshot)

    # What it may tell

    def progress(self, message: str, *, done: float | None = None, total: float | None = None) -> None:
        """
        Say how far it is. The last marker stands on the record, also when the process dies.

        Args:
            message: What is being done; cut to `max_error_chars`, since the span of a lost attempt carries it.
            done: How much of it; None, or no finite number, when that can't be said.
            total: Of how much; likewise.
        """
        if self._closed("progress"):
            return
        text = str(message)[: self.max_error_chars]
        marker = {"message": text, "done": _finite(done), "total": _finite(total), "at_unix_ns": time.time_ns()}
        self._progress = _json({key: value for key, value in marker.items() if value is not None})
        self._runtime.progressed(self)

    def set_output(self, value: Any) -> None:
        """
        Keep a result on the record.

        Args:
            value: Anything that JSON can hold; other objects are kept as their text. Over `max_output_bytes` of JSON it
                is not kept, and a WARNING says so. Around a core, what its own handle is told counts, of output and progress.
        """
        if self._closed("set_output"):
            return
        text = _json(value)
        limit = self.options.max_output_bytes
        if len(text.encode("utf-8", "replace")) > (self._runtime.settings.max_output_bytes if limit is None else limit):
            logger.warning("otelexec.output.dropped: %s gave %d characters of output", self.name, len(text))
            return
        self._output = text

    def pause(self, reason: str, *, snapshot: Any = None) -> None:
        """
        End this attempt as `paused` once the code returns; a resume is a new attempt at the same execution.

        Args:
            reason: Why; the classification of the attempt.
            snapshot: What the next attempt finds in `.snapshot`: anything that JSON can hold. What can't be stored
                fails the attempt, since a pause that can't be resumed would look like one that can.
        """
        if self._closed("pause"):
            return
        self._paused = str(reason)
        self._snapshot_error = None
        if snapshot is None:
            return
        try:
            text = json.dumps(snapshot, separators=(",", ":"), allow_nan=False)
            text.encode("utf-8")
        except (TypeError, ValueError, RecursionError) as error:
            self._snapshot_error = f"the snapshot can't be stored as JSON: {error}"
            return
        if len(text) > self._runtime.settings.max_output_bytes:
            self._snapshot_error = f"the snapshot has {len(text)} bytes, more than max_output_bytes"
            return
        self._snapshot = text

    # What the rest of otelexec asks

    def mark_retry_sent(self) -> None:
        """Note that a message for another attempt goes out."""
        self._retries_sent += 1

    def mark_retry_refused(self) -> None:
        """Note that the backend refused such a message after all."""
        self._retries_sent -= 1

    def reject(self, reason: str) -> None:
        """End this attempt as `rejected` once the code returns."""
        self._rejected = reason

    def cancelled_by(self, cancellation: Cancellation | None) -> None:
        """Learn that somebody asked for it to be cancelled."""
        if cancellation is None:
            return
        self._cancellation = cancellation
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Stop the code that runs in it if somebody wants that; once, since its cleanup is to go through."""
        wish, stop = self._cancellation, self.stop
        if wish is not None and wish.terminate and stop is not None and not self._stopped:
            self._stopped = True
            stop()

    def opened(self, answer: Opened) -> None:
        """Learn what the store says of its attempt."""
        self.number = answer.number
        self.duplicate = answer.duplicate
        self._snapshot = answer.snapshot or self._snapshot
        self.cancelled_by(answer.cancellation)

    @property
    def records(self) -> bool:
        """Whether it has a record, or is a span only."""
        return self._runtime.records

    @property
    def max_error_chars(self) -> int:
        """How many characters of an error's text are kept."""
        return self._runtime.settings.max_error_chars

    @property
    def is_open(self) -> bool:
        """Whether its attempt runs in this very process."""
        return not self.closed and self.pid == os.getpid()

    def enter_core(self, claim: object) -> Literal["takes_over", "next"] | None:
        """
        Decide, once and for all threads, what a core called in here is.

        Args:
            claim: Of the caller alone, for `release_core`.

        Returns:
            `takes_over` for the first, `next` (a further attempt) after one that did not succeed, None for a child:
            while another core runs, after one that succeeded, and inside a core.
        """
        if not self.is_open or self.outer is not None:
            return None
        with self._core_lock:
            before = self._core_state
            if before in (_RUNNING, SUCCEEDED):
                return None
            self._core_before, self._core_claim, self._core_state = before, claim, _RUNNING
            return "takes_over" if before is None else "next"

    def release_core(self, claim: object) -> None:
        """Be as before `enter_core`, if that was asked with this claim: the core did not begin."""
        if self._core_claim is claim:
            self._core_state, self._core_claim = self._core_before, None

    def leave_core(self, state: str) -> None:
        """Learn how the core in here ended."""
        self._core_state, self._core_claim = state, None

    @property
    def had_core(self) -> bool:
        """Whether a core took its attempt over."""
        return self._core_state is not None

    @property
    def cancellation(self) -> Cancellation | None:
        """The wish to cancel it, as far as it is known here."""
        return self._cancellation

    @property
    def snapshot_text(self) -> str | None:
        """The snapshot as JSON text."""
        return self._snapshot

    @property
    def progress_marker(self) -> str | None:
        """The last marker as JSON text."""
        return self._progress

    @property
    def output(self) -> str | None:
        """The output as JSON text."""
        return self._output

    @property
    def pause_snapshot(self) -> str | None:
        """What a pause leaves, as JSON text."""
        return self._snapshot if self._paused is not None else None

    def warn_inherited(self, what: str) -> None:
        """Say, once for each kind of call, that a forked child can't speak for its parent's execution."""
        if what not in _warned:
            _warned.add(what)
            logger.warning("otelexec.execution.inherited: %s() does nothing here: the execution is process %d's", what, self.pid)

    def _closed(self, what: str) -> bool:
        if self.pid != os.getpid():
            self.warn_inherited(what)
        return not self.is_open

    # Endings

    def classify(self, exception: BaseException | None) -> Ending:
        """
        Classify how the code ended.

        Args:
            exception: What it raised; None when it returned.
        """
        ending = self._returned() if exception is None else self._raised(exception)
        if self.options.cancel_wins and exception is not None and ending.state in (FAILED, TIMED_OUT):
            ending = replace(ending, state=CANCELLED) if self.cancel_requested else replace(ending, depends_on_cancellation=True)
        if self._retries_sent and ending.state not in (SUCCEEDED, PAUSED):
            ending = replace(ending, retrying=True)
        return ending

    def _returned(self) -> Ending:
        if self._paused is not None:
            if self._snapshot_error is not None:
                return Ending(FAILED, "snapshot_not_stored", "snapshot_not_stored", self._snapshot_error)
            return Ending(PAUSED, self._paused)
        if self._rejected is not None:
            return Ending(REJECTED, None, self._rejected, self._rejected)
        if self.options.cancel_wins:
            return Ending(CANCELLED) if self.cancel_requested else Ending(SUCCEEDED, depends_on_cancellation=True)
        return RETURNED

    def _raised(self, exception: BaseException) -> Ending:
        # What our own limit stopped is nobody else's to judge: a TimeoutError of the code's own looks the same.
        known = None if self.timed_out else self._known(exception)
        if known is not None and known.depends_on_cancellation and self.cancel_requested:
            return replace(known, state=CANCELLED, classification=None)
        if known is not None:
            return known
        error_type, message = describe(exception, self._runtime.settings.max_error_chars)
        if self.timed_out:
            return Ending(TIMED_OUT, None, "TimeoutError", f"stopped after its timeout of {self.options.timeout:g} s", exception)
        exits = isinstance(exception, SystemExit)
        stopped = exits and raised_by_signal_handler(exception)
        if stopped or isinstance(exception, INTERRUPTIONS):
            asked = self.cancel_requested
            return Ending(CANCELLED, None if asked else INTERRUPTED, error_type, message, depends_on_cancellation=not asked)
        if exits and getattr(exception, "code", None) in (None, 0):
            return Ending(SUCCEEDED)
        return Ending(FAILED, None, error_type, message, exception)

    def _known(self, exception: BaseException) -> Ending | None:
        """Ask the executor's own classifier, or a core's outer one; it may fail like any other code."""
        outer = self.outer.options.classify if self.outer is not None else None
        classify = self.options.classify or outer
        if classify is None:
            return None
        try:
            ending = classify(exception)
        except Exception as error:
            if raised_by_signal_handler(error):
                raise
            logger.exception("otelexec.execution.classify: %s", self.name)
            return None
        if ending is None or isinstance(ending, Ending):
            return ending
        logger.error("otelexec.execution.classify: %s: a classifier gives an Ending or None, not %r", self.name, ending)
        return None


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

    def __bool__(self) -> bool:
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
    return found if isinstance(found, Execution) else _NO_EXECUTION


def _finite(number: float | None) -> float | None:
    return None if isinstance(number, float) and not math.isfinite(number) else number


def _json(value: Any) -> str:
    # The objects' own methods may raise anything.
    with contextlib.suppress(Exception):
        return json.dumps(value, separators=(",", ":"), default=str, allow_nan=False)
    with contextlib.suppress(Exception):
        return json.dumps(repr(value))
    return json.dumps(f"<its text could not be made: {type(value).__name__}>")
