"""What the instrumentor was asked for, and the names that RQ goes by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SYSTEM: Final = "rq"
"""`messaging.system`."""


@dataclass(slots=True)
class Choices:
    """
    The arguments of `RQInstrumentor.instrument()`.

    Attributes:
        active: Whether RQ is instrumented: wrappers that could not be removed do nothing else.
        use_span_links: Link to the PRODUCER span instead of taking it as the parent; None: as in otelexec's settings.
    """

    active: bool = False
    use_span_links: bool | None = None


CHOICES = Choices()
