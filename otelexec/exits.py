"""What a process may still wait for at its end."""

from __future__ import annotations

import threading
from collections.abc import Callable


def call_within(timeout_seconds: float, function: Callable[[], object], name: str) -> None:
    """
    Call what may hang, and leave it behind when the time is over.

    Args:
        timeout_seconds: How long to wait for it.
        function: What to call.
        name: Name of the thread that calls it.
    """
    thread = threading.Thread(target=function, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter is shutting down and takes no new threads
        function()
        return
    thread.join(timeout_seconds)
