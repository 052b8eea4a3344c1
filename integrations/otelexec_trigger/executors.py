"""Executors of any kind: functions and coroutine functions, partials, objects that can be called, wrappers that give a coroutine."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from types import CodeType
from typing import Any


def name_of(executor: Callable[..., Any]) -> str:
    """Give the qualified name of any callable, such as a partial or an object that can be called."""
    target = _unwrapped(executor)
    named = target if hasattr(target, "__qualname__") else type(target)
    return f"{named.__module__}.{named.__qualname__}"


def is_same(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Tell whether two callables are one of the source: also when its module was imported again, or made it by a call again."""
    first, second = _unwrapped(one), _unwrapped(other)
    if name_of(first) != name_of(second):
        return False
    if getattr(first, "__globals__", None) is not getattr(second, "__globals__", None):
        return True  # of a module that was imported again, in which lines may have moved
    # Lambdas and functions of one name: what tells them apart is where they stand.
    return place_of(first) == place_of(second)


def place_of(executor: Callable[..., Any]) -> str:
    """Give file and line of a function; empty for anything else that can be called."""
    code = getattr(_unwrapped(executor), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if isinstance(code, CodeType) else ""


def _unwrapped(executor: Callable[..., Any]) -> Any:
    target = executor
    while isinstance(target, functools.partial):
        target = target.func
    return inspect.unwrap(target)


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
