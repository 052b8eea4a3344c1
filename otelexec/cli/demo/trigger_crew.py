"""
`otelexec demo --backend trigger`: the same story on the local engine, asked for over Trigger.dev's wire contract.

Beside it stand `trigger_tasks.py` (what a user writes) and `trigger_process.py` (server, web process, worker, schedule).
"""

from __future__ import annotations

import importlib.util

from otelexec.cli.demo.celery_crew import POOL, CeleryCrew

NEEDED = dict.fromkeys(("httpx", "starlette", "uvicorn"), "'otelexec[trigger]'")
"""Each import that the demo needs, and what to install for it."""


def missing() -> str | None:
    """Give what to type for what is not installed; None when all of it is."""
    names = dict.fromkeys(package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None)
    return f"pip install {' '.join(names)}" if names else None


class TriggerCrew(CeleryCrew):
    """Server, web process, schedule, and a worker with a few processes."""

    module = "otelexec.cli.demo.trigger_process"
    clock = "schedule"
    behind = f"`otelexec trigger serve`, a schedule and an `otelexec trigger worker` with {POOL} processes stand behind it"
