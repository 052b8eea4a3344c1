"""
The worker's main process: what it accepts, what never reaches a task's body, and how its children end.

Every message has a fencing token, made here and handed to whoever runs it. With a pool of processes the attempt is opened
here before the message is acknowledged early, and closed here when the child can't do it any more. With the other pools
the task runs in this process, and its attempt is opened right before the acknowledgement.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from billiard.process import active_children
from celery import current_app
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.worker import request as celery_request
from celery.worker import state as worker_state
from opentelemetry import context as otel_context
from opentelemetry.context import Context

from otelexec import metrics
from otelexec import runtime as _runtime
from otelexec.classification import INTERRUPTED, classify
from otelexec.endings import Ending
from otelexec.ids import random_word
from otelexec.patches import Guard
from otelexec.store.rows import CANCELLED, REJECTED, Cancellation
from otelexec.store.writes import RequestCancel
from otelexec.supervision import Delivery, Supervisor
from otelexec_celery import carrier, consume, endings
from otelexec_celery.messages import hard_limit_of, open_context, options_of
from otelexec_celery.settings import CHOICES

logger = logging.getLogger("otelexec.celery")

STOP_SECONDS = 5.0
"""How long the main process waits at its end for what it has to report."""

_DELIVERY = "otelexec_delivery"

_DEATHS = (WorkerLostError, Terminated, SystemExit, KeyboardInterrupt)
"""What Celery is told when a child has ended, or is about to: its exit says the rest."""


class Main:
    """
    What the main process of a worker has.

    Attributes:
        consumer: Celery's consumer, whose loop acknowledges; None until it is ready.
        limits: Hard and soft limit of the pool, for tasks that have none of their own.
    """

    def __init__(self) -> None:
        self.consumer: Any = None
        self.limits: tuple[Any, Any] = (None, None)
        self._supervisor: Supervisor | None = None

    @property
    def supervisor(self) -> Supervisor | None:
        """The one that watches the children of this very process; None with a pool that has none."""
        found = self._supervisor
        return found if found is not None and found.pid == os.getpid() else None

    @property
    def supervises(self) -> bool:
        """Whether tasks run in children of this process."""
        return self.supervisor is not None

    @property
    def is_inherited(self) -> bool:
        """Whether this came over a fork: then the parent watches this process."""
        return self._supervisor is not None and self._supervisor.pid != os.getpid()

    def supervise(self, limits: tuple[Any, Any]) -> None:
        """Begin to watch, as a pool of processes starts."""
        self._supervisor, self.limits = Supervisor(), limits

    def forget(self) -> None:
        """Watch nothing any more."""
        self._supervisor, self.limits = None, (None, None)


MAIN = Main()


_GUARD = Guard(lambda: CHOICES.active, logger)
_guarded, before, after = _GUARD.guarded, _GUARD.before, _GUARD.after


# --- Requests: `celery.worker.request.Request` -------------------------------------------------------------------


def wrap_init(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `Request.__init__`, so that each delivery has a name, and knows the limits that only this process does."""

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if CHOICES.active:
            self._request_dict[carrier.DELIVERY] = f"{random_word():016x}{random_word():016x}"
            self._request_dict.pop(carrier.LIMITS, None)  # this process's to say, and no message's
            hard, soft = MAIN.limits
            if hard or soft:  # of the command line, which stand in no child's settings
                self._request_dict[carrier.LIMITS] = (self.task.time_limit or hard, self.task.soft_time_limit or soft)

    return init


def delivery_of(request: Any) -> Delivery:
    """Give the delivery that a request stands for."""
    delivery: Delivery | None = vars(request).get(_DELIVERY)
    if delivery is None:
        found = request.request_dict
        task = request.task
        options = options_of(task.name, request.id, found, hard_limit=hard_limit_of(task, found), finalized_by="parent")
        delivery = Delivery(open_context(request.id, found, Context()), options, functools.partial(_terminate, request))
        setattr(request, _DELIVERY, delivery)
    return delivery


def on_accepted(request: Any, pid: int, *_: Any) -> None:
    """Learn that a child has begun; where the task runs in this process, open the attempt."""
    supervisor = MAIN.supervisor
    if supervisor is not None:
        supervisor.started(pid, delivery_of(request))
        return
    # Green pools give the greenlet's id. A child's pid: the pool is older than the instrumentation, and so is the child.
    if pid != os.getpid() and any(child.pid == pid for child in active_children()):
        return
    run = consume.open_early(request.task, request.id, request.request_dict)
    if run is not None and getattr(getattr(MAIN.consumer, "pool", None), "is_green", False):
        run.execution.stop = functools.partial(_terminate, request)


def wrap_on_accepted(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Request.on_accepted`, which acknowledges: a green pool's limit may strike while that waits for the broker."""

    @functools.wraps(original)
    def accepted(self: Any, *args: Any, **kwargs: Any) -> Any:
        _guarded(on_accepted)(self, *args, **kwargs)
        try:
            return original(self, *args, **kwargs)
        except BaseException as error:
            consume.give_up(self.request_dict, error)
            raise

    return accepted


def on_acknowledge(request: Any) -> None:
    """
    Open the attempt of a message that is acknowledged early, for the child.

    Not before Celery counts the request as active: its signal handlers run a whole shutdown in the middle of whatever
    this process does, and would leave out a request that is not.
    """
    if MAIN.supervises and not request.acknowledged and request.worker_pid is not None and not request.task.acks_late:
        delivery = delivery_of(request)
        if not delivery.accepted and delivery.ending is None:
            delivery.accept()


def on_success(request: Any, *_: Any, **__: Any) -> None:
    """Learn that the child is done with a request."""
    _ended(request)


def _ended(request: Any) -> None:
    delivery, supervisor = vars(request).get(_DELIVERY), MAIN.supervisor
    if delivery is not None and supervisor is not None:
        supervisor.ended(delivery)


def on_timeout(request: Any, soft: bool, timeout: float) -> None:  # noqa: FBT001 # Celery's own
    """Learn that a child is about to be stopped at the hard limit."""
    if not soft and MAIN.supervises:
        delivery_of(request).ending = endings.hard_limit(timeout)


def wrap_on_failure(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Request.on_failure`, which calls errbacks here for a child that can't: in the context of its task."""

    @functools.wraps(original)
    def on_failure(self: Any, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        context = _failure_context(self, exc_info, kwargs.get("return_ok", False))
        if context is None:
            return original(self, exc_info, *args, **kwargs)
        token = otel_context.attach(context)
        try:
            return original(self, exc_info, *args, **kwargs)
        finally:
            otel_context.detach(token)

    return on_failure


@_guarded
def _failure_context(request: Any, exc_info: Any, return_ok: bool) -> Context | None:  # noqa: FBT001 # Celery's own
    if return_ok:
        _ended(request)
        return None
    if not MAIN.supervises:
        return None
    error = endings.error_of(exc_info)
    delivery = delivery_of(request)
    if isinstance(error, TimeLimitExceeded):
        delivery.ending = endings.hard_limit(hard_limit_of(request.task, request.request_dict))
    elif not isinstance(error, _DEATHS):
        # The child lives, and failed outside the tracer: before it, and so nobody but this process knows, or after the close.
        _ended(request)
        delivery.settle(delivery.ending or classify(delivery.execution(_runtime.get()), error), time.time_ns(), dead=False)
    return delivery.context()


def wrap_on_timeout(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Request.on_timeout`, which calls errbacks and handlers as `on_failure` does."""

    @functools.wraps(original)
    def timed_out(self: Any, soft: bool, timeout: float) -> Any:  # noqa: FBT001 # Celery's own
        _guarded(on_timeout)(self, soft, timeout)
        context = None if soft or not MAIN.supervises else _guarded(lambda: delivery_of(self).context())()
        if context is None:
            return original(self, soft, timeout)
        token = otel_context.attach(context)
        try:
            return original(self, soft, timeout)
        finally:
            otel_context.detach(token)

    return timed_out


def on_terminate(request: Any, *_: Any, **__: Any) -> None:
    """Record the wish before the signal: a child that sees it coming then knows why, and so does everybody else."""
    runtime = _runtime.get()
    delivery = delivery_of(request)
    if MAIN.supervises:
        delivery.ending = Ending(CANCELLED)
        delivery.stopped = True
    if runtime.records:
        wish = Cancellation(time.time_ns(), terminate=True)
        runtime.journal.write(RequestCancel(delivery.execution(runtime).id, wish))


def on_cancel(request: Any, *_: Any, **__: Any) -> None:
    """Learn that a child is stopped, since the worker shuts down or has lost its connection; what isn't acknowledged comes again."""
    if request.time_start and MAIN.supervises:
        again = bool(request.task.acks_late) and not request.acknowledged
        text = "stopped by a shutdown, or by a lost connection"
        delivery_of(request).ending = Ending(CANCELLED, INTERRUPTED, INTERRUPTED, text, retrying=again)


def on_revoked(request: Any, _: str, terminated: bool, __: object, expired: bool) -> None:  # noqa: FBT001 # Celery's own
    """Close what is revoked or expired before it started, ahead of the acknowledgement."""
    if terminated:
        return
    if expired:
        delivery_of(request).close(Ending(CANCELLED, endings.EXPIRED, endings.EXPIRED, f"expired at {request.expires}"))
    else:
        delivery_of(request).close(Ending(CANCELLED), asked=True)


def on_reject(request: Any, requeue: bool = False, **_: Any) -> None:  # noqa: FBT001, FBT002 # Celery's own
    """Close what Celery turns away before anybody has begun it: its ETA is no time that this worker's clock can say."""
    begun = request.time_start is not None or request.worker_pid is not None or _DELIVERY in vars(request)
    if not (begun or requeue or request.acknowledged):
        text = f"its ETA can't be a time of this worker: {request.eta}"
        delivery_of(request).close(Ending(REJECTED, endings.MALFORMED, endings.MALFORMED, text))


def wrap_create_request_cls(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `create_request_cls`, whose class has an `on_success` of its own, and knows what the pool is to call."""

    @functools.wraps(original)
    def create_request_cls(base: Any, task: Any, pool: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(pool, PreforkPool):
            app = kwargs.get("app") or current_app
            trace = celery_request.fast_trace_task if app.use_fast_trace_task else celery_request.trace_task_ret
            kwargs["trace"] = functools.partial(consume.call_trace, kwargs.get("trace") or trace)
        cls = original(base, task, pool, *args, **kwargs)
        cls.on_success = before(on_success)(cls.on_success)
        return cls

    return create_request_cls


def _terminate(request: Any) -> None:
    """Stop a request as `revoke(terminate=True)` does, in the loop that acknowledges."""
    consumer = MAIN.consumer

    def terminate() -> None:
        if request in worker_state.active_requests:  # else its child may be at the next one by now
            logger.info("otelexec.celery.terminate: %s[%s]", request.name, request.id)
            request.terminate(consumer.pool)

    if consumer is not None:
        consumer.call_soon(terminate)


# --- Messages without a request: `celery.worker.consumer.Consumer` ---------------------------------------------------


def on_unknown_message(_: Any, __: object, message: Any) -> None:
    """Close a message that is none of Celery's."""
    _reject(message, endings.MALFORMED, "no task message")


def on_unknown_task(_: Any, __: object, message: Any, exc: BaseException) -> None:
    """Close a message for a task that this worker does not have."""
    _reject(message, endings.UNKNOWN_TASK, f"no task is registered as {exc}", error_type="celery.exceptions.NotRegistered")


def on_invalid_task(_: Any, __: object, message: Any, exc: BaseException) -> None:
    """Close a task message that Celery can't make sense of."""
    _reject(message, endings.MALFORMED, str(exc))


def on_decode_error(_: Any, message: Any, exc: BaseException) -> None:
    """Close a message whose body can't be decoded."""
    _reject(message, endings.MALFORMED, str(exc))


def _reject(message: Any, classification: str, text: str, *, error_type: str | None = None) -> None:
    headers = message.headers if isinstance(message.headers, Mapping) else {}
    found = dict(headers)
    if "id" not in found:  # protocol 1 has everything in the body
        payload = _payload(message)
        found.update({name: payload[name] for name in ("id", "task") if name in payload})
    delivery_info = getattr(message, "delivery_info", None)
    found["delivery_info"] = delivery_info if isinstance(delivery_info, Mapping) else {}
    found[carrier.DELIVERY] = None
    task_id, name = found.get("id"), found.get("task")
    task_id = task_id if isinstance(task_id, str) else None
    name = name if isinstance(name, str) and name else "unknown message"
    options = options_of(name, task_id, found, finalized_by="parent")
    ending = Ending(REJECTED, classification, error_type or classification, text)
    Delivery(open_context(task_id, found, Context()), options).close(ending)


def _payload(message: Any) -> Mapping[str, Any]:
    try:
        payload = message.payload
    except Exception:  # it is malformed in whatever way
        return {}
    return payload if isinstance(payload, Mapping) else {}


# --- Pools and processes -----------------------------------------------------------------------------------------


def on_pool_start(pool: Any) -> None:
    """Begin to watch, as a pool of processes starts."""
    MAIN.supervise((pool.options.get("timeout"), pool.options.get("soft_timeout")))


def on_pool_started(_: Any) -> None:
    """Relay and reconcile here for the children, and have the store open before the first acceptance."""
    _runtime.get().attend()


def on_worker_ready(sender: Any = None, **_: Any) -> None:
    """Learn the consumer, in whose loop requests are terminated."""
    MAIN.consumer = sender


def on_process_exit(_: Any, process: Any) -> None:
    """Report a child that has exited, once all that it had sent has been read."""
    supervisor = MAIN.supervisor
    if supervisor is not None:
        supervisor.died(process.pid, process.exitcode)


def on_pool_end(_: Any) -> None:
    """Report what is left when the pool has stopped."""
    supervisor = MAIN.supervisor
    if supervisor is not None:
        supervisor.look()
        supervisor.stop(STOP_SECONDS)
        MAIN.forget()


def on_process_init(**_: Any) -> None:
    """Say in a child of the pool that its parent reports its death."""
    if CHOICES.active and (MAIN.is_inherited or os.environ.get("FORKED_BY_MULTIPROCESSING")):
        _runtime.get().be_supervised()


def on_process_shutdown(**_: Any) -> None:
    """Write what is only in memory, and export what was measured: a child of the pool ends without Python's exit handlers."""
    if CHOICES.active:
        patience = _runtime.settings().exit_timeout_seconds
        _runtime.shutdown()
        metrics.flush(patience)
