"""
The sending side: a PRODUCER span and a `queued` record around each publish, and what the message carries.

The block is opened where the message has been routed, so that its destination is known, and what it carries is written
by the last receiver of `before_task_publish`, so that nobody's older or other context takes its place. What fails on the
way there (a result backend that is away) is recorded all the same.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from celery import signals
from celery._state import get_current_worker_task
from celery.exceptions import SoftTimeLimitExceeded
from opentelemetry import context as otel_context

from otelexec.context import EXECUTION_KEY
from otelexec.propagation import entries, incoming
from otelexec.publishing import Message
from otelexec.publishing import publish as publish_block
from otelexec.running import RunningExecution
from otelexec.w3c import encode_traceparent
from otelexec_celery import carrier
from otelexec_celery.chords import joins
from otelexec_celery.consume import TASK_EXECUTION
from otelexec_celery.settings import CHOICES, SYSTEM

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Sending:
    """One call of `send_task`, and whether it got as far as the message's own block."""

    __slots__ = ("reached",)

    def __init__(self) -> None:
        self.reached = False


class _Outgoing:
    """The message that is being published here."""

    __slots__ = ("context", "joins", "message", "previous", "task_id")

    def __init__(self, message: Message, task_id: str | None, previous: str | None, joins: str | None) -> None:
        # Of now: a receiver of somebody else's may make a span of its own the current one.
        self.context = otel_context.get_current()
        self.message = message
        self.task_id = task_id
        self.previous = previous
        self.joins = joins


_sending: ContextVar[_Sending | None] = ContextVar("otelexec_celery_sending", default=None)
_outgoing: ContextVar[_Outgoing | None] = ContextVar("otelexec_celery_outgoing", default=None)


def wrap_send_task(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Celery.send_task`: what fails before the message is routed is a refused message, too."""

    @functools.wraps(original)
    def send_task(self: Any, name: str, *args: Any, **options: Any) -> Any:
        if not CHOICES.active:
            return original(self, name, *args, **options)
        sending = _Sending()
        token = _sending.set(sending)
        try:
            return original(self, name, *args, **options)
        except Exception as error:
            if not sending.reached:
                _record_refusal(name, options, error)
            raise
        finally:
            _sending.reset(token)

    return send_task


def _record_refusal(name: str, options: Mapping[str, Any], error: Exception) -> None:
    queue = options.get("queue")
    destination = queue if isinstance(queue, str) else getattr(queue, "name", None)
    task_id = options.get("task_id")

    def refuse(*, retry: bool) -> None:
        block = publish_block(str(name), destination=destination, system=SYSTEM, message_id=task_id, retry=retry)
        block.__enter__()
        block.__exit__(type(error), error, error.__traceback__)

    if not options.get("retries"):
        refuse(retry=False)
        return
    with _retrying(task_id, options.get("headers")) as (retry, _):
        refuse(retry=retry)


def wrap_create_task_sender(original: Callable[[Any], Callable[..., Any]]) -> Callable[[Any], Callable[..., Any]]:
    """Wrap `AMQP._create_task_sender`, whose result hands every task message to the broker."""

    @functools.wraps(original)
    def create_task_sender(self: Any) -> Callable[..., Any]:
        return wrap_sender(original(self), self)

    return create_task_sender


def wrap_sender(sender: Callable[..., Any], amqp: Any) -> Callable[..., Any]:
    """
    Wrap a `send_task_message`.

    Args:
        sender: What `AMQP._create_task_sender` made.
        amqp: The AMQP object that it was made for.
    """

    @functools.wraps(sender)
    def send_task_message(producer: Any, name: str, message: Any, *args: Any, **options: Any) -> Any:
        if not CHOICES.active:
            return sender(producer, name, message, *args, **options)
        sending = _sending.get()
        if sending is not None:
            sending.reached = True
        custom = options.get("headers")
        task_id, retries = _identity(message)
        destination = _destination(amqp, options)
        _keep_last()

        def send(previous: str | None, *, retry: bool) -> Any:
            with publish_block(name, destination=destination, system=SYSTEM, message_id=task_id, retry=retry) as outgoing:
                token = _outgoing.set(_Outgoing(outgoing, task_id, previous, joins(task_id, custom, retry=retry)))
                try:
                    return sender(producer, name, message, *args, **options)
                except (TimeoutError, SoftTimeLimitExceeded):
                    outgoing.acceptance_unknown()
                    raise
                finally:
                    _outgoing.reset(token)

        if not retries:
            return send(None, retry=False)
        with _retrying(task_id, custom) as (retry, previous):
            return send(previous, retry=retry)

    return send_task_message


def _identity(message: Any) -> tuple[str | None, int]:
    """Give task id and retries of a task message of either protocol."""
    headers, _, body = message[0], message[1], message[2]
    found = headers if "id" in headers else body if isinstance(body, Mapping) else {}
    return found.get("id"), found.get("retries") or 0


def _destination(amqp: Any, options: Mapping[str, Any]) -> str | None:
    """Give the queue that a message is routed to, or else its routing key."""
    queue, exchange = options.get("queue"), options.get("exchange")
    if queue is None and exchange is None:
        queue = amqp.app.conf.task_default_queue
    if queue is not None:
        return queue if isinstance(queue, str) else getattr(queue, "name", None)
    return options.get("routing_key") or getattr(exchange, "name", exchange)


@contextmanager
def _retrying(task_id: str | None, custom: Any) -> Iterator[tuple[bool, str | None]]:
    """
    Make the context in which a retry of a task is sent: that of the attempt that it retries.

    Args:
        task_id: The message's task id.
        custom: The headers that it is sent with: what a retry copies from the request.

    Yields:
        Whether it is a retry, and the `traceparent` of the attempt that asks for it.
    """
    base = otel_context.get_current()
    execution = _task_execution(base, task_id)
    if execution is not None:
        context = otel_context.set_value(EXECUTION_KEY, execution, base)
        previous = encode_traceparent(execution.span.get_span_context()) if execution.span.get_span_context().is_valid else None
    else:
        # Sent by whoever has the request but not the execution, as the main process does for a worker that was lost.
        found = carrier.find(custom)
        if not found:
            yield False, None
            return
        context, _ = incoming(carrier.carrier_of(found), message_id=task_id)
        previous = carrier.text_of(found, "traceparent")
    token = otel_context.attach(context)
    try:
        yield True, previous
    finally:
        otel_context.detach(token)


def _task_execution(context: otel_context.Context, task_id: str | None) -> RunningExecution | None:
    """Give the execution of the task that is being run here, if it is this one."""
    task = get_current_worker_task()
    if task is None or task.request.id != task_id:
        return None
    found = otel_context.get_value(EXECUTION_KEY, context)
    own = TASK_EXECUTION.get()
    if not isinstance(found, RunningExecution) or own is None:
        return own
    # Inside a core the core's attempt is retried; inside any other execution within the task, the task's.
    return found if found.outer is own else own


def on_before_publish(headers: Any = None, **_: Any) -> None:
    """Write what the message carries, when everybody else has written into its headers."""
    outgoing = _outgoing.get()
    if outgoing is None or not isinstance(headers, dict):
        return
    carried = entries(outgoing.context, outgoing.message.correlation, message_id=outgoing.task_id)
    carried[carrier.ENQUEUED] = str(time.time_ns())
    if outgoing.previous is not None:
        carried[carrier.PREVIOUS] = outgoing.previous
    if outgoing.joins is not None:
        carried[carrier.JOINS] = outgoing.joins
    carrier.write(headers, carried)


def _keep_last() -> None:
    """Have our receiver called after all others, also after those that were connected since."""
    signal: Any = signals.before_task_publish
    receivers: list[Any] = signal.receivers or []
    if receivers and receivers[-1][1] is on_before_publish:
        return
    with signal.lock:  # not by `disconnect`: what another thread publishes in that moment would carry nothing
        ours = [entry for entry in receivers if entry[1] is on_before_publish]
        receivers[:] = [*(entry for entry in receivers if entry[1] is not on_before_publish), *ours]
        signal.sender_receivers_cache.clear()
