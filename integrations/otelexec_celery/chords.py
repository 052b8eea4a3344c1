"""Chords: the headers note their spans under the body's task id, and the body links to all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from celery._state import get_current_worker_task

from otelexec_celery import carrier

UNLOCK: Final = "celery.chord_unlock"


def body_id(signature: Any) -> str | None:
    """Give the task id of a chord's body, which is frozen when the chord is sent; None where it can't be told."""
    options = signature.get("options") if isinstance(signature, Mapping) else None
    return options.get("task_id") if isinstance(options, Mapping) else None


def joins(task_id: str | None, custom: Any, *, retry: bool) -> str | None:
    """
    Give the task id under which the headers of a chord noted their spans, if a message is the chord's body.

    Args:
        task_id: The message's task id.
        custom: The headers that it is sent with.
        retry: Whether it asks for another attempt: then the attempt before it knew.
    """
    if retry:
        return carrier.text_of(carrier.find(custom), carrier.JOINS)
    task = get_current_worker_task()
    if task is None or task_id is None:
        return None
    request = task.request
    if request.chord is not None and body_id(request.chord) == task_id:
        return task_id
    # Where the result backend can't count, a task of Celery's own waits for the headers and sends the body.
    if task.name == UNLOCK and any(body_id(argument) == task_id for argument in request.args or ()):
        return task_id
    return None
