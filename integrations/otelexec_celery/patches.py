"""Changes to Celery that can be undone: attributes that are replaced, and signals that are listened to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
            name: The attribute; nothing happens where this Celery does not have it.
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
