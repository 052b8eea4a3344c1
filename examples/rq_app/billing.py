"""The jobs: plain functions, which know RQ's queue only where they enqueue the next one."""

from __future__ import annotations

import os
import time
from pathlib import Path

from redis import Redis
from rq import Queue

import otelexec

PAGE_SECONDS = 0.5
FOLDER = Path(os.environ.get("SHOP", "/tmp/rq_app"))
queue = Queue("invoices", connection=Redis.from_url(os.environ.get("BROKER", "redis://127.0.0.1:6399/0")))


@otelexec.execution("invoice.run", core=True)
def run_invoice(invoice: int, pages: int) -> int:
    """Do the job: it takes the attempt of the RQ job around it over, and its success is final."""
    run = otelexec.current_execution()
    (FOLDER / "child.pid").write_text(str(os.getpid()))
    for page in range(1, pages + 1):
        time.sleep(PAGE_SECONDS)
        run.progress(f"page {page}", done=page, total=pages)
        print(f"  invoice {invoice}, attempt {run.attempt}: page {page} of {pages}", flush=True)
    queue.enqueue(mail, invoice)
    return invoice


def mail(invoice: int) -> None:
    """Be a job of its own, in the same trace and for the same request."""
    otelexec.current_execution().set_output({"mailed": invoice})
