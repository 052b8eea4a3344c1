"""The Celery demo's tasks: what a user of otelexec and Celery writes, and nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from celery import Celery

import otelexec
from otelexec.cli.demo import work
from otelexec.cli.demo.celery_crew import BROKER
from otelexec.cli.demo.stories import SCHEDULE, SCHEDULE_SECONDS, SCHEDULED

SURVIVES = {"acks_late": True, "reject_on_worker_lost": True}
"""What makes Celery deliver a task once more when its worker dies with it."""

app = Celery("demo", broker=os.environ.get(BROKER), backend=os.environ.get(BROKER))
app.conf.update(
    beat_schedule={SCHEDULE: {"task": SCHEDULED, "schedule": SCHEDULE_SECONDS}},
    broker_connection_retry_on_startup=True,
    task_default_queue="jobs",
    worker_lost_wait=1.0,
    worker_prefetch_multiplier=1,
)


@app.task(name="order.import")
def import_order(order: int, items: Sequence[str]) -> int:
    """Leave the work to the job; in a chain, the result goes on to the next task."""
    return run_import(order, items)


@otelexec.execution("order.import", core=True)
def run_import(order: int, items: Sequence[str]) -> int:
    """Be the job: it knows nothing of Celery. Its end is the attempt's, whatever the task around it does then."""
    otelexec.current_execution().set_output({"reserved": work.reserve(items)})
    return order


@app.task(name="receipt.send")
def send_receipt(order: int) -> int:
    """Be the second link of the chain, in the trace of the webhook that was two processes and two messages ago."""
    time.sleep(0.1)
    return order


@app.task(name="video.encode", **SURVIVES)
def encode_video() -> None:
    """Get stuck in the middle of the first attempt, where the demo kills the process."""
    work.encode()


@app.task(name="card.charge")
def charge_card(card: str) -> None:
    """Fail."""
    work.decline(card)


@app.task(name="report.render", autoretry_for=(ConnectionError,), retry_kwargs={"countdown": 0})
def render_report() -> None:
    """Fail once with an error that Celery retries."""
    work.hang_up_once()


@app.task(name="feed.sync", soft_time_limit=1)
def sync_feed() -> None:
    """Wait for a server that never answers, until the time limit."""
    time.sleep(work.STUCK_SECONDS)


@app.task(name="export.build")
def build_export(rows: int) -> None:
    """Take so long that somebody cancels it: this worker then stops it, as Celery's revoke does."""
    for count in range(rows):
        otelexec.current_execution().progress("exporting", done=count, total=rows)
        time.sleep(0.1)


@app.task(name="newsletter.send")
def send_newsletter() -> None:
    """Succeed; the web process turns a second one away."""
    time.sleep(0.05)


@app.task(name=SCHEDULED)
def clean_cache() -> None:
    """Succeed; Celery's beat asks for it."""
    time.sleep(0.05)


def publish(job: str, payload: Mapping[str, Any]) -> None:
    """Send what a webhook asks for; a job that no worker knows is sent all the same."""
    if job == "order.import":
        (app.signature(job, kwargs=dict(payload)) | app.signature("receipt.send")).delay()
    else:
        app.send_task(job, kwargs=dict(payload))
