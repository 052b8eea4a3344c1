"""`execution(...)` over functions, coroutines, generators and methods, and as a context manager; `wrap_executor`."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import logging
import pickle
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ParamSpec, TypedDict, TypeVar, Unpack, overload

import wrapt
from opentelemetry.trace import Link, SpanKind

from otelexec import runtime as _runtime
from otelexec.blocks import Block
from otelexec.drivers import call_async, call_either, iterate_async, iterate_sync
from otelexec.endings import Classifier
from otelexec.errors import SettingsError
from otelexec.handle import Execution
from otelexec.lifecycle import Steps, lifecycle
from otelexec.options import Options

logger = logging.getLogger("otelexec")

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound="classmethod[Any, ..., Any] | functools.partialmethod[Any] | functools.singledispatchmethod[Any]")


class _BoundExecutor(wrapt.BoundFunctionWrapper):  # type: ignore[type-arg] # which is none while it runs
    """A decorated executor that was got from an object or a class. It is copied, pickled and taken apart as a method is."""

    def __init__(self, wrapped: Any, instance: Any, *binding: Any) -> None:
        if not binding:  # as a method's class is called, by `weakref.WeakMethod` with what stood in `__func__`
            bound = wrapped.__get__(instance, type(instance))
            wrapped = bound.__wrapped__
            binding = (bound._self_wrapper, bound._self_enabled, bound._self_binding, bound._self_parent)  # noqa: SLF001 (one of ours)
        super().__init__(wrapped, instance, *binding)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue] # wrapt shows its base's

    @property
    def __func__(self) -> Any:
        method: Any = self.__wrapped__
        function, executor = method.__func__, self._self_parent
        return executor if executor.__wrapped__ is function else function

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        owner = getattr(self, "__self__", None)
        return self if owner is None else getattr(copy.deepcopy(owner, memo), self.__wrapped__.__name__)

    def __reduce_ex__(self, protocol: Any) -> Any:
        method = self.__wrapped__
        owner = getattr(method, "__self__", None)
        return (_named, (method.__module__, method.__qualname__)) if owner is None else (getattr, (owner, method.__name__))


class _Executor(wrapt.FunctionWrapper):  # type: ignore[type-arg] # as above
    """
    A decorated executor. It is copied and pickled as the function in it is, by its name.

    wrapt refuses both, and process pools send the function that they are to call.
    """

    # Without an annotation: the class would have `__annotations__` of its own, before the function's that wrapt shows.
    __bound_function_wrapper__ = _BoundExecutor

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        name = getattr(self.__wrapped__, "__qualname__", None)
        if name is None:
            raise pickle.PicklingError(f"can't pickle the execution of {self.__wrapped__!r}: it has no name to be found by")
        return name


def _named(module: str, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))


class ExecutionDecorator(Block[Execution]):
    """
    What `execution(...)` gives: a decorator, a context manager and an async context manager.

    Args:
        options: The options; without a name it serves as a decorator only.
    """

    def __init__(self, options: Options) -> None:
        super().__init__()
        self._options = options

    @overload
    def __call__(self, function: Callable[P, R]) -> Callable[P, R]: ...

    @overload
    def __call__(self, function: M) -> M: ...

    def __call__(self, function: Any) -> Any:
        """
        Wrap a function, coroutine function, generator function, method or classmethod; its signature stays.

        Raises:
            SettingsError: This is nothing that can be called: a property, or the coroutine that a call gave.
        """
        return _decorated(function, self._options)

    def _lifecycle(self, runtime: _runtime.Runtime) -> Steps:
        if not self._options.name:
            raise SettingsError("A block has no name of its own: write `with otelexec.execution(NAME):`.")
        return lifecycle(runtime, self._options)

    def _timeout(self) -> float | None:
        return self._options.timeout


def _decorated(function: Any, options: Options, enabled: Callable[[], bool] | None = None) -> Any:
    if isinstance(function, property | functools.cached_property):
        raise SettingsError("A property is read, not called: write @property above @otelexec.execution(...), not below it.")
    if issubclass(type(function), classmethod | staticmethod):  # itself, and no wrapper around one
        return type(function)(_decorated(function.__func__, options, enabled))
    if not callable(function) and not hasattr(type(function), "__get__"):
        kind = type(function).__name__
        raise SettingsError(f"An execution is made of what can be called, not of a {kind}: give it the function, not what a call gave.")
    target: Any = getattr(function, "__func__", function)
    while isinstance(target, functools.partial | functools.partialmethod | functools.singledispatchmethod):
        target = target.func
    if not options.name:
        named = inspect.unwrap(target)
        named = named if hasattr(named, "__qualname__") else type(named)
        options = replace(options, name=f"{named.__module__}.{named.__qualname__}")
    return _Executor(function, _wrapper_for(target, options), enabled)


def _wrapper_for(target: Any, options: Options) -> Callable[..., Any]:
    drive = _driver_for(target)
    name, path = (str(getattr(target, key, options.name)) for key in ("__name__", "__qualname__"))

    def wrapper(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        try:
            runtime = _runtime.get()
        except Exception:
            if not sys.is_finalizing():
                raise
            # A finalizer at the interpreter's end, where nothing can be imported any more.
            logger.error("otelexec.exit.unrecorded: %s has no record: the interpreter is shutting down", options.name)  # noqa: TRY400
            return wrapped(*args, **kwargs)
        given = drive(runtime, lifecycle(runtime, options), functools.partial(wrapped, *args, **kwargs), options.timeout)
        if drive is not call_either:  # asyncio and Python's warnings show a coroutine or generator by these
            given.__name__, given.__qualname__ = name, path
        return given

    return wrapper


def _driver_for(target: Any) -> Callable[..., Any]:
    """Give the driver for what a call of `target` gives, which for an object is what its `__call__` does."""
    if not inspect.isroutine(target) and not isinstance(target, type):
        target = inspect.getattr_static(target, "__call__", target)
    if inspect.isasyncgenfunction(target):
        return iterate_async
    if inspect.iscoroutinefunction(target):
        return call_async
    # Not what a wrapper wraps counts: `contextlib.contextmanager` gives no generator.
    awaited = getattr(getattr(target, "__code__", None), "co_flags", 0) & inspect.CO_ITERABLE_COROUTINE  # `types.coroutine`
    return iterate_sync if inspect.isgeneratorfunction(target) and not awaited else call_either


@overload
def execution(name: Callable[P, R], /) -> Callable[P, R]: ...


@overload
def execution(name: M, /) -> M: ...


@overload
def execution(
    name: str | None = None,
    /,
    *,
    core: bool = False,
    timeout: float | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Mapping[str, Any] | None = None,
    links: tuple[Link, ...] = (),
    link_carried: bool | None = None,
    classify: Classifier | None = None,
    cancel_wins: bool = False,
) -> ExecutionDecorator: ...


def execution(
    name: Any = None,
    /,
    *,
    core: bool = False,
    timeout: float | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Mapping[str, Any] | None = None,
    links: tuple[Link, ...] = (),
    link_carried: bool | None = None,
    classify: Classifier | None = None,
    cancel_wins: bool = False,
) -> Any:
    """
    Make an executor an execution: one durable record and one span, committed together.

    Use it bare or with options over `def`, `async def`, generators, methods and classmethods, or as
    `with execution("name") as run:` (and `async with`).

    Args:
        name: Name of the execution and of its span; None means the function's qualified name.
        core: Whether this executor is the job itself: called inside an open execution, it takes over that
            execution's attempt, and its success is final whatever the code around it does then.
        timeout: Seconds. A coroutine, an async generator or an `async with` block is cancelled after them and raises
            TimeoutError; anything else has a `.deadline` to look at. None: no limit.
        kind: The span's kind.
        attributes: Further span attributes.
        links: Further span links.
        link_carried: Link to the carried context instead of taking it as the parent; None: as in the settings.
        classify: Takes an exception and gives an `Ending` for those that are not failures, else None.
        cancel_wins: Whether a cancellation that was asked for counts although the code returned or failed.

    Raises:
        SettingsError: An option can't be used.
    """
    if callable(name) or hasattr(type(name), "__get__"):  # a method that is none before it is got from its class
        decorate: Any = ExecutionDecorator(Options(""))
        return decorate(name)
    options = _options(
        name,
        core=core,
        timeout=timeout,
        kind=kind,
        attributes=attributes,
        links=links,
        link_carried=link_carried,
        classify=classify,
        cancel_wins=cancel_wins,
    )
    return ExecutionDecorator(options)


def _options(name: Any, **options: Any) -> Options:
    """Check what would else fail where the executor is called."""
    kinds: dict[str, Any] = {"attributes": Mapping, "kind": SpanKind, "links": tuple | list, "classify": Callable}
    if not isinstance(name, str | None):
        raise SettingsError(f"An execution's name is text, not {name!r}.")
    for option, kind in kinds.items():
        value = options.get(option)
        if value is not None and not isinstance(value, kind):
            raise SettingsError(f"{option} of an execution can't be {value!r}.")
    return Options(name or "", **options)


class ExecutionOptions(TypedDict, total=False):
    """The options of `execution`, but for the name."""

    core: bool
    timeout: float | None
    kind: SpanKind
    attributes: Mapping[str, Any] | None
    links: tuple[Link, ...]
    link_carried: bool | None
    classify: Classifier | None
    cancel_wins: bool


class WrappedExecutor:
    """
    An executor that was wrapped from outside.

    Attributes:
        target: `module:Qualified.name`.
    """

    def __init__(self, target: str, options: Options) -> None:
        self.target = target
        self._module, _, self._path = target.partition(":")
        if not self._module or not self._path:
            raise SettingsError(f"wrap_executor takes `module:Qualified.name`, not {target!r}.")
        self._options = options
        self._lock = threading.Lock()
        self._undo: Callable[[], None] | None = None
        self._ended = False
        if self._module in sys.modules:
            self._wrap(sys.modules[self._module])
        else:
            wrapt.register_post_import_hook(self._wrap_imported, self._module)

    def _wrap_imported(self, module: Any) -> None:
        try:
            self._wrap(module)
        except Exception as error:  # it would come out of the user's import
            logger.error("otelexec.wrap.failed: %s is no execution: %s", self.target, error)  # noqa: TRY400 (the message says it all)

    def _wrap(self, module: Any) -> None:
        with self._lock:
            if self._ended or self._undo is not None:
                return
            try:
                parent, attribute, _ = wrapt.resolve_path(module, self._path)
            except AttributeError as error:
                raise SettingsError(f"wrap_executor: {self._module} has no {self._path}.") from error
            own = attribute in vars(parent)
            original = vars(parent)[attribute] if own else getattr(parent, attribute)
            wrapped = _decorated(original, self._options, lambda: not self._ended)
            setattr(parent, attribute, wrapped)

            def undo() -> None:
                # Only while it is ours: somebody else's wrapper around it stays, and ours below it does nothing any more.
                if vars(parent).get(attribute) is wrapped:
                    if own:
                        setattr(parent, attribute, original)
                    else:
                        delattr(parent, attribute)

            self._undo = undo

    @property
    def wrapped(self) -> bool:
        """Whether the executor has been found; False until its module is imported."""
        return self._undo is not None

    def unwrap(self) -> None:
        """Put the executor back as it was; one that was not imported yet stays as it is."""
        with self._lock:
            self._ended = True
            undo, self._undo = self._undo, None
            if undo is not None:
                undo()


def wrap_executor(target: str, *, name: str | None = None, **options: Unpack[ExecutionOptions]) -> WrappedExecutor:
    """
    Make an execution of an executor that can't be edited, also one that is not imported yet.

    Args:
        target: `module:Qualified.name`.
        name: Name of the execution; None means the executor's qualified name.
        **options: As for `execution`.

    Returns:
        A handle whose `.unwrap()` undoes it.

    Raises:
        SettingsError: The target is malformed, or its module is there and has no such name. One that is imported later and
            has none is an ERROR in the log.
    """
    return WrappedExecutor(target, _options(name, **options))
