"""Which of the cores that are called inside one execution is which."""

from __future__ import annotations

import threading
from typing import Literal

from otelexec.store.rows import SUCCEEDED

_RUNNING = "running"


class Cores:
    """
    The cores that are called inside one execution, by whichever of its threads.

    The first takes the execution's attempt over. One after another that did not succeed is a further attempt. Any other is a
    child: while another core runs, and after one that succeeded.
    """

    __slots__ = ("_before", "_claim", "_lock", "_state")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state: str | None = None
        self._before: str | None = None
        self._claim: object = None

    @property
    def begun(self) -> bool:
        """Whether a core took the attempt over."""
        return self._state is not None

    def enter(self, claim: object) -> Literal["takes_over", "next"] | None:
        """
        Decide, once and for all threads, what a core is that is called now.

        Args:
            claim: Of the caller alone, for `release`.

        Returns:
            `takes_over` for the first, `next` for a further attempt, None for a child.
        """
        with self._lock:
            before = self._state
            if before in (_RUNNING, SUCCEEDED):
                return None
            self._before, self._claim, self._state = before, claim, _RUNNING
            return "takes_over" if before is None else "next"

    def release(self, claim: object) -> None:
        """Be as before `enter`, if that was asked with this claim: the core did not begin."""
        if self._claim is claim:
            self._state, self._claim = self._before, None

    def leave(self, state: str) -> None:
        """Learn how the core ended."""
        self._state, self._claim = state, None
