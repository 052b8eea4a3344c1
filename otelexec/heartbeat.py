"""
The background thread of a process: signs of life, and whatever must not wait for the next commit.

It writes the heartbeat, markers and ended children of what runs here, passes cancellations on, takes the spool in when
the store is back, closes the attempts of dead workers, and starts the relay.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import queue
import threading
from typing import TYPE_CHECKING

from otelexec.clock import monotonic
from otelexec.endings import describe
from otelexec.errors import OtelexecError, StoreBusy, StoreError
from otelexec.importing import importing
from otelexec.store.writes import Heartbeat

if TYPE_CHECKING:
    from otelexec.reconcile import Reconciler
    from otelexec.relay import Relay
    from otelexec.running import RunningExecution
    from otelexec.runtime import Runtime

logger = logging.getLogger("otelexec.heartbeat")

LOOSE_SECONDS = 0.5
"""How long an ended span without an execution waits for company; at most a second with the thread's own delay."""

RELAY_DELAY_SECONDS = 0.2
"""A process that ends sooner, such as a forked worker of one job, leaves its spans to the relays of others."""

LEAST_TICK_SECONDS = 0.02

REST_SECONDS = 1.0
"""How long the thread rests after a round that failed for a reason that nobody expected."""


class HeartbeatThread:
    """
    The thread of one runtime; it starts when there is first something to do.

    Args:
        runtime: The runtime.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        # SimpleQueue.put() is reentrant, so that the garbage collector may nudge in any place.
        self._nudges: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._next_beat = 0.0
        self._next_look = 0.0
        self._away_since: float | None = None
        self._next_loose = 0.0
        self._next_reconcile = 0.0
        self._relay_from = 0.0
        self._said = ""
        # Kept from round to round: it remembers when the store was away.
        self._reconciler: Reconciler | None = None

    def nudge(self) -> None:
        """Ask for a round soon; never blocks."""
        self._nudges.put(None)
        self.ensure()

    def ensure(self) -> None:
        """Start the thread unless it runs; never blocks, since a signal handler may ask in the middle of the start."""
        if self._thread is None and self._lock.acquire(blocking=False):
            try:
                self._start()
            finally:
                self._lock.release()

    def _start(self) -> None:
        if self._thread is not None or self._stopping or not self._runtime.records:
            return
        now = monotonic()
        self._next_beat = now + self._runtime.settings.heartbeat
        self._next_reconcile = now + min(1.0, self._runtime.settings.reconcile_interval_seconds)
        self._relay_from = now + RELAY_DELAY_SECONDS
        thread = threading.Thread(target=self._serve, name="otelexec-heartbeat", daemon=True)
        try:
            # Not in the context of whoever needs it first: threads inherit it with `thread_inherit_context`, the default without a GIL.
            contextvars.Context().run(thread.start)
        except RuntimeError:  # the interpreter is shutting down
            return
        self._thread = thread

    def stop(self, timeout_seconds: float) -> None:
        """End the thread; waits no longer than `timeout_seconds`."""
        self._stopping = True
        self._nudges.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_seconds)

    def _serve(self) -> None:
        while not self._stopping:
            self._wait()
            if self._stopping:
                return
            try:
                self._round()
            except OtelexecError as error:
                logger.debug("otelexec.heartbeat.failed: %s", error)
            except Exception as error:  # the thread must outlive every surprise
                self._say(error)
                self._rest()
            else:
                self._said = ""

    def _say(self, error: Exception) -> None:
        """Log a surprise, once until there is another one: what fails in a round fails again in the next."""
        text = ": ".join(describe(error, 500))
        logger.log(logging.DEBUG if text == self._said else logging.ERROR, "otelexec.heartbeat.failed", exc_info=error)
        self._said = text

    def _rest(self) -> None:
        """Wait, whoever asks for a round meanwhile: one that failed left undone what the next one would be due for at once."""
        over = monotonic() + REST_SECONDS
        while not self._stopping and (left := over - monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                self._nudges.get(timeout=left)

    def _wait(self) -> None:
        runtime, now = self._runtime, monotonic()
        wake = min(self._next_beat, self._next_reconcile if runtime.settings.reconcile else self._next_beat)
        # Also while nothing runs: what starts during the wait is to see a cancellation in time.
        wake = min(wake, now + runtime.settings.cancel_poll_seconds)
        if runtime.collector.has_loose:
            wake = min(wake, max(self._next_loose, now))
        if runtime.relay is None and runtime.settings.relay:
            wake = min(wake, max(self._relay_from, now))
        try:
            self._nudges.get(timeout=max(wake - now, LEAST_TICK_SECONDS))
            while True:
                self._nudges.get_nowait()
        except queue.Empty:
            pass

    def _round(self) -> None:
        runtime, now = self._runtime, monotonic()
        journal = runtime.journal
        journal.group.flush()
        if journal.homeless:
            journal.recover(self._meanwhile)
        if runtime.collector.has_loose and now >= self._next_loose:
            self._next_loose = now + LOOSE_SECONDS
            loose = runtime.collector.take_loose(runtime.process_id)
            if loose:
                journal.write(loose)
        self._show_life(now, away=journal.spooling)
        if runtime.relay is None and runtime.settings.relay and now >= self._relay_from:
            relay = self.make_relay()
            if relay is not None:
                relay.start()
        if runtime.settings.reconcile and now >= self._next_reconcile:
            self._next_reconcile = now + runtime.settings.reconcile_interval_seconds
            self._reconcile()

    def _meanwhile(self) -> None:
        """
        Do what can't wait for the end of a round: to take in what an outage left, or to close what a host left, may take minutes.

        Raises:
            TimeoutError: The process ends; others go on with it.
        """
        if self._stopping:
            raise TimeoutError("the process ends")
        now = monotonic()
        if now >= self._next_look:
            with contextlib.suppress(StoreError):  # the next commit of the round says whether the store is away
                self._show_life(now, away=False)

    def _show_life(self, now: float, *, away: bool) -> None:
        """Look after what runs here, and say that the process lives if that is due and the store not away."""
        runtime = self._runtime
        self._next_look = now + runtime.settings.cancel_poll_seconds
        beat = now >= self._next_beat
        if beat:  # at once: a store that can't be read must not be asked without a pause
            self._next_beat = now + runtime.settings.heartbeat
            away = away or not self._beat(now)
        self._look_after_executions(now, all_children=beat, away=away)

    def _beat(self, now: float) -> bool:
        """Write a sign of life; gives whether the store is there. One that is away for as long as an open may wait is said to be so."""
        runtime = self._runtime
        try:
            runtime.journal.group.commit(Heartbeat(runtime.process), durable=False, timeout_seconds=1.0)
        except StoreBusy:
            pass  # an execution may have longer to wait than this
        except StoreError as error:
            self._away_since = now if self._away_since is None else self._away_since
            if now >= self._away_since + runtime.settings.open_timeout_seconds:
                # Before an execution has to wait for it, here or in a forked child.
                runtime.journal.store_failed(error)
            else:
                self._next_beat = now + min(runtime.settings.heartbeat, runtime.settings.cancel_poll_seconds)
            return False
        self._away_since = None
        return True

    def _look_after_executions(self, now: float, *, all_children: bool, away: bool) -> None:
        runtime = self._runtime
        executions = list(runtime.executions.values())
        if not executions:
            return
        for execution in executions:
            if execution.progress_due and now - execution.progress_written >= runtime.settings.progress_seconds:
                execution.progress_written = now
                runtime.write_progress(execution)
            if all_children or len(execution.children) >= runtime.collector.max_collected:
                children = runtime.collector.take_children(execution, runtime.process_id)
                if children:
                    runtime.journal.write(children)
        if runtime.store is not None and not away:
            # A duplicate runs for the second time what has succeeded: wishes from before do not concern it.
            asked = [execution for execution in executions if not execution.duplicate]
            wishes = runtime.store.cancellations([name for execution in asked for name in _names(execution)])
            for execution in asked:
                for name in _names(execution):
                    execution.cancelled_by(wishes.get(name))

    def make_relay(self) -> Relay | None:
        """Make the relay of this process; None where it has nothing to send or can't."""
        with importing:
            from otelexec.reconcile import dead_relays
            from otelexec.relay import Relay

        runtime = self._runtime
        store = runtime.store
        if store is None:
            return None
        try:
            runtime.relay = Relay(
                runtime.journal.commit_all, runtime.settings, runtime.process_id, dead=lambda: dead_relays(store, runtime.process_id)
            )
        except OtelexecError as error:
            logger.error("otelexec.relay.unusable: %s", error)  # noqa: TRY400 (the message says it all)
            self._relay_from = float("inf")
        return runtime.relay

    def _reconcile(self) -> None:
        with importing:
            from otelexec.reconcile import Reconciler

        runtime = self._runtime
        if runtime.store is None:
            return
        if self._reconciler is None:
            self._reconciler = Reconciler(runtime.store, runtime.journal.spool, own=runtime.process_id, meanwhile=self._meanwhile)
        if runtime.journal.spooling:
            self._reconciler.store_was_away()
            return
        try:
            self._reconciler.run_once()
        except (StoreError, OSError) as error:
            logger.debug("otelexec.reconcile.failed: %s", error)


def _names(execution: RunningExecution) -> tuple[str, ...]:
    """Give what a wish to cancel may name: this attempt alone, where another process knows its token, or the execution."""
    token = (execution.outer or execution).options.token
    return (execution.id,) if token is None else (token, execution.id)
