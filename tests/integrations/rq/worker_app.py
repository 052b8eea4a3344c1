"""The worker's side of the tests: `python -m tests.integrations.rq.worker_app URL CLASS QUEUE...`; it ends on SIGTERM."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

import rq
from redis import Redis
from rq import worker as rq_worker
from rq.serializers import JSONSerializer
from rq.timeouts import TimerDeathPenalty

import otelexec
from tests.measuring import measure

INSTRUMENT = "OTELEXEC_TEST_INSTRUMENT"
"""The variable with the options of `instrument()` as JSON; without it a worker does not instrument itself."""
OPTIONS = "OTELEXEC_TEST_WORKER"
"""
The variable with what a worker is made with, as JSON: `json` for the serializer, `pool` for a pool's size, `scheduler`,
`monitor` for RQ's interval of looking after a horse, `configure` for otelexec's own settings, `provider` for a tracer provider
of the user's own, `measure` for a folder to export what is measured to, `start_method` of `multiprocessing`, `job_class` for the path of
a class of jobs, `threads` for how many workers there are, each in a thread, and `early` to have every horse killed before it does anything.
"""


class Killing(rq.Worker):
    """Kills its horse by itself, as one that limits memory does, once a second signal to stop has been ignored."""

    ignored = False

    def request_force_stop(self, signum: int, frame: Any) -> None:
        """Note the signal."""
        super().request_force_stop(signum, frame)
        self.ignored = True

    def maintain_heartbeats(self, job: Any, *args: Any, **kwargs: Any) -> None:
        """Kill the horse."""
        super().maintain_heartbeats(job, *args, **kwargs)
        if self.ignored:
            self.kill_horse()


class Threaded(rq.Worker):
    """Can run beside others in a thread."""

    death_penalty_class = TimerDeathPenalty

    def _install_signal_handlers(self) -> None:
        pass


def main(url: str, name: str, *queues: str) -> None:
    options: dict[str, Any] = json.loads(os.environ.get(OPTIONS, "{}"))
    if options.get("provider"):
        provide()
    if "measure" in options:
        measure(options["measure"])
    if INSTRUMENT in os.environ:
        from otelexec_rq import RQInstrumentor

        RQInstrumentor().instrument(**json.loads(os.environ[INSTRUMENT]))
    if "configure" in options:
        otelexec.configure(**options["configure"])
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    connection = Redis.from_url(url)
    if name == "WorkerPool":
        pool(connection, queues, options.get("pool", 2), options.get("start_method"))
        return
    cls: Any = globals().get(name) or getattr(rq, name, None) or getattr(rq_worker, name)
    more: dict[str, Any] = {"serializer": JSONSerializer} if options.get("json") else {}
    if "job_class" in options:
        more["job_class"] = options["job_class"]
    if options.get("early"):
        cls.main_work_horse = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    for number in range(options.get("threads", 0)):
        each = cls(list(queues), connection=Redis.from_url(url), name=f"{options['name']}-{number}")
        threading.Thread(target=each.work, kwargs={"logging_level": "INFO"}).start()
    if "threads" in options:
        return
    worker = cls(list(queues), connection=connection, name=options["name"], **more)
    worker.job_monitoring_interval = options.get("monitor", worker.job_monitoring_interval)
    worker.work(with_scheduler=options.get("scheduler", False), logging_level="INFO")


def pool(connection: Any, queues: Sequence[str], size: int, start_method: str | None) -> None:
    from rq.worker_pool import WorkerPool

    multiprocessing.set_start_method(start_method)
    WorkerPool(list(queues), connection=connection, num_workers=size).start()


def provide() -> None:
    """Set a tracer provider up as the documentation of OpenTelemetry does."""
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


if __name__ == "__main__":
    main(*sys.argv[1:])
