"""A meter provider for workers, whose every process exports what it measured into a file of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, MetricsData, PeriodicExportingMetricReader

LATENCY = "otelexec.queue.latency"
DURATION = "messaging.process.duration"
RECONCILED = "otelexec.reconciled.attempts"
UNITS = {LATENCY: "s", DURATION: "s", RECONCILED: "{attempt}"}


class _ToFiles(MetricExporter):
    """Exports what a process measured, each time all of it, into a file of its own."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = Path(folder)

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **_: Any) -> MetricExportResult:
        (self._folder / f"{os.getpid()}.metrics").write_text(metrics_data.to_json(), encoding="utf-8")
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 30_000, **_: Any) -> None:
        pass


def measure(folder: str) -> None:
    """Set the provider, which exports when it is flushed only."""
    reader = PeriodicExportingMetricReader(_ToFiles(folder), export_interval_millis=600_000)
    metrics.set_meter_provider(MeterProvider(metric_readers=[reader]))


def points(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Give the data points of a metric, of every process."""
    for path in folder.glob("*.metrics"):
        for resource in json.loads(path.read_text(encoding="utf-8"))["resource_metrics"]:
            for metric in [metric for scope in resource["scope_metrics"] for metric in scope["metrics"] if metric["name"] == name]:
                assert metric["unit"] == UNITS[name]
                yield from metric["data"]["data_points"]
