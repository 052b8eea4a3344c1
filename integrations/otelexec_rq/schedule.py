"""What a clock asks for: a cron entry that is due, and the next run of a job that repeats itself."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import ExitStack
from datetime import MAXYEAR, UTC, datetime
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry.context import Context

from otelexec.correlation import correlate
from otelexec.w3c import clean
from otelexec_rq.settings import CHOICES

logger = logging.getLogger("otelexec.rq")


def wrap_cron_enqueue(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `CronJob.enqueue`, which sends an entry that is due: in a context of its own, with the schedule as source."""

    @functools.wraps(original)
    def enqueue(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not CHOICES.active:
            return original(self, *args, **kwargs)
        token = otel_context.attach(Context())
        try:
            with ExitStack() as stack:
                try:
                    name = getattr(self, "name", None) or self.func_name
                    stack.enter_context(correlate(source="schedule", schedule_id=clean(str(name)), scheduled_for=_due(self)))
                except Exception:  # settings that can't be read: the entry is sent all the same
                    logger.exception("otelexec.rq.failed: schedule of %s", self.func_name)
                return original(self, *args, **kwargs)
        finally:
            otel_context.detach(token)

    return enqueue


def _due(entry: Any) -> str | None:
    """Give when an entry was due; None for the first run of an interval, which is due at once."""
    due = getattr(entry, "next_enqueue_time", None) or getattr(entry, "next_run_time", None)
    if not isinstance(due, datetime) or due.year == MAXYEAR:
        return None
    return (due if due.tzinfo is not None else due.replace(tzinfo=UTC)).isoformat()
