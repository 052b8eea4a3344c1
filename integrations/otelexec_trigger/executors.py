"""Executors of any kind: functions and coroutine functions, partials, objects that can be called, wrappers that give a coroutine."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def name_of(executor: Callable[..., Any]) -> str:
    """Give the qualified name of any callable, such as a partial or an object that can be called."""
    target = executor
    while isinstance(target, functools.partial):
        target = target.func
    target = inspect.unwrap(target)
    named = target if hasattr(target, "__qualname__") else type(target)
    return f"{named.__module__}.{named.__qualname__}"


def is_coroutine_function(executor: Callable[..., Any]) -> bool:
    """Tell whether a callable is a coroutine function, or an object that is called like one."""
    target = inspect.unwrap(executor)
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(target.__call__)


async def awaited(value: Any) -> Any:
    """Give a value, or what it becomes if it can be awaited."""
    return await value if inspect.isawaitable(value) else value


def run_to_end(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end, also where this thread's event loop is running already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1, thread_name_prefix="otelexec-trigger") as pool:
        return pool.submit(contextvars.copy_context().run, asyncio.run, coroutine).result()
