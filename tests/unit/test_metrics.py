"""What is measured, with the SDK's own meter provider: names, units and buckets as the messaging conventions have them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import metrics as otel_metrics
from opentelemetry.sdk.metrics import MeterProvider, ObservableCounter
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.semconv._incubating.metrics import messaging_metrics

import otelexec
from otelexec import metrics, semconv
from otelexec.endings import Ending
from otelexec.store.rows import FAILED, LOST, SUCCEEDED, TIMED_OUT

SPAN_ATTRIBUTES = {
    semconv.MESSAGING_SYSTEM: "celery",
    semconv.MESSAGING_OPERATION_NAME: "process",
    semconv.MESSAGING_OPERATION_TYPE: "process",
    semconv.MESSAGING_DESTINATION_NAME: "invoices",
    semconv.MESSAGING_MESSAGE_ID: "one of millions",
}
KEPT = {
    semconv.EXECUTION_NAME: "invoice.run",
    semconv.MESSAGING_SYSTEM: "celery",
    semconv.MESSAGING_OPERATION_NAME: "process",
    semconv.MESSAGING_DESTINATION_NAME: "invoices",
}


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemoryMetricReader]:
    """Have what is measured in the test read by this reader: a process can set its global provider only once."""
    made = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[made], shutdown_on_exit=False)
    monkeypatch.setattr(otel_metrics, "get_meter", provider.get_meter)
    for cached in (metrics.instruments, metrics._observe_reconciled):
        cached.cache_clear()
    metrics._reconciled.clear()
    yield made
    for cached in (metrics.instruments, metrics._observe_reconciled):
        cached.cache_clear()
    provider.shutdown()


def read(reader: InMemoryMetricReader) -> dict[str, Any]:
    data = reader.get_metrics_data()
    assert data is not None
    ((scope,),) = [resource.scope_metrics for resource in data.resource_metrics]
    assert (scope.scope.name, scope.scope.version, scope.schema_url) == (semconv.SCOPE_NAME, otelexec.__version__, semconv.SCHEMA_URL)
    return {metric.name: metric for metric in scope.metrics}


def test_how_long_work_took_is_the_conventions_metric(reader: InMemoryMetricReader) -> None:
    metrics.took(0.03, "invoice.run", SPAN_ATTRIBUTES, Ending(SUCCEEDED))
    metrics.took(3.0, "invoice.run", SPAN_ATTRIBUTES, Ending(FAILED, None, "ValueError", "no"))
    found = read(reader)[messaging_metrics.MESSAGING_PROCESS_DURATION]
    reference = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reference], shutdown_on_exit=False)
    messaging_metrics.create_messaging_process_duration(
        provider.get_meter("otelexec", otelexec.__version__, schema_url=semconv.SCHEMA_URL)
    ).record(1)
    theirs = read(reference)[messaging_metrics.MESSAGING_PROCESS_DURATION]
    provider.shutdown()
    assert (found.unit, found.description, type(found.data)) == (theirs.unit, theirs.description, type(theirs.data))
    succeeded, failed = found.data.data_points
    assert dict(succeeded.attributes) == KEPT | {semconv.OUTCOME: "succeeded"}
    assert dict(failed.attributes) == KEPT | {semconv.OUTCOME: "failed", semconv.ERROR_TYPE: "ValueError"}
    assert (succeeded.sum, failed.sum) == (0.03, 3.0)


def test_how_long_a_message_waited(reader: InMemoryMetricReader) -> None:
    metrics.waited(0.25, "invoice.run", SPAN_ATTRIBUTES)
    found = read(reader)["otelexec.queue.latency"]
    (point,) = found.data.data_points
    assert (found.unit, dict(point.attributes), point.sum, point.count) == ("s", KEPT, 0.25, 1)


def test_what_dead_processes_left_is_counted(reader: InMemoryMetricReader) -> None:
    for _ in range(2):
        metrics.reconciled("invoice.run", LOST, "killed")
    metrics.reconciled("invoice.run", TIMED_OUT, None)
    found = read(reader)[semconv.METRIC_RECONCILED]
    assert (found.unit, found.data.is_monotonic) == ("{attempt}", True)
    assert {point.value: dict(point.attributes) for point in found.data.data_points} == {
        2: {semconv.EXECUTION_NAME: "invoice.run", semconv.OUTCOME: LOST, semconv.ERROR_TYPE: "killed"},
        1: {semconv.EXECUTION_NAME: "invoice.run", semconv.OUTCOME: TIMED_OUT},
    }


@pytest.mark.parametrize("temporality", [AggregationTemporality.CUMULATIVE, AggregationTemporality.DELTA])
def test_a_forked_child_counts_from_zero(
    temporality: AggregationTemporality, reader: InMemoryMetricReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exporter goes on where the parent's was: differences to what the parent had counted would be negative."""
    inherited = InMemoryMetricReader({ObservableCounter: temporality})
    provider = MeterProvider(metric_readers=[inherited], shutdown_on_exit=False)
    monkeypatch.setattr(otel_metrics, "get_meter", provider.get_meter)

    def counted() -> list[Any]:
        data = inherited.get_metrics_data()
        found: list[Any] = [] if data is None else [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
        return [point.value for scope in found for metric in scope.metrics for point in metric.data.data_points]

    for _ in range(2):
        metrics.reconciled("invoice.run", LOST, "killed")
    assert counted() == [2]
    child = os.fork()
    if not child:
        before = counted()
        metrics.reconciled("invoice.run", LOST, "killed")
        os._exit((before, counted()) != ([], [1]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    provider.shutdown()


def test_the_buckets_are_those_of_seconds(reader: InMemoryMetricReader) -> None:
    """The SDK's own are of milliseconds: whatever took up to five seconds would be in one."""
    metrics.took(0.03, "invoice.run", SPAN_ATTRIBUTES, Ending(SUCCEEDED))
    metrics.waited(0.03, "invoice.run", SPAN_ATTRIBUTES)
    found = read(reader)
    (took,) = found[messaging_metrics.MESSAGING_PROCESS_DURATION].data.data_points
    conventions = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]
    (waited,) = found["otelexec.queue.latency"].data.data_points
    if not metrics.takes_boundaries():
        pytest.skip("the OpenTelemetry API is older than the advice of boundaries (1.30)")
    assert list(took.explicit_bounds) == conventions
    assert list(waited.explicit_bounds)[: len(conventions)] == conventions
    assert waited.explicit_bounds[-1] == 3600


def test_without_a_provider_nothing_is_flushed() -> None:
    metrics.flush(1.0)


def test_a_meter_provider_that_fails_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the user's")

    broken = SimpleNamespace(record=fail)
    monkeypatch.setattr(metrics, "instruments", lambda: (broken, broken))
    metrics.waited(1.0, "job", {})
    metrics.took(1.0, "job", {}, Ending("succeeded"))
