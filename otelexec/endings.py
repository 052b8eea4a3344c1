"""How code ended: the ending before the store has its say, and what an exception tells about it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import CodeType, FrameType
from typing import Any

from otelexec.store.rows import ENDED_STATES, PAUSED, SUCCEEDED
from otelexec.w3c import clean

_ENDS = ENDED_STATES | {PAUSED}


@dataclass(frozen=True, slots=True)
class Ending:
    """
    How the code of an attempt ended, before the store had its say.

    Attributes:
        state: `succeeded`, `failed`, `timed_out`, `cancelled`, `paused`, `rejected` or `lost`.
        classification: What kind of it, where that says more; None otherwise.
        error_type: Fully qualified class of the exception, or a reason; None when there was no error.
        error_message: Its text.
        exception: What was raised, for the span's event; None when nothing was.
        depends_on_cancellation: Whether a cancellation in the store makes another ending of it.
        retrying: Whether another attempt is already on its way.

    Raises:
        ValueError: The state is none that an attempt can end in.
    """

    state: str
    classification: str | None = None
    error_type: str | None = None
    error_message: str | None = None
    exception: BaseException | None = None
    depends_on_cancellation: bool = False
    retrying: bool = False

    def __post_init__(self) -> None:
        """Make text of what isn't, and text that can be written as UTF-8: reasons and classifiers are the user's."""
        if self.state not in _ENDS:
            raise ValueError(f"{self.state!r} is no state that an attempt can end in: {', '.join(sorted(_ENDS))}")
        for name in ("classification", "error_type", "error_message"):
            value = getattr(self, name)
            if value is not None and not (type(value) is str and value.isascii()):
                object.__setattr__(self, name, clean(str(value)))


RETURNED = Ending(SUCCEEDED)
"""The ending of code that returned."""

Classifier = Callable[[BaseException], "Ending | None"]
"""Takes what the code raised and gives its ending, or None to leave it to the default. An adapter's way to know the
backend's own exceptions."""


def describe(exception: BaseException, max_chars: int) -> tuple[str, str]:
    """
    Give the fully qualified class of an exception and its text, whatever its `__str__` and its metaclass do.

    Args:
        exception: The exception.
        max_chars: Longest text in characters.
    """
    try:
        text = str.__str__(str(exception))  # of str itself: a subclass may have methods that raise
    except BaseException as error:  # the user's __str__ may raise anything
        if is_interrupted(error):
            raise
        text = f"<its text could not be made: {_name(error)}>"
    if len(text) > max_chars:
        text = text[: max_chars - 1] + "\u2026"
    return clean(_name(exception)), text.encode("utf-8", "backslashreplace").decode("utf-8")


def _name(exception: BaseException) -> str:
    # Past the class's own metaclass, which may raise anything, too.
    module, name = (type.__dict__[attribute].__get__(type(exception)) for attribute in ("__module__", "__qualname__"))
    return str(name) if type(module) is not str or module == "builtins" else f"{module}.{name}"


_MARK = "__otelexec_finalized__"


def mark_finalized(exception: BaseException, execution_id: str) -> None:
    """Note on an exception that the execution that it ended is durably recorded."""
    # Not by setattr: classes may forbid it (frozen dataclasses do), but every exception has a __dict__.
    BaseException.__setattr__(exception, _MARK, execution_id)


def was_finalized(exception: BaseException) -> bool:
    """
    Tell outer code whether the execution that raised this has its durable record already.

    Args:
        exception: What came out of the executor.

    Returns:
        False also when the record could not be kept anywhere but in a log line.
    """
    return _MARK in BaseException.__getattribute__(exception, "__dict__")


def raised_by_signal_handler(exception: BaseException) -> bool:
    """Tell whether an exception came out of a signal handler, and so has nothing to do with the code that it hit."""
    handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()}
    handlers.discard(None)
    traceback = exception.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code in handlers or _is_called_with(frame, frame.f_back):
            return True
        traceback = traceback.tb_next
    return False


def is_interrupted(exception: BaseException) -> bool:
    """Tell whether a signal ended the code: one that somebody handles, or a Ctrl-C where nobody does."""
    is_ctrl_c = isinstance(exception, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return is_ctrl_c or raised_by_signal_handler(exception)


def _is_called_with(frame: FrameType, caller: FrameType | None) -> bool:
    """Tell whether a function got its own caller's frame: nothing but a signal handler does, also one that has uninstalled itself."""
    code = frame.f_code
    return caller is not None and any(frame.f_locals.get(name) is caller for name in code.co_varnames[: code.co_argcount])


def _code_of(handler: Any) -> CodeType | None:
    while isinstance(handler, partial):
        handler = handler.func
    function = getattr(handler, "__func__", handler)
    code = getattr(function, "__code__", None)
    if code is None and callable(handler):
        code = getattr(type(handler).__call__, "__code__", None)
    return code if isinstance(code, CodeType) else None
