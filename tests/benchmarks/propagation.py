"""
Carrying a message's context: inject and extract of 3 members against the SDK's global propagator.

Run it with `python tests/benchmarks/propagation.py [--short]`. Rounds of both alternate in one process, so that a noisy
machine slows both; what counts is the median of the rounds' ratios. Ours also mints the message's id, opens and
closes the scope, and attaches; the SDK attaches and detaches what it read, and nothing else.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from statistics import median
from typing import TYPE_CHECKING
from unittest import mock

from opentelemetry import baggage, trace
from opentelemetry import context as otel_context
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from otelexec import runtime, settings
from otelexec.correlation import correlate
from otelexec.propagation import extract_headers, inject_headers, outgoing

if TYPE_CHECKING:
    from collections.abc import Callable

TARGET = 1.2
REPEATS = 500


SETTINGS = settings.load()


def _settings() -> settings.Settings:
    return SETTINGS


def _announce_nothing(_context: object) -> None:
    pass


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(REPEATS):
        work()
    return time.perf_counter() - start


def run(*, short: bool = False) -> list[tuple[str, float]]:
    """
    Measure, and give (label, time of ours divided by the SDK's) pairs.

    Args:
        short: A tenth of the rounds, for a first look.
    """
    # What the SDK's global propagator is by default, without what the environment may have added.
    stock = CompositePropagator([TraceContextTextMapPropagator(), W3CBaggagePropagator()])
    span = TracerProvider().get_tracer("benchmark").start_span("send")
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(runtime, settings=_settings, before_send=_announce_nothing))
        stack.enter_context(trace.use_span(span))
        bare = otel_context.get_current()
        correlation = stack.enter_context(correlate(source="webhook"))
        outgoing(otel_context.get_current())  # uses up the scope's own id, so that each message mints one
        for name, value in correlation.members().items():
            bare = baggage.set_baggage(name, value, context=bare)

        def theirs() -> None:
            carrier: dict[str, str] = {}
            stock.inject(carrier, context=bare)
            otel_context.detach(otel_context.attach(stock.extract(carrier)))

        def ours() -> None:
            carrier: dict[str, str] = {}
            inject_headers(carrier)
            with extract_headers(carrier):
                pass

        ratios = []
        for _ in range(10 if short else 100):
            base = _seconds(theirs)
            ratios.append(_seconds(ours) / base)
    return [("inject and extract: 3 members", median(ratios))]


if __name__ == "__main__":
    for label, ratio in run(short="--short" in sys.argv):
        print(f"{label:<50} {ratio:6.3f}x  target <= {TARGET}x")
