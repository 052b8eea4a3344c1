"""What an adapter's instrumentor was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from otelexec import runtime as _runtime
from otelexec.patches import Patches


@dataclass(slots=True)
class Choices:
    """
    The arguments of an instrumentor's `instrument()`, for the wrappers that it puts into somebody else's library.

    Attributes:
        active: Whether the library is instrumented: wrappers that could not be removed do nothing else.
        use_span_links: Link to the PRODUCER span instead of taking it as the parent; None: as in otelexec's settings.
    """

    active: bool = False
    use_span_links: bool | None = None

    def activate(self, arguments: Mapping[str, Any]) -> Patches:
        """
        Take the arguments over, and turn the adapter on.

        Args:
            arguments: `use_span_links`, and `tracer_provider` as for `otelexec.configure`; others, which a loader may
                give, mean nothing.

        Returns:
            What the adapter is to note its changes in; undoing them turns it off, too.
        """
        if arguments.get("tracer_provider") is not None:
            _runtime.use_provider(arguments["tracer_provider"])
        self.use_span_links = arguments.get("use_span_links")
        self.active = True
        patches = Patches()
        patches.on_undo(self._deactivate)
        return patches

    def _deactivate(self) -> None:
        self.active = False
