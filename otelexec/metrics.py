"""
What is measured besides the spans: how long messages waited, and how long their work took.

Instruments of the OpenTelemetry API: they cost next to nothing until somebody sets a meter provider.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import metrics

from otelexec import semconv

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram

    from otelexec.endings import Ending

_KEPT: Final = (semconv.MESSAGING_SYSTEM, semconv.MESSAGING_OPERATION_NAME, semconv.MESSAGING_DESTINATION_NAME)


@cache
def _histogram(name: str, description: str) -> Histogram:
    return metrics.get_meter(semconv.SCOPE_NAME, schema_url=semconv.SCHEMA_URL).create_histogram(name, unit="s", description=description)


def waited(seconds: float, name: str, span_attributes: Mapping[str, Any]) -> None:
    """
    Count how long a message waited before its attempt was opened.

    Args:
        seconds: From when it was sent, or from when it was due if that is later.
        name: Name of its execution.
        span_attributes: Those of the CONSUMER span, of which the few that don't multiply series are kept.
    """
    histogram = _histogram(semconv.METRIC_QUEUE_LATENCY, "Time from sending, or from when it was due, to the opening of the attempt.")
    histogram.record(seconds, _attributes(name, span_attributes))


def took(seconds: float, name: str, span_attributes: Mapping[str, Any], ending: Ending) -> None:
    """
    Count how long the work on a message took.

    Args:
        seconds: From the opening of the attempt to the end of its code.
        name: As for `waited`.
        span_attributes: As for `waited`.
        ending: How it ended.
    """
    attributes = {**_attributes(name, span_attributes), semconv.OUTCOME: ending.state}
    if ending.error_type is not None:
        attributes[semconv.ERROR_TYPE] = ending.error_type
    _histogram(semconv.METRIC_PROCESS_DURATION, "Duration of processing operation.").record(seconds, attributes)


def _attributes(name: str, span_attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {semconv.EXECUTION_NAME: name} | {key: span_attributes[key] for key in _KEPT if key in span_attributes}
