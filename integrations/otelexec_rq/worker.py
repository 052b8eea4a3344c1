"""
The worker's parent process: how its work horses end, what is stopped, and what no worker holds any more.

A horse has its attempt under RQ's execution id, which the parent knows as well: whatever both say of it is one outcome.
"""

from __future__ import annotations

import functools
import logging
import mmap
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from rq.timeouts import HorseMonitorTimeoutException

from otelexec import metrics
from otelexec import runtime as _runtime
from otelexec.classification import INTERRUPTED
from otelexec.endings import Ending
from otelexec.store.rows import CANCELLED, Cancellation
from otelexec.supervision import Delivery, Supervisor
from otelexec_rq import consume, endings
from otelexec_rq.messages import open_context, options_of
from otelexec_rq.settings import GUARD

logger = logging.getLogger("otelexec.rq")

STOP_SECONDS: Final = 5.0
"""How long the parent waits at its end for what it has to report."""

OVERDUE_SECONDS: Final = 60
"""How long after its timeout the parent kills a horse: RQ's own, in `monitor_work_horse`."""


class Horse:
    """
    The job in the hands of a work horse.

    Args:
        worker: RQ's worker, in the parent.
        job: The job.
        execution_id: RQ's execution id.
    """

    __slots__ = ("delivery", "execution_id", "job", "started", "worker")

    def __init__(self, worker: Any, job: Any, execution_id: str | None) -> None:
        self.worker = worker
        self.job = job
        self.execution_id = execution_id
        self.started = time.monotonic()
        self.delivery = delivery_of(job, execution_id, stop=self.stop)

    def stop(self) -> None:
        """Stop it as `stop-job` does."""
        pid = self.delivery.pid
        if MAIN.watch(self.worker).horse is not self or pid is None:
            return
        with suppress(ProcessLookupError):  # it has ended
            # Not by the worker's `kill_horse`: it asks for the group of whatever `horse_pid` is by then, and that is this
            # process's own before the horse has left it, and once the horse is done.
            if os.getpgid(pid) != pid:
                self.delivery.stopped = False  # asked again at the next poll
                return
            logger.info("otelexec.rq.stop: job %s", self.job.id)
            self.worker._stopped_job_id = self.job.id  # noqa: SLF001 (as RQ's own command does)
            _stopped(self)
            os.killpg(pid, signal.SIGKILL)


class Watch:
    """
    What the parent of work horses knows of one worker: several may run in threads of one process.

    Args:
        worker: The worker.

    Attributes:
        pid: The parent; a forked horse has a copy that is not its own.
        horse: The horse that works; None while none does.
        shutting_down: Whether a cold shutdown is under way.
    """

    __slots__ = ("_worker", "horse", "pid", "shutting_down")

    def __init__(self, worker: Any) -> None:
        self._worker = worker  # held, since it is known by its id
        self.pid = os.getpid()
        self.horse: Horse | None = None
        self.shutting_down = False


class Main:
    """What the parent process of work horses has: a watch for each worker, and one supervisor for all."""

    def __init__(self) -> None:
        self._watches: dict[int, Watch] = {}
        self._supervisor: Supervisor | None = None

    def watch(self, worker: Any) -> Watch:
        """Give what is known of a worker of this very process."""
        found = self._watches.get(id(worker))
        if found is None or found.pid != os.getpid():
            found = self._watches[id(worker)] = Watch(worker)
        return found

    @property
    def supervisor(self) -> Supervisor | None:
        """The one that watches the horses of this very process; None when it has none."""
        found = self._supervisor
        return found if found is not None and found.pid == os.getpid() else None

    def supervise(self) -> Supervisor:
        """Begin to watch, if nothing does yet."""
        found = self.supervisor
        if found is None:
            found = self._supervisor = Supervisor()
        return found

    def leave(self, worker: Any) -> Supervisor | None:
        """Forget a worker; gives the supervisor when that was the last one of this process."""
        self._watches.pop(id(worker), None)
        if any(watch.pid == os.getpid() for watch in list(self._watches.values())):
            return None
        found, self._supervisor = self.supervisor, None
        return found

    def forget(self) -> None:
        """Be as in the beginning."""
        self._watches.clear()
        self._supervisor = None


MAIN = Main()


def delivery_of(job: Any, execution_id: str | None, *, stop: Callable[[], None] | None = None) -> Delivery:
    """
    Give the delivery that a run of a job stands for.

    Args:
        job: The job.
        execution_id: RQ's execution id; None for a job that is not run.
        stop: Stops it; None where that can't be done.
    """
    context = open_context(job, execution_id, None)
    return Delivery(context, options_of(job, execution_id, finalized_by="parent"), stop, stop_by_default=True, may_move=False)


# --- Work horses -------------------------------------------------------------------------------------------------


def on_horse_started(worker: Any, job: Any, *_: Any) -> None:
    """Learn which process runs a job."""
    if not worker.horse_pid or worker.is_horse:
        return
    horse = MAIN.watch(worker).horse = Horse(worker, job, consume.execution_id_of(worker))
    MAIN.supervise().started(worker.horse_pid, horse.delivery)


def wrap_wait_for_horse(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `wait_for_horse`, which alone learns how a horse has ended."""

    @functools.wraps(original)
    def wait_for_horse(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        with suppress(HorseMonitorTimeoutException):  # the horse has ended; waiting for it again would find none
            GUARD.guarded(_on_horse_ended)(self, result)
        return result

    return wait_for_horse


def _on_horse_ended(worker: Any, result: Any) -> None:
    watch, supervisor = MAIN.watch(worker), MAIN.supervisor
    horse, watch.horse = watch.horse, None
    done = _said_done(worker)
    if horse is None or supervisor is None or horse.delivery.pid is None:
        return
    pid, status = result[0], result[1]
    code = os.waitstatus_to_exitcode(status) if pid and status is not None else None
    if code == 0:
        supervisor.ended(horse.delivery)
        if not done:  # its function left by `os._exit(0)`, or it is one that was spawned
            supervisor.died(horse.delivery.pid, code, {})
        return
    if worker._stopped_job_id == horse.job.id:  # noqa: SLF001 (RQ keeps it nowhere else)
        _stopped(horse)
    supervisor.died(horse.delivery.pid, code)


def _said_done(worker: Any) -> bool:
    """Tell whether the last horse said that it had closed what it ran, and forget it."""
    done = vars(worker).get(consume.DONE)
    if done is None or not done[0]:
        return False
    done[0] = 0
    return True


def on_kill_horse(worker: Any, sig: int = signal.SIGKILL, *_: Any) -> None:
    """Learn why a horse, or a job in this process, is about to be killed."""
    stopped = worker._stopped_job_id  # noqa: SLF001 (as above)
    run = consume.RUNNING.get(stopped) if stopped else None
    if run is not None:
        run.stopped = True
        run.execution.cancelled_by(Cancellation(time.time_ns(), terminate=False))
        return
    watch = MAIN.watch(worker)
    horse = watch.horse
    if horse is None or sig != signal.SIGKILL or horse.delivery.ending is not None:
        return
    if stopped == horse.job.id:
        _stopped(horse)
    elif watch.shutting_down:
        horse.delivery.ending = Ending(CANCELLED, INTERRUPTED, INTERRUPTED, "killed by a cold shutdown of the worker")
    elif _is_overdue(horse):
        horse.delivery.ending = endings.overdue(horse.job.timeout)


def wrap_kill_horse(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `kill_horse`: what we note of it must not make it hit the worker's own group, when the horse ends meanwhile."""

    @functools.wraps(original)
    def kill_horse(self: Any, *args: Any, **kwargs: Any) -> Any:
        pid = self.horse_pid
        GUARD.guarded(on_kill_horse)(self, *args, **kwargs)
        return None if pid and self.horse_pid != pid else original(self, *args, **kwargs)

    return kill_horse


def _is_overdue(horse: Horse) -> bool:
    timeout = horse.job.timeout
    return isinstance(timeout, int | float) and timeout > 0 and time.monotonic() - horse.started > timeout + OVERDUE_SECONDS


def _stopped(horse: Horse) -> None:
    """Record that somebody asked for it, which makes the cancellation final, before or after the signal."""
    delivery = horse.delivery
    if delivery.ending is None:
        delivery.ending = Ending(CANCELLED)
        delivery.stopped = True
        # Of this attempt alone: a wish in the store would keep RQ from running a stopped job that somebody requeues.
        delivery.execution(_runtime.get()).cancelled_by(Cancellation(time.time_ns(), terminate=True))


def wrap_force_stop(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `request_force_stop`, which kills the horse, or ignores a signal that comes too soon after the first."""

    @functools.wraps(original)
    def request_force_stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch = MAIN.watch(self)
        watch.shutting_down = True
        try:
            return original(self, *args, **kwargs)
        finally:
            watch.shutting_down = False

    return request_force_stop


# --- Workers -----------------------------------------------------------------------------------------------------


def on_worker_started(worker: Any) -> None:
    """Relay and reconcile here for the horses, and have the store open before the first of them."""
    MAIN.watch(worker)
    setattr(worker, consume.DONE, mmap.mmap(-1, 1))
    metrics.instruments()
    _runtime.get().attend()


def on_worker_ended(worker: Any) -> None:
    """Report what is left when the last worker of this process stops."""
    supervisor = MAIN.leave(worker)
    if supervisor is not None:
        supervisor.look()
        supervisor.stop(STOP_SECONDS)
