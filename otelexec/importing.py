"""
What background threads import when they first need it, which no fork may happen amid.

A forked child inherits the import locks of its parent's other threads, and nobody who would ever let them go: whatever it
imports that was being imported at that moment, it waits for until it is killed. So who imports in a background thread holds
`importing`, and a fork waits for it.
"""

from __future__ import annotations

import os
import threading
from typing import Final

FORK_PATIENCE_SECONDS: Final = 10.0
"""How long a fork waits at most; an import takes a fraction of a second, on a busy machine a few."""

importing: Final = threading.Lock()
"""To be held around imports in background threads."""

_here = threading.local()  # two threads may fork at the same time


def _before_fork() -> None:
    _here.held = importing.acquire(timeout=FORK_PATIENCE_SECONDS)


def _after_fork() -> None:
    if _here.held:
        importing.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
