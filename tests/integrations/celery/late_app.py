"""A worker that is instrumented when it is ready, that is, when its children are there already and have nothing of it."""

from __future__ import annotations

from typing import Any

from celery.signals import worker_ready
from otelexec_celery import CeleryInstrumentor

from tests.integrations.celery.worker_app import app

__all__ = ["app"]


def _instrument(**_: Any) -> None:
    CeleryInstrumentor().instrument()


worker_ready.connect(_instrument, weak=False)
