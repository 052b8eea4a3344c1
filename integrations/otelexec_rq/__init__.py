"""
otelexec for RQ: every job is an execution.

    from otelexec_rq import RQInstrumentor
    RQInstrumentor().instrument()

where jobs are enqueued and where workers are started, or nothing at all under `opentelemetry-instrument rq worker`. See
the README of `integrations/`.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import Any, Final

try:
    from rq.version import VERSION
except ModuleNotFoundError as error:
    if error.name == "rq":
        raise ModuleNotFoundError(
            "No module named 'rq'. Install it with the adapter: pip install 'otelexec[rq]'", name="rq", path=error.path
        ) from None
    raise
from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined] # untyped
from rq import worker as rq_worker
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job
from rq.queue import Queue
from rq.registry import StartedJobRegistry
from rq.worker_pool import WorkerPool

from otelexec.patches import Patches
from otelexec_rq import callbacks, consume, publish, schedule, spawning, unrun, worker
from otelexec_rq.settings import CHOICES, GUARD

__all__ = ["RQInstrumentor"]

logger = logging.getLogger("otelexec.rq")

REQUIRES: Final = ("rq >= 2.6, < 4",)

# The class that has a method differs between versions: what `Worker` had is `BaseWorker`'s since 2.7.
_WORKERS: Final = ("BaseWorker", "Worker", "SimpleWorker", "SpawnWorker", "HerokuWorker")
_NEEDED: Final = ("perform_job", "handle_execution_ended", "fork_work_horse", "wait_for_horse")

# The modules that have imported the callbacks' functions by name, in versions where they are functions.
_CALLERS: Final = ("rq.worker.base", "rq.worker.worker_classes", "rq.queue", "rq.registry")


class RQInstrumentor(BaseInstrumentor):  # type: ignore[misc] # untyped in the versions that are supported
    """Makes an execution of every RQ job that is enqueued or run in this process, or by a horse of it."""

    _patches: Patches | None = None

    def instrumentation_dependencies(self) -> Collection[str]:
        """Give the versions of RQ that are supported."""
        return REQUIRES

    def _instrument(self, **kwargs: Any) -> None:
        """
        Instrument RQ.

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

    def _uninstrument(self, **_: Any) -> None:
        """Leave RQ as it was."""
        if self._patches is not None:
            self._patches.undo()
            self._patches = None


def _is_supported() -> bool:
    """Check again what the loader of `opentelemetry-instrument` skips: version bounds, and the places we rely on."""
    found = tuple(int(part) for part in VERSION.split(".")[:2] if part.isdecimal())
    if (2, 6) <= found < (4,) and all(list(_owners(name)) for name in _NEEDED):
        return True
    logger.error("otelexec.rq.unsupported: RQ %s is not instrumented; otelexec needs %s", VERSION, REQUIRES[0])
    return False


def _owners(name: str) -> Iterator[Any]:
    """Give the worker classes that have a method of their own by this name."""
    for each in _WORKERS:
        cls = getattr(rq_worker, each, None)
        if cls is not None and name in vars(cls):
            yield cls


def _patch_sending(patches: Patches) -> None:
    patches.replace(Job, "create", publish.wrap_create)
    for name in ("enqueue_call", "enqueue_at", "enqueue_many"):
        patches.replace(Queue, name, publish.wrap_enqueue)
    for name in ("enqueue_job", "schedule_job"):
        patches.replace(Queue, name, publish.wrap_enqueue_job)
    for module, owner, name, wrapper in (
        ("rq.repeat", "Repeat", "schedule", publish.wrap_repeat),
        ("rq.cron", "CronJob", "enqueue", schedule.wrap_cron_enqueue),
    ):
        with suppress(ImportError):  # both came with later versions, or need what is not installed
            patches.replace(getattr(importlib.import_module(module), owner), name, wrapper)


def _patch_running(patches: Patches) -> None:
    patches.replace(Job, "perform", consume.wrap_perform)
    patches.replace(Queue, "run_job", consume.wrap_run_job)
    patches.replace(Job, "save_meta", consume.wrap_save_meta)
    patches.replace(Job, "cancel", unrun.wrap_cancel)
    _patch_workers(patches, "perform_job", consume.wrap_perform_job)
    _patch_workers(patches, "handle_execution_ended", consume.wrap_execution_ended)
    for kind in callbacks.KINDS:
        name, wrapper = f"execute_{kind}_callback", callbacks.wrapper(kind)
        patches.replace(Job, name, wrapper)
        for module in _CALLERS:
            with suppress(ImportError):
                patches.replace(importlib.import_module(module), name, wrapper)


def _patch_worker(patches: Patches) -> None:
    spawn_worker = getattr(rq_worker, "SpawnWorker", None)
    if spawn_worker is not None:
        patches.replace(spawn_worker, "fork_work_horse", spawning.wrap_spawn)
    patches.replace(WorkerPool, "get_worker_process", spawning.wrap_get_worker_process)
    _patch_workers(patches, "fork_work_horse", GUARD.after(worker.on_horse_started))
    _patch_workers(patches, "wait_for_horse", worker.wrap_wait_for_horse)
    _patch_workers(patches, "kill_horse", worker.wrap_kill_horse)
    _patch_workers(patches, "request_force_stop", worker.wrap_force_stop)
    _patch_workers(patches, "register_birth", GUARD.after(worker.on_worker_started))
    _patch_workers(patches, "register_death", GUARD.after(worker.on_worker_ended))
    patches.replace(StartedJobRegistry, "cleanup", unrun.wrap_cleanup)
    patches.replace(IntermediateQueue, "cleanup", unrun.wrap_intermediate_cleanup)
    patches.on_undo(worker.MAIN.forget)


def _patch_workers(patches: Patches, name: str, wrapper: Callable[[Any], Any]) -> None:
    for owner in _owners(name):
        patches.replace(owner, name, wrapper)
