"""The tasks: functions of one argument, registered by id."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from otelexec_trigger import LocalBackend, task

import otelexec

PAGE_SECONDS = 0.5
FOLDER = Path(os.environ.get("SHOP", "/tmp/trigger_app"))


@task("invoice.run")
def run_invoice(payload: Mapping[str, Any]) -> dict[str, int]:
    """Do the work; what it returns is the run's output."""
    run = otelexec.current_execution()
    (FOLDER / "child.pid").write_text(str(os.getpid()))
    pages = payload["pages"]
    for page in range(1, pages + 1):
        time.sleep(PAGE_SECONDS)
        run.progress(f"page {page}", done=page, total=pages)
        print(f"  invoice {payload['invoice']}, attempt {run.attempt}: page {page} of {pages}", flush=True)
    # Without a server in between: the store is the queue.
    LocalBackend().trigger("invoice.mail", {"invoice": payload["invoice"]})
    return {"pages": pages}


@task("invoice.mail")
def mail(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Be a run of its own, in the same trace and for the same request."""
    return {"mailed": payload["invoice"]}
