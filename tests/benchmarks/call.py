"""A decorated call without a store, against `start_as_current_span` with 4 attributes on the same provider."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

import otelexec
from tests.benchmarks.measure import Result, time_ratios

if TYPE_CHECKING:
    from pathlib import Path

TARGET = 1.3
BATCH = 500
ATTRIBUTES = {
    "invoice.id": "01931b7e-5d0e-7c11-9a45-5d2a1f0c7b3e",
    "invoice.customer": "01931b7e-5d0e-7c11-9a45-0f6d8c2b1a90",
    "invoice.source": "webhook",
    "invoice.outcome": "succeeded",
}


def run(folder: Path, *, short: bool = False) -> list[Result]:
    """
    Measure.

    Args:
        folder: Not used: nothing is stored.
        short: Fewer rounds, for a first look.
    """
    del folder
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SpanProcessor())  # its methods do nothing
    otelexec.configure(store="none", tracer_provider=provider)
    tracer = provider.get_tracer("by-hand")

    @otelexec.execution("invoice.run")
    def execute() -> None:
        pass

    def ours() -> None:
        for _ in range(BATCH):
            execute()

    def theirs() -> None:
        for _ in range(BATCH):
            with tracer.start_as_current_span("invoice.run", attributes=ATTRIBUTES):
                pass

    ratios = time_ratios(theirs, ours, 30 if short else 150)
    otelexec.shutdown()
    return [Result("decorated call, no store", "start_as_current_span with 4 attributes", ratios, "x time", TARGET)]
