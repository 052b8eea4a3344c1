"""Random SIGKILLs of workers, their relays and their reconcilers, under a queue that delivers again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.acceptance.sweeping import report, together


def check(folder: Path, jobs: int, *, kills: int, seconds: float) -> None:
    answer = report("redelivery", folder / "run", f"--jobs={jobs}", f"--least-kills={kills}", "--workers=4", seconds=seconds)
    counts = together([answer], "executions", "attempts", "spans", "repeated", "kills", "redelivered", "claimed")
    assert counts["executions"] >= jobs
    assert counts["kills"] >= kills
    assert counts["redelivered"] > 0
    assert answer["states"]["lost"] > 0
    assert counts["attempts"] > counts["executions"] - jobs
    # A repeat needs a relay that was killed with the row in hand; the comparison has checked each one.
    assert counts["repeated"] <= counts["claimed"]


@pytest.mark.timeout(200)
def test_600_jobs_under_random_kills_are_recorded_and_delivered_once_each(tmp_path: Path) -> None:
    check(tmp_path, 600, kills=5, seconds=180)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_10000_jobs_under_random_kills_are_recorded_and_delivered_once_each(tmp_path: Path) -> None:
    check(tmp_path, 10_000, kills=100, seconds=880)
