"""
What a parent process does for the children that run its work.

It opens an attempt before it acknowledges the message, so that a child that dies before it does so is not the end of
every trace of it. It closes what never reaches a child. It reports how a child died: only the parent learns the signal,
and only it knows whether it sent that itself. And it stops what somebody asked to be terminated, which a child that is
busy can't always do. The fencing token, which parent and child share, makes one outcome of all they say.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from opentelemetry import context as otel_context

from otelexec import identity, metrics
from otelexec import runtime as _runtime
from otelexec.context import EXECUTION_KEY
from otelexec.correlation import Scope, with_ids
from otelexec.effects import run
from otelexec.endings import Ending
from otelexec.errors import StoreError
from otelexec.finalize import closing, finalize, persist
from otelexec.freeze import end_span
from otelexec.lifecycle import begin
from otelexec.reconcile import KILLED, OOM, Death, Reconciler, explain
from otelexec.store.rows import LOST, Cancellation
from otelexec.store.writes import Closed

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from otelexec.options import Options
    from otelexec.running import RunningExecution
    from otelexec.runtime import Runtime

logger = logging.getLogger("otelexec.supervision")

OOM_SECONDS = 2.0
"""
How long before a child's death the kernel may have killed it for want of memory: at the least this, at the most twice.

The kernel counts such kills for the whole machine, so older ones were others'; and a large process takes a while to exit.
"""

GRACE_SECONDS = 1.0
"""
How long a child must have been at its work to be stopped.

One whose execution was cancelled in the queue refuses it by itself, and may be at the next work before its parent has heard of that.
"""

RETRY_SECONDS = 1.0
"""How long a report waits for a store that is away before it is tried again."""


class Delivery:
    """
    One message in the hands of a parent process.

    Args:
        context: What the message asks for: `propagation.incoming`.
        options: The attempt's options; their token names the delivery, until a child runs it.
        stop: Stops the child's work on it; called in the supervisor's thread. None where that can't be done.
        stop_by_default: Whether a cancellation that does not say so stops it, too.
        may_move: Whether the pool may give it to another child, so that each run of it has a token of its own.

    Attributes:
        pid: The child that runs it; None as long as none does.
        since: When that began, on the monotonic clock.
        accepted: Whether its attempt was opened here.
        ending: What the parent made of it, such as that it was stopped at a limit; None when it did nothing.
    """

    __slots__ = (
        "_context",
        "_execution",
        "_lock",
        "_may_move",
        "_stop",
        "_token",
        "accepted",
        "ending",
        "options",
        "pid",
        "since",
        "stop_by_default",
        "stopped",
    )

    def __init__(
        self,
        context: Context,
        options: Options,
        stop: Callable[[], None] | None = None,
        *,
        stop_by_default: bool = False,
        may_move: bool = True,
    ) -> None:
        self._context = context
        self._execution: RunningExecution | None = None
        # Reentrant: a signal handler may come here again in the middle of it.
        self._lock = threading.RLock()
        self._stop = stop
        self._token = options.token or ""
        self._may_move = may_move
        self.stop_by_default = stop_by_default
        self.options = options
        self.pid: int | None = None
        self.since = 0.0
        self.accepted = False
        self.ending: Ending | None = None
        self.stopped = False

    def started(self, pid: int) -> None:
        """
        Learn which child runs it.

        The token becomes that of this run: a pool may give a job that it believes unstarted to another child, when the
        first had opened its attempt and died before it could say so.
        """
        with self._lock:
            self.pid, self.since = pid, time.monotonic()
            if not self._may_move:
                return
            token = run_token(self._token, pid)
            self.options = replace(self.options, token=token)
            if self._execution is not None:
                self._execution.token = token
                if _runtime.get().records:
                    self._execution.attempt_row = replace(self._execution.attempt_row, token=token)

    def execution(self, runtime: Runtime) -> RunningExecution:
        """Give the parent's own side of it, with a span that is written only if the child never opens the attempt."""
        with self._lock:  # the supervisor's thread asks as well, and both must speak of one span
            if self._execution is None:
                token = otel_context.attach(self._context)
                try:
                    self._execution, _ = begin(runtime, self.options)
                finally:
                    otel_context.detach(token)
            return self._execution

    def context(self) -> Context:
        """Give the context for what the parent does in its name: messages sent there are its children."""
        return otel_context.set_value(EXECUTION_KEY, self.execution(_runtime.get()), self._context)

    def accept(self) -> None:
        """Open its attempt on behalf of the child that has started; survives the death of both, but not power loss."""
        self.accepted = True
        runtime = _runtime.get()
        if runtime.records:
            runtime.journal.write(replace(self.execution(runtime).attempt_row, repeated=True))
            runtime.heartbeat.ensure()

    def close(self, ending: Ending, *, asked: bool = False) -> None:
        """
        Record the end of a message that never reaches a child.

        Args:
            ending: How it ended.
            asked: Whether somebody asked for the cancellation, which makes it final.
        """
        runtime = _runtime.get()
        execution = self.execution(runtime)
        if asked:
            execution.cancelled_by(Cancellation(time.time_ns(), terminate=None))
        execution.ending = ending
        ended_ns = execution.started_unix_ns + time.perf_counter_ns() - execution.clock_started_ns
        run(runtime, finalize(runtime, execution, ending, ended_ns))

    def settle(self, ending: Ending, ended_unix_ns: int, *, dead: bool = True) -> None:
        """
        Record its end unless its attempt is closed already, whether the child had opened that or not.

        Args:
            ending: How it ended.
            ended_unix_ns: When, in nanoseconds since 1970.
            dead: Whether the process died that had it in hand.
        """
        runtime = _runtime.get()
        execution = self.execution(runtime)
        execution.closed = True
        ended = max(ended_unix_ns, execution.started_unix_ns)
        end_span(execution, ending, ended)
        patience = runtime.settings.finalize_timeout_seconds
        write = closing(runtime, execution, ending, ended)
        answer = run(runtime, persist(runtime.journal, write, durable=True, patience_seconds=patience))
        if dead and isinstance(answer, Closed) and answer.won:
            metrics.reconciled(execution.name, ending.state, ending.error_type)

    def stop(self) -> None:
        """Stop the child's work, once."""
        if self._stop is not None and not self.stopped:
            self.stopped = True
            self._stop()


def named(context: Context, scope: Scope, token: str) -> Context:
    """
    Name an execution whose ids are not believed by its delivery: the parent and its child must mint the same.

    Args:
        context: The message's context.
        scope: The scope in it.
        token: What the parent named the delivery.
    """
    correlation = scope.correlation.model_copy(update={"execution_id": token, "request_id": token})
    return with_ids(context, scope, correlation, scope.message_id)


def run_token(delivery: str, pid: int) -> str:
    """
    Give the fencing token of one run of a delivery, which the child and its parent make alike.

    Args:
        delivery: What the parent named the delivery.
        pid: The process that runs it.
    """
    return f"{delivery}-{pid}"


@dataclass(slots=True)
class _Report:
    pid: int
    death: Death
    deliveries: list[Delivery] = field(default_factory=list)


class Supervisor:
    """
    The thread of a parent process that reports deaths and passes terminations on.

    Attributes:
        pid: The parent; a forked child has a copy that is not its own.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._reports: queue.SimpleQueue[_Report | None] = queue.SimpleQueue()
        self._running: dict[int, Delivery] = {}
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._oom_kills = _OomKills()

    def started(self, pid: int, delivery: Delivery) -> None:
        """Learn that a child began to work on a delivery; what it had before is done."""
        delivery.started(pid)
        self._running[pid] = delivery
        self._ensure()

    def ended(self, delivery: Delivery) -> None:
        """Learn that a child is done with a delivery and lives."""
        if delivery.pid is not None and self._running.get(delivery.pid) is delivery and delivery.ending is None:
            del self._running[delivery.pid]

    def died(self, pid: int, exit_code: int | None, endings: Mapping[str, Ending] | None = None) -> None:
        """
        Learn that a child has exited; what it had in hand is closed soon.

        Args:
            pid: Its process id.
            exit_code: As `subprocess` has it: negative for a signal; None when it is not known.
            endings: How attempts of it ended that the parent stopped itself, by fencing token; None: the delivery's says it.
        """
        delivery = self._running.pop(pid, None)
        signal = -exit_code if exit_code is not None and exit_code < 0 else None
        oom = signal == 9 and self._oom_kills.take()  # noqa: PLR2004 (SIGKILL is what the kernel sends)
        if delivery is None and signal is None and endings is None:
            return
        # Without a delivery, too: it may have been killed before the pool heard that it had begun.
        known = dict(endings or {})
        if delivery is not None and delivery.ending is not None:
            known[delivery.options.token or ""] = delivery.ending
        code = None if signal is not None else exit_code
        report = _Report(pid, Death(time.time_ns(), signal, code, oom, known), [] if delivery is None else [delivery])
        self._reports.put(report)
        self._ensure()

    def look(self) -> None:
        """Report children that are gone without a word from whoever waits for them, as in a shutdown that kills them."""
        for pid in list(self._running):
            if not identity.is_alive(pid):
                self.died(pid, None)

    def stop(self, timeout_seconds: float) -> None:
        """Report what is left, and end the thread; waits no longer than `timeout_seconds`."""
        if self._thread is None:
            return
        self._stopping = True
        self._reports.put(None)
        self._thread.join(timeout_seconds)

    def _ensure(self) -> None:
        if self._thread is None and _runtime.get().records:
            self._oom_kills = _OomKills()  # nobody has looked until now
            self._thread = threading.Thread(target=self._serve, name="otelexec-supervisor", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                report = self._reports.get(timeout=_runtime.settings().cancel_poll_seconds)
            except queue.Empty:
                self._oom_kills.look()
                self._pass_wishes_on()
                continue
            if report is None:
                return
            self._report(report)

    def _report(self, report: _Report) -> None:
        runtime = _runtime.get()
        while True:
            try:
                if runtime.store is not None:
                    Reconciler(runtime.store, runtime.journal.spool, own=runtime.process_id).run_once({report.pid: report.death})
                break
            except (StoreError, OSError) as error:
                # Nobody else speaks for it as long as this process lives and the lease runs.
                logger.debug("otelexec.supervision.failed: %s", error)
                if self._stopping:
                    return
                time.sleep(RETRY_SECONDS)
            except Exception:
                logger.exception("otelexec.supervision.failed")
                return
        for delivery in report.deliveries:
            try:
                delivery.settle(delivery.ending or _lost(report), report.death.seen_unix_ns)
            except Exception:
                logger.exception("otelexec.supervision.failed")

    def _pass_wishes_on(self) -> None:
        runtime = _runtime.get()
        begun = time.monotonic() - GRACE_SECONDS
        running = [delivery for delivery in list(self._running.values()) if delivery.since <= begun]
        if runtime.store is None or runtime.journal.spooling or not running:
            return
        try:
            wishes = runtime.store.cancellations([delivery.execution(runtime).id for delivery in running])
            for delivery in running:
                wish = wishes.get(delivery.execution(runtime).id)
                if wish is not None and (delivery.stop_by_default if wish.terminate is None else wish.terminate):
                    delivery.stop()
        except StoreError as error:
            logger.debug("otelexec.supervision.failed: %s", error)
        except Exception:
            logger.exception("otelexec.supervision.failed")


def _lost(report: _Report) -> Ending:
    classification = OOM if report.death.oom else KILLED
    return Ending(LOST, classification, classification, explain(_runtime.get().process.host, report.pid, report.death))


class _OomKills:
    """The kernel's kills for want of memory that can explain a death which is seen now."""

    def __init__(self) -> None:
        self._before = self._latest = _count_oom_kills()
        self._looked = time.monotonic()

    def look(self) -> None:
        """Let what is older than `OOM_SECONDS` explain nothing any more; to be called often."""
        now = time.monotonic()
        if now - self._looked >= OOM_SECONDS:
            self._before, self._latest, self._looked = self._latest, _count_oom_kills(), now

    def take(self) -> bool:
        """Tell whether there is one; it explains one death."""
        if _count_oom_kills() <= self._before:
            return False
        self._before += 1
        self._latest = max(self._latest, self._before)
        return True


def _count_oom_kills() -> int:
    """Count what the kernel has killed for want of memory since it started; 0 where it doesn't say."""
    try:
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
