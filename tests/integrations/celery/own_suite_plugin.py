"""A pytest plugin for Celery's own tests: `-p tests.integrations.celery.own_suite_plugin` runs them with otelexec's adapter active."""

from __future__ import annotations

from otelexec_celery import CeleryInstrumentor

import otelexec

# Celery's tests want no thread to be left that was not there before the first of them: ours start with the first record.
with otelexec.execution("before the first test"):
    pass
CeleryInstrumentor().instrument()
