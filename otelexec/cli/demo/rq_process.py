"""
The RQ demo's other processes: `python -m otelexec.cli.demo.rq_process broker|web|worker|cron FOLDER RUN`.

Each ends when its standard input does, so that none outlives the demo, however that ends.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import otelexec
from otelexec.cli.demo.celery_crew import POOL
from otelexec.cli.demo.celery_process import be_broker
from otelexec.cli.demo.process import at_end_of_input, serve

GRACE_SECONDS = 10.0


def main() -> None:
    """Be the process that the arguments name."""
    role, folder, run = sys.argv[1:]
    if role == "broker":
        be_broker(Path(folder))
        return
    logging.basicConfig(level=logging.WARNING)
    otelexec.configure(service_name=f"demo-{role}")
    from otelexec_rq import RQInstrumentor

    instrumentor: Any = RQInstrumentor
    instrumentor().instrument()
    from otelexec.cli.demo import rq_jobs

    if role == "web":
        stop = threading.Event()
        at_end_of_input(stop.set)
        serve(rq_jobs.publish, run, stop)
        return
    if role == "worker":
        from rq.worker_pool import WorkerPool

        own = os.dup(0)  # in a worker of a pool, standard input is another one
        os.register_at_fork(after_in_child=lambda: at_end_of_input(_give_up, own))
        at_end_of_input(_tell_to_stop)
        pool: Any = WorkerPool([rq_jobs.QUEUE], connection=rq_jobs.connection, num_workers=POOL)
        pool.start(logging_level="WARNING")
    else:
        from rq.cron import CronScheduler

        at_end_of_input(_tell_to_stop)
        cron: Any = CronScheduler(connection=rq_jobs.connection, logging_level="WARNING")
        cron.register(rq_jobs.clean_cache, queue_name=rq_jobs.QUEUE, interval=rq_jobs.INTERVAL, **rq_jobs.NAMED)
        cron.start()


def _tell_to_stop() -> None:
    # RQ ends by itself, in its own time and with what it has in hand.
    os.kill(os.getpid(), signal.SIGTERM)


def _give_up() -> None:
    # A worker whose broker was killed with the demo sleeps up to a minute before it tries again, and heeds nothing until
    # then; a horse that is stuck in its job has no worker any more.
    time.sleep(GRACE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
