"""The tasks that a local worker runs: callables of one argument, by id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

from otelexec.errors import SettingsError
from otelexec_trigger.executors import is_same, name_of, place_of

Function = TypeVar("Function", bound=Callable[[Any], Any])

TASKS: Final[dict[str, Callable[[Any], Any]]] = {}
"""What `task` has registered in this process, by task id."""


def task(task_id: str) -> Callable[[Function], Function]:
    """
    Register a function, or coroutine function, as a task of `otelexec trigger worker`.

    It is called with the decoded payload: what JSON makes of it, `str` for `text/plain`, None without one; without the
    reserved key `_otelexec`. What it returns is the run's output, as JSON. The execution around it is
    `otelexec.current_execution()`.

    Args:
        task_id: What it is triggered by.

    Raises:
        SettingsError: The id is none, or another function has it.
    """
    given: Any = task_id  # `@task` without the id gives the function itself
    if not isinstance(given, str) or not given:
        raise SettingsError("task() takes the task's id: @task('send-invoice')")

    def register(function: Function) -> Function:
        known = TASKS.get(task_id)
        if known is not None and not is_same(known, function):
            first, second = (f"{name_of(each)} {place_of(each)}".rstrip() for each in (known, function))
            raise SettingsError(f"the task {task_id!r} is {first} already, and can't be {second} as well")
        TASKS[task_id] = function
        return function

    return register
