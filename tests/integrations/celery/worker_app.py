"""The worker's side of the tests: `celery -A tests.integrations.celery.worker_app worker`."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from celery.app import trace
from celery.signals import worker_process_init

from tests.integrations.celery.tasks import BESIDE, INSTRUMENT, METRICS, SETTINGS, make_app
from tests.measuring import measure


def _instrument_beside(who: str) -> None:
    if who == "sentry":
        import sentry_sdk

        # Nothing listens there, and nothing need: what matters is what it does to headers and tracers.
        sentry_sdk.init(dsn="http://key@127.0.0.1:9/1", traces_sample_rate=1.0, shutdown_timeout=0)
    elif who == "contrib":
        from opentelemetry.instrumentation.celery import CeleryInstrumentor as Contrib

        instrumentor: Any = Contrib
        instrumentor().instrument()


def _fail_before_the_open(**_: Any) -> None:
    """Make a child die, or fail, with a task in hand that has not begun: the main process has its acceptance by then."""
    trace_task = trace.fast_trace_task

    def fast_trace_task(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "killed.early":
            os.kill(os.getpid(), signal.SIGKILL)
        if name.startswith("unknown.to.children"):  # as if it had been registered after the fork
            raise KeyError(name)
        return trace_task(name, *arguments, **options)

    trace.fast_trace_task = fast_trace_task


worker_process_init.connect(_fail_before_the_open, weak=False)
_instrument_beside(os.environ.get(BESIDE, ""))
if METRICS in os.environ:
    measure(os.environ[METRICS])
if INSTRUMENT in os.environ:
    from otelexec_celery import CeleryInstrumentor

    CeleryInstrumentor().instrument(**json.loads(os.environ[INSTRUMENT]))

app = make_app(json.loads(os.environ[SETTINGS]))
