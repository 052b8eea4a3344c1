"""The options of an execution, as the decorator, the adapters and the lifecycle share them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opentelemetry import trace

from otelexec.endings import Classifier
from otelexec.errors import SettingsError
from otelexec.w3c import clean

if TYPE_CHECKING:
    from opentelemetry.trace import Link


@dataclass(frozen=True, slots=True)
class Options:
    """
    The options of `execution()`.

    Attributes:
        name: Name of the execution and of its span.
        core: Whether this is the job itself, which takes over the attempt of the execution around it.
        timeout: Seconds after which asynchronous code is stopped; for anything else a deadline to look at. None: no limit.
        kind: The span's kind.
        attributes: Further span attributes.
        link_carried: Link to the carried context instead of taking it as the parent; None means as in the settings.
        links: Further span links.
        classify: Knows exceptions that are not failures; None means the default for all.
        cancel_wins: Whether a cancellation that was asked for makes the attempt `cancelled` although the code returned or failed.
        finalized_by: Which path is named on the record.
        token: The attempt's fencing token, where another process knows it as well; None mints one.
        accepted: Whether a parent process may have opened the attempt under the token: then it becomes this one's.
        exclusive: Whether the code is called only if no other attempt of the execution runs, which the store decides: an
            attempt that it can't open there is none.
        takes_lapsed: Whether, with `exclusive`, a running attempt of a process whose lease has lapsed does not count.
        expected_attempts: With `exclusive`, how many attempts the execution had when the caller looked; the code is not called
            when there were more since. None: any number.
        max_output_bytes: Largest output in bytes of JSON; None means as in the settings.
        number: The attempt's number where the backend counts the attempts itself; the store's own count is never gone below.
            None: the store counts.

    Raises:
        SettingsError: The timeout is no number of seconds above 0.
    """

    name: str
    core: bool = False
    timeout: float | None = None
    kind: trace.SpanKind = trace.SpanKind.INTERNAL
    attributes: Mapping[str, Any] | None = None
    link_carried: bool | None = None
    links: tuple[Link, ...] = ()
    classify: Classifier | None = None
    cancel_wins: bool = False
    finalized_by: str = "executor"
    token: str | None = None
    accepted: bool = False
    exclusive: bool = False
    takes_lapsed: bool = False
    expected_attempts: int | None = None
    max_output_bytes: int | None = None
    number: int | None = None

    def __post_init__(self) -> None:
        """Refuse a timeout that is none; a name that UTF-8 can't hold is written as near as it can be."""
        timeout: Any = self.timeout
        if timeout is not None and not (isinstance(timeout, int | float) and timeout > 0):
            raise SettingsError(f"timeout must be more than 0 seconds, not {timeout!r}. Leave it out for no limit.")
        if timeout is not None and timeout > threading.TIMEOUT_MAX:
            object.__setattr__(self, "timeout", threading.TIMEOUT_MAX)  # 292 years: what a deadline in nanoseconds can hold
        object.__setattr__(self, "name", clean(str(self.name)))
