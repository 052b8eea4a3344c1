"""How what starts afresh is instrumented as its parent is: the horse of a `SpawnWorker`, and the worker of a pool that is not forked."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from otelexec import runtime as _runtime
from otelexec_rq.settings import CHOICES, GUARD


class _Spawning:
    """
    The `os` of RQ's module while it spawns a horse.

    A spawned horse is a fresh interpreter that runs a line of source and imports RQ alone. Ours goes before it, and the
    settings of this process into its environment.

    Args:
        inner: The `os` that was there.
        settings: What the horse finds in its environment.
    """

    def __init__(self, inner: Any, settings: dict[str, str]) -> None:
        self._inner = inner
        self._settings = settings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def posix_spawn(self, path: str, argv: list[str], env: Any, **kwargs: Any) -> int:
        """Spawn as RQ 3 does."""
        pid: int = self._inner.posix_spawn(path, _instrumented(argv), {**env, **self._settings}, **kwargs)
        return pid

    def spawnv(self, mode: int, path: str, argv: list[str]) -> int:
        """Spawn as RQ 2 does."""
        pid: int = self._inner.spawnve(mode, path, _instrumented(argv), {**os.environ, **self._settings})
        return pid


def _instrumented(argv: list[str]) -> list[str]:
    """Put what instruments a spawned horse before its source."""
    *command, source = argv
    ours = (
        f"import sys\nsys.path[:] = {sys.path!r}\nfrom otelexec_rq import RQInstrumentor\n"
        "if not RQInstrumentor().is_instrumented_by_opentelemetry:\n"  # opentelemetry-instrument may have been there already
        f"    RQInstrumentor().instrument(use_span_links={CHOICES.use_span_links!r})\n"
    )
    return [*command, ours + source]


def wrap_spawn(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `SpawnWorker.fork_work_horse`, whose children start afresh."""

    @functools.wraps(original)
    def fork_work_horse(self: Any, *args: Any, **kwargs: Any) -> Any:
        module: Any = sys.modules.get(original.__module__)
        if not CHOICES.active or module is None:
            return original(self, *args, **kwargs)
        inner = module.os
        module.os = _Spawning(inner, GUARD.guarded(lambda: _runtime.settings().environment())() or {})
        try:
            return original(self, *args, **kwargs)
        finally:
            module.os = inner

    return fork_work_horse


def wrap_get_worker_process(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `WorkerPool.get_worker_process`: RQ 2 leaves it to `multiprocessing` whether the worker starts afresh."""

    @functools.wraps(original)
    def get_worker_process(self: Any, *args: Any, **kwargs: Any) -> Any:
        process = original(self, *args, **kwargs)
        target = getattr(process, "_target", None)
        if CHOICES.active and target is not None:
            process._target = functools.partial(run_instrumented, target, use_span_links=CHOICES.use_span_links)  # noqa: SLF001 (no public name)
        return process

    return get_worker_process


def run_instrumented(target: Callable[..., None], *args: Any, use_span_links: bool | None, **kwargs: Any) -> None:
    """
    Run what a process of a pool is to run.

    Args:
        target: RQ's function.
        args: For it.
        use_span_links: As in the parent.
        kwargs: For it.
    """
    from otelexec_rq import RQInstrumentor

    if not RQInstrumentor().is_instrumented_by_opentelemetry:  # a forked child is, and one of opentelemetry-instrument
        RQInstrumentor().instrument(use_span_links=use_span_links)
    target(*args, **kwargs)
