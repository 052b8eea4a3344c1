"""The trigger demo's tasks: what a user of otelexec and a Trigger-style backend writes, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from otelexec_trigger import LocalBackend, TriggerBackend, task

import otelexec
from otelexec.cli.demo import work
from otelexec.cli.demo.stories import RATE_LIMITED, SCHEDULED

ATTEMPTS: Mapping[str, int] = {"video.encode": 2, "report.render": 2}
"""How many attempts a task has; all others have one."""


@task("order.import")
def import_order(payload: Mapping[str, Any]) -> dict[str, int]:
    """Be the run. What it triggers is its child."""
    reserved = work.reserve(payload["items"])
    LocalBackend().trigger("receipt.send", {"order": payload["order"]})
    return {"reserved": reserved}


@task("receipt.send")
def send_receipt(payload: Mapping[str, Any]) -> Any:
    """Be in the trace of the webhook that was two processes and two messages ago."""
    time.sleep(0.1)
    return payload["order"]


@task("video.encode")
def encode_video(_: object) -> None:
    """Get stuck in the middle of the first attempt, where the demo kills the worker's process."""
    work.encode()


@task("card.charge")
def charge_card(payload: Mapping[str, Any]) -> None:
    """Fail."""
    work.decline(payload["card"])


@task("report.render")
def render_report(_: object) -> None:
    """Fail once, with an attempt left."""
    work.hang_up_once()


@task("feed.sync")
@otelexec.execution("feed.sync", core=True, timeout=1)
async def sync_feed(_: object) -> None:
    """Wait for a server that never answers, until the job's own timeout."""
    await asyncio.sleep(work.STUCK_SECONDS)


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
