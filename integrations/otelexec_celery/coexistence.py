"""Beside the instrumentation of opentelemetry-python-contrib: nothing breaks, but every task is traced twice."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any, Final

logger = logging.getLogger("otelexec.celery")

_OTHER: Final = "opentelemetry.instrumentation.celery"


def warn(**_: Any) -> None:
    """Warn if it is active in this process."""
    if _OTHER not in sys.modules:
        return
    other = getattr(importlib.import_module(_OTHER), "CeleryInstrumentor", None)
    if other is not None and other().is_instrumented_by_opentelemetry:
        logger.warning(
            "otelexec.celery.twice: opentelemetry-instrumentation-celery is active as well, so every task has its spans beside "
            "otelexec's. Turn it off with OTEL_PYTHON_DISABLED_INSTRUMENTATIONS=celery."
        )
