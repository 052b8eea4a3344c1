"""The demo's jobs: what a user of otelexec writes, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import otelexec
from otelexec.cli.demo import own_queue, work
from otelexec.cli.demo.own_queue import Queue

STUCK_SECONDS = 10.0
"""A worker whose demo was killed ends when its job does."""
TIMEOUT_SECONDS = 0.4


@otelexec.execution("order.import", core=True)
def import_order(payload: Mapping[str, Any], queue: Queue) -> None:
    """Succeed, with a plain OpenTelemetry span, child executions, and a message for another worker."""
    otelexec.current_execution().set_output({"reserved": work.reserve(payload["items"])})
    publish("receipt.send", {"order": payload["order"]}, queue)


@otelexec.execution("receipt.send", core=True)
def send_receipt(_payload: Mapping[str, Any], _queue: Queue) -> None:
    """Succeed, in the trace of the webhook that was two processes and two messages ago."""
    time.sleep(0.1)


@otelexec.execution("card.charge", core=True)
def charge_card(payload: Mapping[str, Any], _queue: Queue) -> None:
    """Fail."""
    work.decline(payload["card"])


@otelexec.execution("report.render", core=True)
def render_report(_payload: Mapping[str, Any], _queue: Queue) -> None:
    """Fail once with an error that the worker retries."""
    work.hang_up_once()


@otelexec.execution("feed.sync", core=True, timeout=TIMEOUT_SECONDS)
async def sync_feed(_payload: Mapping[str, Any], _queue: Queue) -> None:
    """Wait for a server that never answers."""
    await asyncio.Event().wait()


@otelexec.execution("contract.sign", core=True)
def sign_contract(payload: Mapping[str, Any], queue: Queue) -> None:
    """Pause until somebody approves, and go on from the snapshot in another attempt."""
    run = otelexec.current_execution()
    if run.snapshot is not None:
        run.set_output({"signed": run.snapshot["draft"]})
        return
    time.sleep(0.1)
    queue.put("contract.sign", otelexec.inject(payload, retry=True), held_for=run.id)
    run.pause("waiting for approval", snapshot={"draft": f"contract with {payload['party']}"})


@otelexec.execution("export.build", core=True)
async def build_export(payload: Mapping[str, Any], _queue: Queue) -> None:
    """Take so long that somebody cancels it."""
    for count in range(payload["rows"]):
        otelexec.current_execution().progress("exporting", done=count, total=payload["rows"])
        await asyncio.sleep(0.1)


@otelexec.execution("video.encode", core=True)
def encode_video(_payload: Mapping[str, Any], _queue: Queue) -> None:
    """Get stuck in the middle of the first attempt, where the demo kills the worker."""
    work.encode(STUCK_SECONDS)


@otelexec.execution("newsletter.send", core=True)
def send_newsletter(_payload: Mapping[str, Any], _queue: Queue) -> None:
    """Succeed; the web process turns a second one away."""
    time.sleep(0.05)


@otelexec.execution("cache.clean", core=True)
def clean_cache(_payload: Mapping[str, Any], _queue: Queue) -> None:
    """Succeed; a schedule asks for it."""
    time.sleep(0.05)


JOBS: Mapping[str, Callable[[Mapping[str, Any], Queue], Any]] = {
    "order.import": import_order,
    "receipt.send": send_receipt,
    "card.charge": charge_card,
    "report.render": render_report,
    "feed.sync": sync_feed,
    "contract.sign": sign_contract,
    "export.build": build_export,
    "video.encode": encode_video,
    "newsletter.send": send_newsletter,
    "cache.clean": clean_cache,
}


def publish(job: str, payload: Mapping[str, Any], queue: Queue) -> str:
    """
    Send a job to the workers.

    Returns:
        The execution id that the message carries.
    """
    with otelexec.publish(job, destination=own_queue.NAME, system="demo") as message:
        queue.put(job, otelexec.inject(payload))
    return message.id
