"""Chords: the headers note their spans under the body's task id, and the body links to all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from celery._state import get_current_worker_task

from otelexec_celery import carrier

UNLOCK: Final = "celery.chord_unlock"

_MADE_OF: Final = {"chain": "tasks", "group": "tasks", "chord": "header"}
"""Where the signatures stand that a signature is made of and that are sent first."""


def body_id(signature: Any) -> str | None:
    """Give the task id of a chord's body, of its first task if it is a chain or a group; None where it can't be told."""
    return next(_starts(signature), None)


def _starts(signature: Any) -> Iterator[str]:
    """
    Give the task ids, frozen when the chord is sent, of what it sends first as its body.

    That is of a chain its first task, of a group every one. A chain has no id of its own in every version of Celery.
    """
    if not isinstance(signature, Mapping):
        return
    kind, arguments, options = (signature.get(name) for name in ("subtask_type", "kwargs", "options"))
    if kind in _MADE_OF and isinstance(arguments, Mapping):
        parts = arguments.get(_MADE_OF[kind])
        if isinstance(parts, Mapping):  # the header of a chord is a list, or a group
            yield from _starts(parts)
        elif isinstance(parts, Sequence):
            for part in parts[:1] if kind == "chain" else parts:
                yield from _starts(part)
    elif isinstance(options, Mapping) and options.get("task_id") is not None:
        yield options["task_id"]


def joins(task_id: str | None, custom: Any, *, retry: bool) -> str | None:
    """
    Give the task id under which the headers of a chord noted their spans, if a message is the chord's body or begins it.

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
    bodies = [] if request.chord is None else [request.chord]
    if task.name == UNLOCK:  # where the result backend can't count, this waits for the headers and sends the body
        bodies += request.args or ()
    return next((body_id(body) for body in bodies if task_id in _starts(body)), None)
