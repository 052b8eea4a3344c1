"""The worker: RQ's own, instrumented by one line. Usage: python worker.py."""

from __future__ import annotations

from billing import queue
from otelexec_rq import RQInstrumentor
from rq import Worker

RQInstrumentor().instrument()

if __name__ == "__main__":
    print("working", flush=True)
    Worker([queue], connection=queue.connection).work(logging_level="WARNING")
