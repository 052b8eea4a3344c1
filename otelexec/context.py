"""What otelexec keeps in the OpenTelemetry context, and the few questions asked of it."""

from __future__ import annotations

import contextlib
from contextvars import Token
from typing import TYPE_CHECKING, Protocol, cast

from opentelemetry import context as otel_context

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from otelexec.correlation import Correlation, Scope

SCOPE_KEY = otel_context.create_key("otelexec-scope")
EXECUTION_KEY = otel_context.create_key("otelexec-execution")


class CurrentExecution(Protocol):
    """What propagation needs to know of the execution that is current in a context."""

    @property
    def id(self) -> str | None:
        """Give the execution id; None only for the handle outside any execution."""
        ...

    @property
    def correlation(self) -> Correlation:
        """Give the correlation that the execution runs under."""
        ...

    def mark_retry_sent(self) -> None:
        """Note that a message with this execution's own id goes out, so that a failure ends as `retrying`."""
        ...

    def mark_retry_refused(self) -> None:
        """Note that the backend refused such a message after all."""
        ...


def detach(token: Token[Context]) -> None:
    """
    Put back the context that was current before, as far as that can be done.

    A coroutine or generator that is dropped ends in another context than the one that it ran in, and so does one that a
    framework enters and leaves in different threads or tasks (FastAPI's dependencies, asynchronous fixtures).
    OpenTelemetry logs that as an error; here it is the normal case, and there is nothing to put back.

    Args:
        token: What `attach` gave.
    """
    if not isinstance(token, Token):  # another implementation of OpenTelemetry's context
        otel_context.detach(token)
        return
    with contextlib.suppress(ValueError):
        token.var.reset(token)


def current_scope(context: Context | None = None) -> Scope | None:
    """
    Give the innermost `correlate()` or `extract()` scope.

    Args:
        context: Where to look; None means the current context.
    """
    return cast("Scope | None", otel_context.get_value(SCOPE_KEY, context))


def current_execution(context: Context | None = None) -> CurrentExecution | None:
    """
    Give the execution that is current, also when it has ended or was inherited over a fork.

    Args:
        context: Where to look; None means the current context.
    """
    return cast("CurrentExecution | None", otel_context.get_value(EXECUTION_KEY, context))
