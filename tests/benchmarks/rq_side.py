"""
One side of the RQ benchmark: `python -m tests.benchmarks.rq_side SIDE`.

SIDE is `bare`, `spans` or `records` (by hand), `none` (the adapter without a store) or `durable`.

It reads `WHAT NUMBER` from each line of its input, does that, and prints how many seconds it took: `enqueue` so many no-op
jobs, have a `simple` worker work off so many in its own process, or have a `forking` one do so in a horse each.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from redis import Redis
from rq import Queue, SimpleWorker, Worker

from tests.benchmarks import rq_by_hand
from tests.benchmarks.rq_jobs import nothing
from tests.benchmarks.threads import NoExport

SERVER = "OTELEXEC_BENCHMARK_SERVER"
SIDES = ("bare", "spans", "records", "none", "durable")
BY_HAND = ("spans", "records")


def main() -> None:
    """Be the side that the arguments name."""
    (side,) = sys.argv[1:]
    if side in ("none", *BY_HAND):
        # As somebody who exports has it; the exporter of its own would wait for an endpoint at each horse's end.
        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(NoExport()))
        trace.set_tracer_provider(provider)
    if side in ("none", "durable"):
        from otelexec_rq import RQInstrumentor

        instrumentor: Any = RQInstrumentor
        instrumentor().instrument()
    logging.getLogger("rq").setLevel(logging.ERROR)
    queue: Any = Queue(side, connection=Redis.from_url(os.environ[SERVER]))
    workers: dict[str, Any] = {"simple": SimpleWorker, "forking": _LeavingWorker if side in BY_HAND else Worker}
    for line in sys.stdin:
        what, number = line.split()
        took = _enqueue(queue, int(number), by_hand=side in BY_HAND)
        if what == "enqueue":
            queue.empty()
        else:
            worker = workers[what]([queue], connection=queue.connection)
            started = time.perf_counter()
            worker.work(burst=True, logging_level="ERROR")
            took = time.perf_counter() - started
        print(took, flush=True)


class _LeavingWorker(Worker):
    def perform_job(self, *args: Any, **kwargs: Any) -> bool:
        done = super().perform_job(*args, **kwargs)
        rq_by_hand.leaving()
        return done


def _enqueue(queue: Any, number: int, *, by_hand: bool) -> float:
    started = time.perf_counter()
    for _ in range(number):
        if by_hand:
            rq_by_hand.enqueue(queue)
        else:
            queue.enqueue(nothing, result_ttl=0)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
