"""
One side of the Celery benchmark: `python -m tests.benchmarks.celery_side SIDE worker|publisher`.

SIDE is `bare`, `none` (the adapter without a store), `durable`, or `contrib` (opentelemetry-instrumentation-celery). The
publisher reads a number from each line of its input, publishes so many tasks, and prints how many seconds that took.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from celery import Celery
from valkey import Valkey

BROKER = "OTELEXEC_BENCHMARK_BROKER"

CPU = "OTELEXEC_BENCHMARK_CPU"
"""The variable that has CPU time measured instead of time, for a machine that is busy with other work."""

SIDES = ("bare", "none", "durable", "contrib")

clock = time.process_time if os.environ.get(CPU) else time.perf_counter


def make_app(side: str) -> Celery:
    """
    Make the application.

    Args:
        side: Names its queue.
    """
    app = Celery("benchmark", broker=os.environ[BROKER])
    app.conf.update(task_default_queue=side, task_ignore_result=True, broker_connection_retry_on_startup=True)
    keys: Any = Valkey.from_url(os.environ[BROKER])
    begun: list[float] = []

    def nothing() -> None:
        pass

    def begin() -> None:
        """Hold the worker back until all tasks are there, then start the clock."""
        keys.blpop(f"go {side}", timeout=60)
        begun.append(clock())

    def end() -> None:
        keys.rpush(f"took {side}", clock() - begun.pop())

    for name, body in {"nothing": nothing, "begin": begin, "end": end}.items():
        app.task(body, name=name)
    return app


def instrument(side: str) -> None:
    """Instrument this process as the side says."""
    if side == "contrib":
        from opentelemetry import trace
        from opentelemetry.instrumentation.celery import CeleryInstrumentor as Contrib
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from tests.benchmarks.threads import NoExport

        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(NoExport()))
        trace.set_tracer_provider(provider)
        contrib: Any = Contrib
        contrib().instrument()
    elif side != "bare":
        from otelexec_celery import CeleryInstrumentor

        ours: Any = CeleryInstrumentor
        ours().instrument()


def publish(app: Celery) -> None:
    """Publish what each line of the input asks for."""
    task = app.tasks["nothing"]
    for line in sys.stdin:
        app.tasks["begin"].delay()
        started = clock()
        for _ in range(int(line)):
            task.delay()
        took = clock() - started
        app.tasks["end"].delay()
        print(took, flush=True)


def main() -> None:
    """Be the process that the arguments name."""
    side, role = sys.argv[1:]
    instrument(side)
    app = make_app(side)
    if role == "publisher":
        publish(app)
        return
    alone = ("--without-gossip", "--without-mingle", "--without-heartbeat")
    app.worker_main(["worker", "-P", "solo", "-l", "ERROR", "-n", f"{side}@localhost", *alone])


if __name__ == "__main__":
    main()
