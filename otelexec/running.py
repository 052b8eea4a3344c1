"""
An execution that runs here, as the rest of otelexec knows it: pure data, no I/O.

What its code tells the handle (progress, output, pause) is kept on it; the runtime's background thread and the close of
the attempt write it down.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from opentelemetry import trace

from otelexec.cores import Cores

if TYPE_CHECKING:
    from weakref import ref

    from opentelemetry.trace import Span

    from otelexec.correlation import Correlation
    from otelexec.endings import Ending
    from otelexec.handle import Execution
    from otelexec.options import Options
    from otelexec.runtime import Runtime
    from otelexec.store.rows import Cancellation
    from otelexec.store.writes import CloseAttempt, CloseOuter, OpenAttempt, Opened

logger = logging.getLogger("otelexec.execution")

_MAX_UNIX_NS = 2**63 - 1  # of both stores' integers
_NOTHING: Mapping[str, Any] = {}

_warned: set[str] = set()


class RunningExecution:
    """
    One attempt at an execution, from its start to its close; it is what the context holds.

    Attributes:
        handle: The user's side of it, as long as somebody holds that: `execution.handle_of`.
        outer: The execution whose attempt it took over or repeats, being its core; None for any other.
        claim: What it entered the outer execution's cores with.
        number: The attempt's number, from 1; None while the store has not told it.
        duplicate: Whether the execution had succeeded before it.
        attempt_row: What the store has of it; only where there are records.
        children: Ended spans that are to be committed with it.
        closing: The write that closes it, once it is made: whoever repeats the close writes the same.
        ending: How it ended, before the store has its say; set before its close by who knows better.
        stop: Stops its code; None where that can't be done.
        stopped: Whether that was done: once, since its cleanup is to go through.
        snapshot: What it was resumed with, and then what a pause leaves, as JSON text.
    """

    __slots__ = (
        "attempt_row",
        "cancellation",
        "children",
        "claim",
        "clock_started_ns",
        "closed",
        "closing",
        "cores",
        "correlation",
        "deadline_unix_ns",
        "duplicate",
        "ending",
        "handle",
        "message_id",
        "name",
        "number",
        "options",
        "outer",
        "output",
        "pause_reason",
        "pid",
        "progress_due",
        "progress_marker",
        "progress_written",
        "rejection",
        "retries_sent",
        "runtime",
        "snapshot",
        "snapshot_error",
        "span",
        "span_ended",
        "start_attributes",
        "start_links",
        "started_unix_ns",
        "stop",
        "stopped",
        "timed_out",
        "token",
    )

    attempt_row: OpenAttempt

    def __init__(
        self, runtime: Runtime, options: Options, correlation: Correlation, token: str, outer: RunningExecution | None = None
    ) -> None:
        self.runtime = runtime
        self.options = options
        self.name = options.name
        self.correlation = correlation
        self.token = token
        self.message_id: str | None = None
        self.outer = outer
        self.claim: object = None
        self.cores = Cores()
        self.handle: ref[Execution] | None = None
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
        self.stopped = False
        self.cancellation: Cancellation | None = None if outer is None else outer.cancellation
        self.retries_sent = 0
        self.rejection: str | None = None
        self.progress_marker: str | None = None
        self.progress_due = False
        self.progress_written = 0.0
        self.output: str | None = None
        self.pause_reason: str | None = None
        self.snapshot: str | None = None if outer is None else outer.snapshot
        self.snapshot_error: str | None = None

    @property
    def id(self) -> str:
        """The execution id."""
        return self.correlation.execution_id

    @property
    def is_open(self) -> bool:
        """Whether its attempt runs in this very process."""
        return not self.closed and self.pid == os.getpid()

    @property
    def cancel_requested(self) -> bool:
        """Whether somebody asked for it to be cancelled, as far as that is known here."""
        return self.cancellation is not None

    @property
    def pause_snapshot(self) -> str | None:
        """What a pause leaves, as JSON text."""
        return self.snapshot if self.pause_reason is not None else None

    def mark_retry_sent(self) -> None:
        """Note that a message for another attempt goes out."""
        self.retries_sent += 1

    def mark_retry_refused(self) -> None:
        """Note that the backend refused such a message after all."""
        self.retries_sent -= 1

    def opened(self, answer: Opened) -> None:
        """Learn what the store says of its attempt."""
        self.number = answer.number
        self.duplicate = answer.duplicate
        self.snapshot = answer.snapshot or self.snapshot
        self.cancelled_by(answer.cancellation)

    def cancelled_by(self, cancellation: Cancellation | None) -> None:
        """Learn that somebody asked for it to be cancelled."""
        if cancellation is None:
            return
        self.cancellation = cancellation
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Stop the code that runs in it if somebody wants that."""
        wish, stop = self.cancellation, self.stop
        if wish is not None and wish.terminate and stop is not None and not self.stopped:
            self.stopped = True
            stop()

    def warn_inherited(self, what: str) -> None:
        """Say, once for each kind of call, that a forked child can't speak for its parent's execution."""
        if what not in _warned:
            _warned.add(what)
            logger.warning("otelexec.execution.inherited: %s() does nothing here: the execution is process %d's", what, self.pid)
