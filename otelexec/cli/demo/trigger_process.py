"""
The trigger demo's other processes: `python -m otelexec.cli.demo.trigger_process broker|web|worker|schedule FOLDER RUN`.

Each ends when its standard input does, so that none outlives the demo, however that ends.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
from datetime import UTC, datetime

import otelexec
from otelexec.cli import console
from otelexec.cli.demo.celery_crew import BROKER, POOL
from otelexec.cli.demo.process import at_end_of_input, serve
from otelexec.cli.demo.stories import SCHEDULE, SCHEDULE_SECONDS, SCHEDULE_TIMES, SCHEDULED

TASKS = "otelexec.cli.demo.trigger_tasks"


def main() -> None:
    """Be the process that the arguments name."""
    role, _, run = sys.argv[1:]
    stop = threading.Event()
    otelexec.configure(service_name=f"demo-{role}")
    console.log_to_stderr()
    if role == "broker":
        be_server()
    elif role == "worker":
        be_worker()
    else:
        at_end_of_input(stop.set)
        be_caller(role, run, stop)


def be_server() -> None:
    """Be `otelexec trigger serve` on a free port, and print where it is and what its key is."""
    from otelexec_trigger.cli import listen, serve_on

    key = f"tr_dev_{secrets.token_hex(8)}"
    listener = listen("127.0.0.1", 0)
    at_end_of_input(lambda: os.kill(os.getpid(), signal.SIGTERM))
    print(f"http://127.0.0.1:{listener.getsockname()[1]} {key}", flush=True)  # noqa: T201 (the demo reads it)
    serve_on(listener, key)


def be_worker() -> None:
    """Be `otelexec trigger worker`."""
    from otelexec_trigger.worker import Worker

    worker = Worker(TASKS, POOL)
    at_end_of_input(worker.stop)
    worker.run()


def be_caller(role: str, run: str, stop: threading.Event) -> None:
    """Be the web process or the schedule: both trigger over HTTP."""
    from otelexec_trigger import TriggerDevBackend

    from otelexec.cli.demo.trigger_tasks import publish

    url, key = os.environ[BROKER].split()
    with TriggerDevBackend(url, key) as backend:
        if role == "web":
            serve(lambda job, payload: publish(job, payload, backend), run, stop)
            return
        for _ in range(SCHEDULE_TIMES):
            due = datetime.now(UTC).isoformat(timespec="seconds")
            with otelexec.correlate(source="schedule", schedule_id=SCHEDULE, scheduled_for=due, attributes={"demo_run": run}):
                publish(SCHEDULED, {}, backend)
            if stop.wait(SCHEDULE_SECONDS):
                return
        stop.wait()


if __name__ == "__main__":
    main()
