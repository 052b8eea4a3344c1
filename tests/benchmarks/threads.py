"""Durable executions in 32 threads, against the same by hand: one connection behind a lock, and a span each."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

import otelexec
from tests.benchmarks.by_hand import TwoCommits
from tests.benchmarks.measure import Result, rate_ratios

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

TARGET = 4.0
THREADS = 32
EACH = 4


class NoExport(SpanExporter):
    """Takes spans and does nothing with them."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Give success."""
        del spans
        return SpanExportResult.SUCCESS


def run(folder: Path, *, short: bool = False) -> list[Result]:
    """
    Measure.

    Args:
        folder: For the stores of both.
        short: Fewer rounds, for a first look.
    """
    otelexec.configure(store=f"sqlite:///{folder}/otelexec.db", relay=False, reconcile=False)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(NoExport()))
    tracer = provider.get_tracer("by-hand")
    lock = threading.Lock()

    @otelexec.execution("invoice.run")
    def execute() -> None:
        pass

    with closing(TwoCommits(folder / "by-hand.db")) as hand, ThreadPoolExecutor(THREADS) as pool:

        def by_hand() -> None:
            with tracer.start_as_current_span("invoice.run"):
                with lock:
                    run_id = hand.opened("invoice.run")
                with lock:
                    hand.closed(run_id)

        def everywhere(work: Callable[[], None]) -> Callable[[], None]:
            def repeat(_: int) -> None:
                for _ in range(EACH):
                    work()

            return lambda: list(pool.map(repeat, range(THREADS))).clear()

        ratios = rate_ratios(everywhere(by_hand), everywhere(execute), 15 if short else 60)
    provider.shutdown()
    otelexec.shutdown()
    return [
        Result(
            f"{THREADS} threads, durable",
            "by hand, one connection behind a lock, BatchSpanProcessor",
            ratios,
            "x rate",
            TARGET,
            at_least=True,
        )
    ]
