"""SIGKILL at every line and every SQL statement of the lifecycle, the spool, the reconciler and the relay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.repairing import COMMANDS
from tests.acceptance.scenarios import SCENARIOS
from tests.acceptance.sweeping import report, reports, together
from tests.patience import LENGTH

SHARES = 2
EVERY = 1 if LENGTH else 3
"""Which of the distinct lines: all where sweeps are long, as in CI, else every third. The statements are always all of them."""

MISSED = 0.06
"""Share of the points that a run may pass less often than the dry run did: threads take turns as they like."""


def sweep(folder: Path, *arguments: str, seconds: float) -> dict[str, int]:
    runs = [(folder / str(share), (*arguments, f"--share={share}/{SHARES}")) for share in range(SHARES)]
    answers = reports("killing", runs, seconds=seconds)
    counts = together(answers, "killed", "missed", "attempts", "spans")
    assert counts["missed"] <= MISSED * counts["killed"]
    return counts | {"lines": answers[0]["lines"], "statements": answers[0]["statements"]}


@pytest.mark.timeout(300)
def test_a_kill_at_any_line_or_statement_leaves_every_attempt_one_state_and_one_span(tmp_path: Path) -> None:
    """Each distinct line (or every third) and statement once, over all scenarios."""
    counts = sweep(tmp_path, *SCENARIOS, f"--every={EVERY}", seconds=280)
    assert counts["killed"] >= 0.9 * (counts["lines"] / EVERY + counts["statements"])
    assert counts["lines"] > 1000
    assert counts["statements"] >= 25
    assert counts["attempts"] > counts["killed"]


@pytest.mark.timeout(300)
def test_a_kill_while_the_store_is_made_leaves_a_store_that_works(tmp_path: Path) -> None:
    answer = report("killing", tmp_path / "fresh", "block", "--fresh", "--within=store/sqlite", f"--every={EVERY}", seconds=280)
    counts = together([answer], "killed", "statements")
    assert counts["statements"] >= 25  # those of the schema among them
    assert counts["killed"] > 50 / EVERY


@pytest.mark.longest
@pytest.mark.timeout(600)
def test_a_kill_at_hundreds_of_further_points(tmp_path: Path) -> None:
    """Every distinct line and statement over all scenarios, and more passages of them in each."""
    counts = sweep(tmp_path, *SCENARIOS, "--extra=60", seconds=580)
    assert counts["killed"] >= 0.9 * (counts["lines"] + counts["statements"])


@pytest.mark.longest
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_kill_at_any_line_or_statement_of_each_scenario(tmp_path: Path, scenario: str) -> None:
    """Every distinct line and statement of each scenario by itself, and as many more passages of them."""
    counts = sweep(tmp_path, scenario, f"--extra={100 if scenario == 'spooled' else 400}", seconds=880)
    assert counts["killed"] >= 0.9 * (counts["lines"] + counts["statements"])


def commands(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    answers = reports("repairing", [(folder / command, (command, *arguments)) for command in COMMANDS], seconds=880)
    for answer, repeats in zip(answers, (False, True), strict=True):
        counts = together([answer], "killed", "missed", "repeated")
        assert counts["missed"] <= MISSED * counts["killed"]
        # Only a relay that is killed between answer and deletion sends again; if none did, no kill fell in there.
        assert bool(counts["repeated"]) is repeats
    return answers


@pytest.mark.timeout(300)
def test_reconcile_and_relay_killed_anywhere_are_finished_by_the_next_ones_in_either_order(tmp_path: Path) -> None:
    answers = commands(tmp_path, "--within=reconcile,relay,delivery,store/spool,cli/relaying,cli/reconciling", f"--every={EVERY}")
    assert min(answer["killed"] for answer in answers) > 80 / EVERY


@pytest.mark.longest
@pytest.mark.timeout(900)
def test_reconcile_and_relay_killed_at_every_statement_are_finished_by_the_next_ones(tmp_path: Path) -> None:
    for answer in commands(tmp_path, "--statements"):
        assert answer["killed"] >= answer["statements"]
