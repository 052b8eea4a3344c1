"""What the RQ benchmark runs."""

from __future__ import annotations

from typing import Any

from rq import get_current_job

from tests.benchmarks.messages_by_hand import processed


def nothing() -> None:
    """Do nothing."""


def nothing_by_hand() -> None:
    """Do nothing, and record that by hand."""
    job: Any = get_current_job()
    with processed("rq", job.meta["carrier"], job.id):
        nothing()
