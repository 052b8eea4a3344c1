"""
otelexec for Celery: every task is an execution.

    from otelexec_celery import CeleryInstrumentor
    CeleryInstrumentor().instrument()

or nothing at all under `opentelemetry-instrument celery -A app worker`. See the README of `integrations/`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any, Final

try:
    import celery
except ModuleNotFoundError as error:
    if error.name == "celery":
        raise ModuleNotFoundError(
            "No module named 'celery'. Install it with the adapter: pip install 'otelexec[celery]'", name="celery", path=error.path
        ) from None
    raise
from billiard.pool import Pool as BlockingPool
from celery import Celery, _state, signals
from celery.app import amqp as celery_amqp
from celery.app import trace as celery_trace
from celery.beat import Scheduler
from celery.concurrency import asynpool, prefork
from celery.worker import request as celery_request
from celery.worker import strategy as celery_strategy
from celery.worker.consumer import consumer as celery_consumer
from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined] # untyped

from otelexec.patches import Patches
from otelexec_celery import coexistence, consume, publish, schedule, worker
from otelexec_celery.settings import CHOICES

__all__ = ["CeleryInstrumentor"]

logger = logging.getLogger("otelexec.celery")

REQUIRES: Final = ("celery >= 5.4, < 6",)


class CeleryInstrumentor(BaseInstrumentor):  # type: ignore[misc] # untyped in the versions that are supported
    """Makes an execution of every Celery task that is sent or run in this process."""

    _patches: Patches | None = None

    def instrumentation_dependencies(self) -> Collection[str]:
        """Give the versions of Celery that are supported."""
        return REQUIRES

    def _instrument(self, **kwargs: Any) -> None:
        """
        Instrument Celery.

        Args:
            **kwargs: `use_span_links`: link to the PRODUCER span instead of taking it as the parent; None: as in
                otelexec's settings. `tracer_provider`: as for `otelexec.configure()`, whose settings stay.
        """
        if not _is_supported():
            return
        patches = self._patches = CHOICES.activate(kwargs)
        _patch_sending(patches)
        _patch_running(patches)
        _patch_worker(patches)
        patches.replace(Scheduler, "apply_entry", schedule.wrap_apply_entry)
        coexistence.warn()
        patches.listen(signals.worker_ready, coexistence.warn)  # again, where the worker's log is set up

    def _uninstrument(self, **_: Any) -> None:
        """Leave Celery as it was."""
        if self._patches is not None:
            self._patches.undo()
            self._patches = None


def _is_supported() -> bool:
    """Check again what the loader of `opentelemetry-instrument` skips: version bounds, and the one place we rely on."""
    found = tuple(int(part) for part in celery.__version__.split(".")[:2] if part.isdecimal())
    if (5, 4) <= found < (6,) and consume.can_wrap(celery_trace.build_tracer):
        return True
    logger.error("otelexec.celery.unsupported: Celery %s is not instrumented; otelexec needs %s", celery.__version__, REQUIRES[0])
    return False


def _patch_sending(patches: Patches) -> None:
    patches.replace(Celery, "send_task", publish.wrap_send_task)
    patches.replace(celery_amqp.AMQP, "_create_task_sender", publish.wrap_create_task_sender)
    patches.listen(signals.before_task_publish, publish.on_before_publish)
    _forget_senders()  # those that were made before: each is made anew when it is next asked for
    patches.on_undo(_forget_senders)


def _forget_senders() -> None:
    for app in list(_state._get_active_apps()):  # noqa: SLF001 (Celery's own registry of apps)
        amqp = vars(app).get("amqp")
        if amqp is not None:
            vars(amqp).pop("send_task_message", None)


def _patch_running(patches: Patches) -> None:
    patches.replace(celery_trace, "build_tracer", consume.wrap_build_tracer)
    patches.replace(celery_consumer, "build_tracer", lambda _: celery_trace.build_tracer)  # which it has imported by name
    for task in _tasks():
        if task.__trace__ is not None:
            task.__trace__ = consume.wrap_tracer(task.__trace__, task)
    patches.on_undo(_unwrap_tracers)


def _patch_worker(patches: Patches) -> None:
    request, consumer = celery_request.Request, celery_consumer.Consumer
    patches.replace(request, "__init__", worker.wrap_init)
    patches.replace(request, "on_accepted", worker.wrap_on_accepted)
    patches.replace(request, "acknowledge", worker.before(worker.on_acknowledge))
    patches.replace(request, "on_timeout", worker.wrap_on_timeout)
    patches.replace(request, "on_failure", worker.wrap_on_failure)
    patches.replace(request, "terminate", worker.before(worker.on_terminate))
    patches.replace(request, "cancel", worker.before(worker.on_cancel))
    patches.replace(request, "_announce_revoked", worker.before(worker.on_revoked))
    if hasattr(request, "_eta_timer_entry"):  # since 5.7; before that, Celery runs all the same what it turns away here
        patches.replace(request, "reject", worker.before(worker.on_reject))
    patches.replace(celery_strategy, "create_request_cls", worker.wrap_create_request_cls)
    for name in ("on_unknown_message", "on_unknown_task", "on_invalid_task", "on_decode_error"):
        patches.replace(consumer, name, worker.before(getattr(worker, name)))
    patches.replace(prefork.TaskPool, "on_start", worker.before(worker.on_pool_start))
    patches.replace(prefork.TaskPool, "on_start", worker.after(worker.on_pool_started))
    patches.replace(prefork.TaskPool, "on_stop", worker.after(worker.on_pool_end))
    patches.replace(prefork.TaskPool, "on_terminate", worker.after(worker.on_pool_end))
    for pool in (asynpool.AsynPool, BlockingPool):
        patches.replace(pool, "process_flush_queues", worker.after(worker.on_process_exit))
    patches.listen(signals.worker_ready, worker.on_worker_ready)
    patches.listen(signals.worker_process_init, worker.on_process_init)
    patches.listen(signals.worker_process_shutdown, worker.on_process_shutdown)


def _unwrap_tracers() -> None:
    for task in _tasks():
        unwrap = getattr(task.__trace__, "otelexec_unwrap", None)
        if unwrap is not None:
            task.__trace__ = unwrap()


def _tasks() -> list[Any]:
    return [task for app in list(_state._get_active_apps()) for task in list(app._tasks.values())]  # noqa: SLF001 (as above)
