"""
One side of the Celery benchmark: `python -m tests.benchmarks.celery_side SIDE worker|publisher`.

SIDE is `bare`, `spans` or `records` (by hand), `none` (the adapter without a store), `durable`, or `contrib`
(opentelemetry-instrumentation-celery). The publisher reads a number from each line of its input, publishes so many tasks,
and prints how many seconds that took.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from celery import Celery
from celery.utils import uuid
from valkey import Valkey

from tests.benchmarks import messages_by_hand

BROKER = "OTELEXEC_BENCHMARK_BROKER"

CPU = "OTELEXEC_BENCHMARK_CPU"
"""The variable that has CPU time measured instead of time, for a machine that is busy with other work."""

SIDES = ("bare", *messages_by_hand.SIDES, "none", "durable", "contrib")

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

    def nothing_by_hand(task: Any) -> None:
        with messages_by_hand.processed("celery", task.request.carrier, task.request.id):
            nothing()

    def begin() -> None:
        """Hold the worker back until all tasks are there, then start the clock."""
        keys.blpop(f"go {side}", timeout=60)
        begun.append(clock())

    def end() -> None:
        keys.rpush(f"took {side}", clock() - begun.pop())

    for name, body in {"nothing": nothing, "begin": begin, "end": end}.items():
        app.task(body, name=name)
    app.task(nothing_by_hand, name="nothing_by_hand", bind=True)
    return app


def instrument(side: str) -> None:
    """Instrument this process as the side says."""
    if side in messages_by_hand.SIDES:
        messages_by_hand.set_up()
    elif side == "contrib":
        from opentelemetry.instrumentation.celery import CeleryInstrumentor as Contrib

        messages_by_hand.set_up()
        contrib: Any = Contrib
        contrib().instrument()
    elif side != "bare":
        from otelexec_celery import CeleryInstrumentor

        ours: Any = CeleryInstrumentor
        ours().instrument()


def publish(app: Celery, *, by_hand: bool) -> None:
    """Publish what each line of the input asks for."""
    task = app.tasks["nothing_by_hand" if by_hand else "nothing"]
    for line in sys.stdin:
        app.tasks["begin"].delay()
        started = clock()
        for _ in range(int(line)):
            if by_hand:
                task_id = uuid()
                with messages_by_hand.sent("celery", "apply_async", "celery", task_id) as carrier:
                    task.apply_async(task_id=task_id, headers={"carrier": carrier})
            else:
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
        publish(app, by_hand=side in messages_by_hand.SIDES)
        return
    alone = ("--without-gossip", "--without-mingle", "--without-heartbeat")
    app.worker_main(["worker", "-P", "solo", "-l", "ERROR", "-n", f"{side}@localhost", *alone])


if __name__ == "__main__":
    main()
