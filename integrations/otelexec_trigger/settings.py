"""The names that the local engine goes by, and its fixed limits."""

from __future__ import annotations

from typing import Final

SYSTEM: Final = "otelexec"
"""`messaging.system` of runs that the local engine runs."""

MAX_OUTPUT_BYTES: Final = 10 * 1024 * 1024
"""Largest output of a run, in bytes of JSON: as large as Trigger.dev's. What is larger is left out, with a warning."""

POLL_SECONDS: Final = 0.2
"""How often an idle worker looks for runs."""

SWEEP_SECONDS: Final = 1.0
"""How often workers and servers look for runs that expired, were cancelled, or lost their worker."""

CANCEL_GRACE_SECONDS: Final = 10.0
"""How long a task that was cancelled, and can't be stopped in Python, may go on before its process is killed."""

LEFTOVER_SECONDS: Final = 10.0
"""How long threads and coroutines that a task has left behind may keep their process from its next run, or from its end."""

LIMIT_GRACE_SECONDS: Final = 1.0
"""How long a task over its `maxDuration` may go on before its process is killed."""

STOP_SECONDS: Final = 30.0
"""How long a worker that is told to end waits for its tasks before it kills them; they are attempted again elsewhere."""
