"""Ids that count, and a clock that steps: two runs of a test give the same ids, times and spans."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from typing import Self
from unittest import mock

from opentelemetry.sdk import trace as sdk_trace
from opentelemetry.sdk.trace.id_generator import IdGenerator

from otelexec import ids, spans

START_UNIX_NS = 1_700_000_000_000_000_000


class IncrementalIdGenerator(IdGenerator):
    """
    Span and trace ids 1, 2, 3 and so on.

    Inside its `with` block otelexec takes all its ids from here; together with a `SteppingClock` also those of
    executions and requests, which hold the time. It can be given to a tracer provider of one's own as well.

    Args:
        first: The first id.
    """

    def __init__(self, first: int = 1) -> None:
        self._spans = itertools.count(first)
        self._traces = itertools.count(first)
        self._others = itertools.count(first)
        self._stack = contextlib.ExitStack()

    def generate_span_id(self) -> int:
        """Give the next span id."""
        return next(self._spans)

    def generate_trace_id(self) -> int:
        """Give the next trace id."""
        return next(self._traces)

    def is_trace_id_random(self) -> bool:
        """Say that these ids are not random."""
        return False

    def __enter__(self) -> Self:
        """Put these ids in the place of otelexec's own."""
        with contextlib.ExitStack() as stack:
            for name in ("generate_span_id", "generate_trace_id"):
                given = getattr(self, name)
                stack.enter_context(mock.patch.object(spans.SecureIdGenerator, name, lambda _, given=given: given()))
            stack.enter_context(mock.patch.object(ids, "random_word", self._others.__next__))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Put otelexec's own back."""
        self._stack.close()


class SteppingClock:
    """
    A clock that goes on by one step each time it is asked, and not otherwise.

    Inside its `with` block it is `time.time_ns` and `time.perf_counter_ns` of the whole process, and the SDK's clock.
    Only the thread that entered it makes it step: what background threads ask does not change what a test sees.

    Args:
        start_unix_ns: The first time it tells, in nanoseconds since 1970.
        step_ns: Length of a step in nanoseconds.
    """

    def __init__(self, start_unix_ns: int = START_UNIX_NS, step_ns: int = 1_000_000) -> None:
        self.now_unix_ns = start_unix_ns
        self._step_ns = step_ns
        self._thread = threading.get_ident()
        self._stack = contextlib.ExitStack()

    def time_ns(self) -> int:
        """Tell the time in nanoseconds since 1970."""
        now = self.now_unix_ns
        if threading.get_ident() == self._thread:
            self.now_unix_ns += self._step_ns
        return now

    def __enter__(self) -> Self:
        """Put it in the place of the real clock."""
        self._thread = threading.get_ident()
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(time, "time_ns", self.time_ns))
            stack.enter_context(mock.patch.object(time, "perf_counter_ns", self.time_ns))
            if hasattr(sdk_trace, "time_ns"):  # how the SDK names it is its own affair
                stack.enter_context(mock.patch.object(sdk_trace, "time_ns", self.time_ns))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Put the real clock back."""
        self._stack.close()
