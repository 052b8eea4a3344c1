"""The Celery application: three tasks in a chain, around a job that knows nothing of Celery."""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Celery
from otelexec_celery import CeleryInstrumentor

import otelexec

PAGE_SECONDS = 0.5
FOLDER = Path(os.environ.get("SHOP", "/tmp/celery_app"))

# The one line. Under `opentelemetry-instrument celery -A invoices worker` not even that.
CeleryInstrumentor().instrument()

BROKER = os.environ.get("BROKER", "redis://127.0.0.1:6399/0")
app = Celery("invoices", broker=BROKER, backend=BROKER)
app.conf.update(
    task_default_queue="invoices",
    # A task whose process died is delivered once more, instead of being forgotten with a message acknowledged in advance.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    # One second until then, instead of ten: you are waiting for it.
    worker_lost_wait=1.0,
    broker_connection_retry_on_startup=True,
)


@app.task(name="invoice.fetch")
def fetch(invoice: int, pages: int) -> tuple[int, int]:
    """Be the first link; what it gives is the next one's argument."""
    return invoice, pages


@app.task(name="invoice.work")
def work(fetched: tuple[int, int]) -> int:
    """Leave the work to the job."""
    return run_invoice(*fetched)


@otelexec.execution("invoice.run", core=True)
def run_invoice(invoice: int, pages: int) -> int:
    """Do the job: it takes the attempt of the task around it over, and its success is final."""
    run = otelexec.current_execution()
    (FOLDER / "child.pid").write_text(str(os.getpid()))
    for page in range(1, pages + 1):
        time.sleep(PAGE_SECONDS)
        run.progress(f"page {page}", done=page, total=pages)
        print(f"  invoice {invoice}, attempt {run.attempt}: page {page} of {pages}", flush=True)
    return invoice


@app.task(name="invoice.mail")
def mail(invoice: int) -> None:
    """Be the last link."""
    otelexec.current_execution().set_output({"mailed": invoice})
