"""Beat: every entry that is due is sent in a context of its own, which says which schedule asked for it and when."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import datetime
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry.context import Context

from otelexec.correlation import correlate
from otelexec_celery.settings import CHOICES


def wrap_apply_entry(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Scheduler.apply_entry`, which sends an entry that is due."""

    @functools.wraps(original)
    def apply_entry(self: Any, entry: Any, *args: Any, **kwargs: Any) -> Any:
        if not CHOICES.active:
            return original(self, entry, *args, **kwargs)
        token = otel_context.attach(Context())
        try:
            with correlate(source="schedule", schedule_id=str(entry.name), scheduled_for=_due(entry)):
                return original(self, entry, *args, **kwargs)
        finally:
            otel_context.detach(token)

    return apply_entry


def _due(entry: Any) -> str | None:
    """Give when an entry was due; None where its schedule can't say."""
    try:
        now: datetime = entry.default_now()
        due: datetime = now + entry.schedule.remaining_estimate(entry.last_run_at)
        return min(due, now).isoformat()
    except Exception:  # schedules are the user's
        return None
