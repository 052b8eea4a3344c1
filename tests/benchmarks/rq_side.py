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
import uuid
from typing import Any

from redis import Redis
from rq import Queue, SimpleWorker, Worker

from tests.benchmarks import messages_by_hand
from tests.benchmarks.rq_jobs import nothing, nothing_by_hand

SERVER = "OTELEXEC_BENCHMARK_SERVER"
SIDES = ("bare", *messages_by_hand.SIDES, "none", "durable")


def main() -> None:
    """Be the side that the arguments name."""
    (side,) = sys.argv[1:]
    by_hand = side in messages_by_hand.SIDES
    if by_hand or side == "none":  # the exporter of its own would wait for an endpoint at each horse's end
        messages_by_hand.set_up()
    if side in ("none", "durable"):
        from otelexec_rq import RQInstrumentor

        instrumentor: Any = RQInstrumentor
        instrumentor().instrument()
    logging.getLogger("rq").setLevel(logging.ERROR)
    queue: Any = Queue(side, connection=Redis.from_url(os.environ[SERVER]))
    workers: dict[str, Any] = {"simple": SimpleWorker, "forking": _LeavingWorker if by_hand else Worker}
    for line in sys.stdin:
        what, number = line.split()
        took = _enqueue(queue, int(number), by_hand=by_hand)
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
        messages_by_hand.leaving()
        return done


def _enqueue(queue: Any, number: int, *, by_hand: bool) -> float:
    started = time.perf_counter()
    for _ in range(number):
        if by_hand:
            job_id = str(uuid.uuid4())
            with messages_by_hand.sent("rq", "enqueue", queue.name, job_id) as carrier:
                queue.enqueue(nothing_by_hand, job_id=job_id, meta={"carrier": carrier}, result_ttl=0)
        else:
            queue.enqueue(nothing, result_ttl=0)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
