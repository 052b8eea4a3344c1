"""The work that the jobs of every demo do, whoever runs them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from opentelemetry import trace

import otelexec
from otelexec.cli.demo.stories import SEGMENTS

STUCK_SECONDS: Final = 30.0
"""Longer than any demo waits."""

tracer = trace.get_tracer("shop")


def reserve(items: Sequence[str]) -> int:
    """Ask another service, under a plain OpenTelemetry span, and reserve one item after the other."""
    run = otelexec.current_execution()
    with tracer.start_as_current_span("GET /inventory", kind=trace.SpanKind.CLIENT):
        time.sleep(0.12)
    for count, item in enumerate(items, start=1):
        reserve_stock(item)
        run.progress(f"reserved {item}", done=count, total=len(items))
    return len(items)


@otelexec.execution("stock.reserve")
def reserve_stock(item: str) -> None:
    """Be a child execution of whatever calls it: a record and a span of its own."""
    otelexec.current_execution().set_output(item)
    time.sleep(0.08)


def encode(stuck_seconds: float = STUCK_SECONDS) -> None:
    """Get stuck in the middle of the first attempt, where the demo kills the process."""
    run = otelexec.current_execution()
    with tracer.start_as_current_span("encode segments"):
        for segment in range(1, SEGMENTS + 1):
            stuck = run.attempt == 1 and segment > SEGMENTS / 2
            encode_segment(stuck_seconds if stuck else 0.2)
            run.progress(f"segment {segment}", done=segment, total=SEGMENTS)


@otelexec.execution("video.segment")
def encode_segment(seconds: float) -> None:
    """Take so many seconds."""
    time.sleep(seconds)


def decline(card: str) -> None:
    """Fail."""
    time.sleep(0.1)
    raise ValueError(f"card ending in {card} declined")


def hang_up_once() -> None:
    """Fail in the first attempt."""
    time.sleep(0.1)
    if otelexec.current_execution().attempt == 1:
        raise ConnectionError("the report server hung up")
