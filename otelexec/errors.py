"""
Every error that otelexec raises, in one tree.

    OtelexecError
    |-- SettingsError (also ValueError)      a setting can't be used; the command line exits with 2
    |-- CorrelationError (also ValueError)   correlate() got fields that it can't carry
    |-- CarrierError (also TypeError)        inject*() got something that can't carry the context
    |-- ExecutionError (also RuntimeError)   a call that the execution's state forbids
    |-- StoreError
    |   |-- StoreNotFound                    a reading command found no store; nothing was created
    |   |-- StoreUnavailable                 read-only, full, unreachable: worth another try
    |   |   `-- StoreBusy                    another process or thread is writing
    |   |       `-- StoreReentered           this very thread is, and what it does now has interrupted it
    |   |-- StoreRejected                    the store took the transaction but not this write
    |   `-- StoreVersionError                the schema is newer than this library, or older and not this process's to upgrade
    |-- ExecutionCancelled                   somebody cancelled the execution before it started; or the function heeds a wish
    `-- ExecutionBusy                        an exclusive attempt found another one running

The first paragraph of a class's docstring is its default message, so that no error is ever blank.
"""

from __future__ import annotations


class OtelexecError(Exception):
    """Something in otelexec failed. The cause, where there is one, is in `__cause__`."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip().partition("\n\n")[0])


class SettingsError(OtelexecError, ValueError):
    """A setting can't be used. Correct the argument or the OTELEXEC_* variable that the message names."""


class CorrelationError(OtelexecError, ValueError):
    """These correlation fields can't be carried. Use the source's own fields, and `attributes` for all others."""


class CarrierError(OtelexecError, TypeError):
    """This object can't carry the context. Give inject() a mapping with string keys."""


class ExecutionError(OtelexecError, RuntimeError):
    """The execution's state forbids this call."""


class StoreError(OtelexecError):
    """The store could not do what was asked."""


class StoreNotFound(StoreError):
    """There is no store at this place. Run an execution first, or set OTELEXEC_STORE to where it is."""


class StoreUnavailable(StoreError):
    """The store can't be written at the moment. The work goes on and the record waits in the spool."""


class StoreBusy(StoreUnavailable):
    """Another process or thread is writing to the store, and took longer than this one may wait."""


class StoreReentered(StoreBusy):
    """A signal handler or a finalizer has interrupted a commit of its own thread, which goes on only after it."""


class StoreRejected(StoreError):
    """
    The store refused this one write, and would refuse it again.

    Attributes:
        reason: Why, without naming the store, for whom that does not concern.
    """

    def __init__(self, message: str | None = None, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class StoreVersionError(StoreError):
    """The store was written by a newer otelexec. Upgrade this one: `pip install -U otelexec`."""


class ExecutionCancelled(OtelexecError):
    """
    The execution was cancelled.

    A call of a decorated function raises it where that was asked for before it started: the function was not called. A function
    that sees `.cancel_requested` may raise it itself, and its attempt ends as `cancelled`.

    Attributes:
        execution_id: Which execution; None when unknown.
    """

    def __init__(self, message: str | None = None, *, execution_id: str | None = None) -> None:
        super().__init__(message)
        self.execution_id = execution_id


class ExecutionBusy(OtelexecError):
    """
    Another attempt of the execution runs, or there is nothing left to attempt, so the function was not called.

    Attributes:
        execution_id: Which execution; None when unknown.
    """

    def __init__(self, message: str | None = None, *, execution_id: str | None = None) -> None:
        super().__init__(message)
        self.execution_id = execution_id
