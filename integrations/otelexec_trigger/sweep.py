"""What workers and servers do for all runs: close what has expired or was cancelled, and what dead workers left open."""

from __future__ import annotations

import logging
import threading
from typing import Final

from otelexec import runtime as _runtime
from otelexec.errors import StoreError, StoreUnavailable
from otelexec.reconcile import Reconciler
from otelexec.store import run_queries
from otelexec.store.runs import ForgetRuns
from otelexec_trigger import engine
from otelexec_trigger.consume import dismiss
from otelexec_trigger.settings import SWEEP_SECONDS

logger = logging.getLogger("otelexec.trigger")

_BATCH: Final = 200


class Sweeper:
    """Does rounds of it in a thread of its own, until it is stopped."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._is_away = False
        self._thread = threading.Thread(target=self._serve, name="otelexec-sweeper", daemon=True)
        runtime = _runtime.get()
        self._reconciler = Reconciler(engine.store(), runtime.journal.spool, own=runtime.process_id)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, timeout_seconds: float) -> None:
        """End after the round that is under way; waits no longer than `timeout_seconds`."""
        self._stopped.set()
        self._thread.join(timeout_seconds)

    def _serve(self) -> None:
        while not self._stopped.wait(SWEEP_SECONDS):
            try:
                self.sweep()
                self._is_away = False
            except (StoreError, OSError) as error:
                # Once for each time: the processes wait for a store that is away, and say nothing while they do.
                logger.log(logging.DEBUG if self._is_away else logging.WARNING, "otelexec.trigger.sweep: %s", error)
                self._is_away = True
            except Exception:
                logger.exception("otelexec.trigger.sweep")

    def sweep(self) -> None:
        """
        Do one round.

        Raises:
            StoreError: The store could not be read or written.
            OSError: A spool could not be read.
        """
        self._reconciler.run_once()
        for run in engine.read(lambda tx: run_queries.hopeless_runs(tx, limit=_BATCH)):
            try:
                dismiss(run)
            except StoreUnavailable:
                raise
            except Exception:  # those behind it are closed all the same
                logger.exception("otelexec.trigger.sweep: %s", run.run_id)
        ended = engine.read(lambda tx: run_queries.ended_runs(tx, limit=_BATCH))
        if ended:
            engine.commit(ForgetRuns(tuple(ended)))
