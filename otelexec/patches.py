"""
Changes to somebody else's library that can be undone, and wrappers that keep what goes wrong in us away from it.

For adapters: attributes that are replaced, signals that are listened to, calls of ours before and after theirs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from otelexec.endings import raised_by_signal_handler

_NOTHING: Any = object()


class Patches:
    """What was changed, in order; `undo()` puts everything back as it was."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """
        Replace an attribute of a class or a module.

        Args:
            owner: Where it is; an inherited attribute is left alone where it is, and shadowed here.
            name: The attribute; nothing happens where this version does not have it.
            make: Takes what is there and gives what is to be there.
        """
        original = getattr(owner, name, _NOTHING)
        if original is _NOTHING:
            return
        own = vars(owner).get(name, _NOTHING)
        replacement = make(original)
        setattr(owner, name, replacement)

        def undo() -> None:
            # Somebody else's wrapper around ours stays; ours below it does nothing any more.
            if vars(owner).get(name) is not replacement:
                return
            if own is _NOTHING:
                delattr(owner, name)
            else:
                setattr(owner, name, own)

        self._undo.append(undo)

    def listen(self, signal: Any, receiver: Callable[..., Any]) -> None:
        """Connect a receiver to a signal; strongly, since nobody else may hold it."""
        signal.connect(receiver, weak=False)
        self._undo.append(lambda: signal.disconnect(receiver))

    def on_undo(self, function: Callable[[], None]) -> None:
        """Have a function called when everything is put back."""
        self._undo.append(function)

    def undo(self) -> None:
        """Put everything back, the last change first."""
        while self._undo:
            self._undo.pop()()


class Guard:
    """
    Makes wrappers around somebody else's functions: what we do beside theirs never breaks theirs.

    Args:
        is_active: Whether the adapter is on; wrappers that could not be removed do nothing otherwise.
        logger: Where what went wrong is said.
        passes: Tells exceptions that are not ours to keep away: by default those that a signal handler raised.
    """

    def __init__(
        self, is_active: Callable[[], bool], logger: logging.Logger, passes: Callable[[BaseException], bool] = raised_by_signal_handler
    ) -> None:
        self._is_active = is_active
        self._logger = logger
        self._passes = passes

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of ours, whether the adapter is on or not; gives None when something goes wrong in it."""
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if self._passes(error):
                raise
            self._logger.exception("%s.failed: %s", self._logger.name, function.__name__)
            return None

    def guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a function of ours that gives None when the adapter is off, or when something goes wrong in it."""

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            return self.call(function, *args, **kwargs) if self._is_active() else None

        return guarded

    def before(self, first: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Make a wrapper that calls something of ours, with the same arguments, before the original."""
        guarded = self.guarded(first)

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                guarded(*args, **kwargs)
                return original(*args, **kwargs)

            return wrapper

        return make

    def after(self, then: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Make a wrapper that calls something of ours, with the same arguments, after the original."""
        guarded = self.guarded(then)

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                try:
                    return original(*args, **kwargs)
                finally:
                    guarded(*args, **kwargs)

            return wrapper

        return make
