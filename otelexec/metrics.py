"""
What is measured besides the spans: how long messages waited, how long their work took, and what dead processes left.

Instruments of the OpenTelemetry API: they cost next to nothing until somebody sets a meter provider.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import metrics

from otelexec import semconv
from otelexec.endings import raised_by_signal_handler
from otelexec.exits import call_within

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Histogram, Observation

    from otelexec.endings import Ending

logger = logging.getLogger("otelexec.metrics")

_KEPT: Final = (semconv.MESSAGING_SYSTEM, semconv.MESSAGING_OPERATION_NAME, semconv.MESSAGING_DESTINATION_NAME)

_BOUNDARIES: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""Upper bounds of the buckets in seconds, as the messaging conventions have them; the SDK's own are meant for milliseconds."""

_WAIT_BOUNDARIES: Final = (*_BOUNDARIES, 30, 60, 300, 900, 3600)
"""No convention: a backlog is waited for longer than a call."""


def takes_boundaries() -> bool:
    """Tell whether the OpenTelemetry API knows advised boundaries; it does since 1.30."""
    return "explicit_bucket_boundaries_advisory" in inspect.signature(metrics.Meter.create_histogram).parameters


def _meter(**scope: Any) -> metrics.Meter:
    from otelexec import __version__  # not there yet when this module is imported

    return metrics.get_meter(semconv.SCOPE_NAME, __version__, schema_url=semconv.SCHEMA_URL, **scope)


def _histogram(name: str, description: str, boundaries: tuple[float, ...]) -> Histogram:
    advice: dict[str, Any] = {"explicit_bucket_boundaries_advisory": boundaries} if takes_boundaries() else {}
    return _meter().create_histogram(name, unit="s", description=description, **advice)


@cache
def instruments() -> tuple[Histogram, Histogram]:
    """Give the histograms of waiting and of working, made once; a process that forks for each job makes them before."""
    waiting = "Time from sending, or from when it was due, to the opening of the attempt."
    return (
        _histogram(semconv.METRIC_QUEUE_LATENCY, waiting, _WAIT_BOUNDARIES),
        _histogram(semconv.METRIC_PROCESS_DURATION, "Duration of processing operation.", _BOUNDARIES),
    )


_reconciled = Counter[tuple[str, str, str | None]]()
_lock = threading.RLock()  # reentrant: a signal handler may fork in the middle
# A child whose parent has the counter takes one of another scope: of the same one, the inherited exporter of deltas would give what the
# child counts as its difference to what the parent had.
_scope: dict[str, Any] = {}


def _after_fork_in_child() -> None:
    _reconciled.clear()
    if _observe_reconciled.cache_info().currsize and "attributes" in inspect.signature(metrics.get_meter).parameters:  # not in 1.27
        _scope["attributes"] = {semconv.PROCESS_PID: os.getpid()}
        _observe_reconciled.cache_clear()
    _lock.release()


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork_in_child)


@cache
def _observe_reconciled() -> None:
    # Observed, since what a synchronous counter holds would be exported again by every child that is forked later.
    callback = partial(_reconciled_so_far, _scope.copy())
    _meter(**_scope).create_observable_counter(
        semconv.METRIC_RECONCILED, [callback], unit="{attempt}", description="Attempts closed for processes that died."
    )


def _reconciled_so_far(scope: dict[str, Any], _: CallbackOptions) -> list[Observation]:
    if scope != _scope:
        return []
    with _lock:
        return [
            metrics.Observation(count, {semconv.EXECUTION_NAME: name} | _ended(state, error_type))
            for (name, state, error_type), count in _reconciled.items()
        ]


def waited(seconds: float, name: str, span_attributes: Mapping[str, Any]) -> None:
    """
    Count how long a message waited before its attempt was opened.

    Args:
        seconds: From when it was sent, or from when it was due if that is later.
        name: Name of its execution.
        span_attributes: Those of the CONSUMER span, of which the few that don't multiply series are kept.
    """
    _guard(lambda: instruments()[0].record(seconds, _attributes(name, span_attributes)))


def took(seconds: float, name: str, span_attributes: Mapping[str, Any], ending: Ending) -> None:
    """
    Count how long the work on a message took.

    Args:
        seconds: From the opening of the attempt to the end of its code.
        name: As for `waited`.
        span_attributes: As for `waited`.
        ending: How it ended.
    """
    attributes = _attributes(name, span_attributes) | _ended(ending.state, ending.error_type)
    _guard(lambda: instruments()[1].record(seconds, attributes))


def reconciled(name: str, state: str, error_type: str | None) -> None:
    """
    Count an attempt that this process closed for one that died, and that counts nothing any more.

    Args:
        name: Name of its execution.
        state: How it ended.
        error_type: Type of its error; None without one.
    """
    with _lock:
        _reconciled[name, state, error_type] += 1
    _guard(_observe_reconciled)


def _guard(measure: Callable[[], None]) -> None:
    try:
        measure()
    except Exception as error:  # the user's meter provider is not to end the user's work
        if raised_by_signal_handler(error):
            raise
        logger.debug("otelexec.metrics.failed: %s", error)


def flush(timeout_seconds: float) -> None:
    """
    Have the meter provider export what it holds, in a process that ends without Python's exit handlers.

    Args:
        timeout_seconds: How long to wait. The provider's own timeout does not bound its exporters.
    """
    force_flush = getattr(metrics.get_meter_provider(), "force_flush", None)
    if force_flush is None:  # nobody has set one
        return

    def export() -> None:
        try:
            force_flush()
        except Exception as error:  # the provider gives its exporters' errors back as one
            logger.debug("otelexec.metrics.failed: %s", error)

    call_within(timeout_seconds, export, "otelexec-metrics")


def _ended(state: str, error_type: str | None) -> dict[str, str]:
    return {semconv.OUTCOME: state} | ({} if error_type is None else {semconv.ERROR_TYPE: error_type})


def _attributes(name: str, span_attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {semconv.EXECUTION_NAME: name} | {key: span_attributes[key] for key in _KEPT if key in span_attributes}
