"""
`otelexec demo --backend trigger`: the same story on the local engine, asked for over Trigger.dev's wire contract.

Beside it stand `trigger_tasks.py` (what a user writes) and `trigger_process.py` (server, web process, worker, schedule).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from otelexec.cli.demo.celery_crew import POOL, CeleryCrew


class TriggerCrew(CeleryCrew):
    """Server, web process, schedule, and a worker with a few processes."""

    module = "otelexec.cli.demo.trigger_process"
    needed: ClassVar[Mapping[str, str]] = dict.fromkeys(("httpx", "starlette", "uvicorn"), "'otelexec[trigger]'")
    clock = "schedule"
    behind = f"`otelexec trigger serve`, a schedule and an `otelexec trigger worker` with {POOL} processes stand behind it"
