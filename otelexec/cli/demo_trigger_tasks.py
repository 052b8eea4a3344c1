"""The trigger demo's tasks: what a user of otelexec and a Trigger-style backend writes, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from otelexec_trigger import LocalBackend, TriggerBackend, task

import otelexec
from otelexec.cli.demo_stories import RATE_LIMITED, SCHEDULED, SEGMENTS

STUCK_SECONDS = 30.0
ATTEMPTS: Mapping[str, int] = {"video.encode": 2, "report.render": 2}
"""How many attempts a task has; all others have one."""

tracer = trace.get_tracer("shop")


@task("order.import")
def import_order(payload: Mapping[str, Any]) -> dict[str, int]:
    """Be the run. What it triggers is its child."""
    run = otelexec.current_execution()
    with tracer.start_as_current_span("GET /inventory", kind=trace.SpanKind.CLIENT):
        time.sleep(0.12)
    items = payload["items"]
    for count, item in enumerate(items, start=1):
        reserve_stock(item)
        run.progress(f"reserved {item}", done=count, total=len(items))
    LocalBackend().trigger("receipt.send", {"order": payload["order"]})
    return {"reserved": len(items)}


@otelexec.execution("stock.reserve")
def reserve_stock(item: str) -> None:
    """Be a child execution of whatever calls it: a record and a span of its own."""
    otelexec.current_execution().set_output(item)
    time.sleep(0.08)


@task("receipt.send")
def send_receipt(payload: Mapping[str, Any]) -> Any:
    """Be in the trace of the webhook that was two processes and two messages ago."""
    time.sleep(0.1)
    return payload["order"]


@task("video.encode")
def encode_video(_: object) -> None:
    """Get stuck in the middle of the first attempt, where the demo kills the worker's process."""
    run = otelexec.current_execution()
    with tracer.start_as_current_span("encode segments"):
        for segment in range(1, SEGMENTS + 1):
            stuck = run.attempt == 1 and segment > SEGMENTS / 2
            encode_segment(STUCK_SECONDS if stuck else 0.2)
            run.progress(f"segment {segment}", done=segment, total=SEGMENTS)


@otelexec.execution("video.segment")
def encode_segment(seconds: float) -> None:
    """Take so many seconds."""
    time.sleep(seconds)


@task("card.charge")
def charge_card(payload: Mapping[str, Any]) -> None:
    """Fail."""
    time.sleep(0.1)
    raise ValueError(f"card ending in {payload['card']} declined")


@task("report.render")
def render_report(_: object) -> None:
    """Fail once, with an attempt left."""
    time.sleep(0.1)
    if otelexec.current_execution().attempt == 1:
        raise ConnectionError("the report server hung up")


@task("feed.sync")
@otelexec.execution("feed.sync", core=True, timeout=1)
async def sync_feed(_: object) -> None:
    """Wait for a server that never answers, until the job's own timeout."""
    await asyncio.sleep(STUCK_SECONDS)


@task("export.build")
async def build_export(payload: Mapping[str, Any]) -> None:
    """Take so long that somebody cancels it; a coroutine is stopped where it waits."""
    for count in range(payload["rows"]):
        otelexec.current_execution().progress("exporting", done=count, total=payload["rows"])
        await asyncio.sleep(0.1)


@task(RATE_LIMITED)
def send_newsletter(_: object) -> None:
    """Succeed; the web process turns a second one away."""
    time.sleep(0.05)


@task(SCHEDULED)
def clean_cache(_: object) -> None:
    """Succeed; the schedule asks for it."""
    time.sleep(0.05)


def publish(job: str, payload: Mapping[str, Any], backend: TriggerBackend) -> None:
    """Ask for what a webhook or a schedule wants."""
    backend.trigger(job, dict(payload), max_attempts=ATTEMPTS.get(job, 1))
