"""The worker: it runs what `app.py` queued. Usage: python worker.py FOLDER."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from folder_queue import FolderQueue
from opentelemetry import trace

import otelexec

PAGE_SECONDS = 0.5
POLL_SECONDS = 0.2


@otelexec.execution("invoice.run", core=True)
def run_invoice(payload: Mapping[str, Any]) -> None:
    """Do the job; it needs to know nothing of queues and webhooks."""
    run = otelexec.current_execution()
    for page in range(1, payload["pages"] + 1):
        time.sleep(PAGE_SECONDS)
        run.progress(f"page {page}", done=page, total=payload["pages"])
        print(f"  invoice {payload['invoice']}, attempt {run.attempt}: page {page} of {payload['pages']}", flush=True)
    mail_invoice(payload["invoice"])


@otelexec.execution("invoice.mail")
def mail_invoice(invoice: int) -> None:
    """Be a child execution: a record and a span of its own."""
    otelexec.current_execution().set_output({"mailed": invoice})


def work(queue: FolderQueue) -> None:
    """Run one message after the other."""
    if unfinished := queue.take_back():
        print(f"{unfinished} unfinished: delivered once more", flush=True)
    while True:
        taken = queue.take()
        if taken is None:
            time.sleep(POLL_SECONDS)
            continue
        file, body = taken
        with (
            otelexec.extract(body) as received,
            # A failure of the job is on its record when it gets here; the worker goes on.
            contextlib.suppress(Exception),
            # The code around the job has a span and an end of its own, beside those of the job.
            otelexec.execution("process invoices", kind=trace.SpanKind.CONSUMER),
        ):
            run_invoice(received.payload)
        # The record was committed before the call above returned: only now is the message done.
        file.unlink()


def main() -> None:
    """Work until Ctrl-C."""
    folder = Path(sys.argv[1])
    otelexec.configure(service_name="webhook-worker")
    queue = FolderQueue(folder)
    (folder / "worker.pid").write_text(str(os.getpid()))
    print(f"worker {os.getpid()}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        work(queue)


if __name__ == "__main__":
    main()
