"""The RQ demo's jobs: what a user of otelexec and RQ writes, and nothing else."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redis import Redis
from rq import Queue, Retry
from rq.cron import CronJob

import otelexec
from otelexec.cli.demo import work
from otelexec.cli.demo.celery_crew import BROKER
from otelexec.cli.demo.stories import SCHEDULE, SCHEDULE_SECONDS, SCHEDULED

QUEUE = "jobs"
INTERVAL = int(SCHEDULE_SECONDS)
NAMED: Mapping[str, Any] = {"name": SCHEDULE} if "name" in inspect.signature(CronJob).parameters else {}
"""An entry's name, where RQ gives it one; else it is called as its function."""

connection = Redis.from_url(os.environ.get(BROKER, "redis://127.0.0.1"))
jobs = Queue(QUEUE, connection=connection)


@otelexec.execution("order.import", core=True)
def import_order(order: int, items: Sequence[str]) -> int:
    """Be the job: its end is the attempt's. What it enqueues is its child."""
    otelexec.current_execution().set_output({"reserved": work.reserve(items)})
    jobs.enqueue(send_receipt, order)
    return order


@otelexec.execution("receipt.send", core=True)
def send_receipt(order: int) -> int:
    """Be in the trace of the webhook that was two processes and two messages ago."""
    time.sleep(0.1)
    return order


@otelexec.execution("video.encode", core=True)
def encode_video() -> None:
    """Get stuck in the middle of the first attempt, where the demo kills the horse."""
    work.encode()


@otelexec.execution("card.charge", core=True)
def charge_card(card: str) -> None:
    """Fail."""
    work.decline(card)


@otelexec.execution("report.render", core=True)
def render_report() -> None:
    """Fail once, with a retry left."""
    work.hang_up_once()


@otelexec.execution("feed.sync", core=True)
def sync_feed() -> None:
    """Wait for a server that never answers, until the job's timeout."""
    time.sleep(work.STUCK_SECONDS)


@otelexec.execution("export.build", core=True)
def build_export(rows: int) -> None:
    """Take so long that somebody cancels it: the worker then stops it, as RQ's stop-job does."""
    for count in range(rows):
        otelexec.current_execution().progress("exporting", done=count, total=rows)
        time.sleep(0.1)


@otelexec.execution("newsletter.send", core=True)
def send_newsletter() -> None:
    """Succeed; the web process turns a second one away."""
    time.sleep(0.05)


@otelexec.execution(SCHEDULED, core=True)
def clean_cache() -> None:
    """Succeed; RQ's cron asks for it."""
    time.sleep(0.05)


_ASKED_FOR: Mapping[str, tuple[Callable[..., Any], Mapping[str, Any]]] = {
    "order.import": (import_order, {}),
    "video.encode": (encode_video, {"retry": Retry(max=1)}),
    "card.charge": (charge_card, {}),
    "report.render": (render_report, {"retry": Retry(max=1)}),
    "feed.sync": (sync_feed, {"job_timeout": 1}),
    "export.build": (build_export, {}),
    "newsletter.send": (send_newsletter, {}),
}


def publish(job: str, payload: Mapping[str, Any]) -> None:
    """Enqueue what a webhook asks for."""
    function, options = _ASKED_FOR[job]
    jobs.enqueue(function, kwargs=dict(payload), **options)
