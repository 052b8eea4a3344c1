"""The demo on the local engine, as a newcomer runs it: a server, a schedule, and a worker that loses a process."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from otelexec.cli.demo.crew import missing
from otelexec.cli.demo.stories import SCHEDULED, TRIGGER_STORIES
from otelexec.cli.demo.trigger_crew import TriggerCrew
from tests.acceptance.test_demo import Shown, environment, interrupted_demo, is_running, run_demo
from tests.records import until

TRIGGER = ("--backend", "trigger")
JOBS = {story.job for story in TRIGGER_STORIES}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """Give a run with nothing at the OTLP endpoint."""
    return run_demo(environment(tmp_path_factory.mktemp("trigger")), *TRIGGER)


def test_it_says_that_every_execution_is_closed_with_its_span(shown: Shown) -> None:
    assert shown.code == 0, shown.output
    assert f"{len(shown.records)} executions" in shown.output
    assert "every one is closed with its span" in shown.output


def test_every_story_ends_as_told(shown: Shown) -> None:
    ended = Counter((record["name"], tuple(attempt["state"] for attempt in record["attempts"])) for record in shown.records)
    for (job, attempts), count in Counter((story.job, story.attempts) for story in TRIGGER_STORIES).items():
        assert ended[job, attempts] == count or (job == SCHEDULED and ended[job, attempts] >= count)


def test_every_record_names_its_run(shown: Shown) -> None:
    runs = [record["correlation"].get("run_id") for record in shown.records if record["name"] in JOBS and record["state"] != "rejected"]
    assert all(runs)
    assert len(set(runs)) == len(runs) >= len(TRIGGER_STORIES) - 1


def test_the_killed_process_left_a_lost_attempt_that_its_parent_closed(shown: Shown) -> None:
    (killed,) = shown.named("video.encode")
    first, second = killed["attempts"]
    assert (first["state"], first["classification"]) == ("lost", "killed")
    assert (killed["state"], second["state"]) == ("succeeded", "succeeded")
    assert first["trace_id"] == second["trace_id"]


def test_the_trace_goes_from_the_webhook_through_the_run_to_the_one_that_it_triggered(shown: Shown) -> None:
    drawn = shown.output.partition("The trace of order.import")[2].splitlines()
    for depth, name in enumerate(("POST /hooks", "trigger order.import", "order.import #1", "trigger receipt.send", "receipt.send #1")):
        assert any(re.match(rf"{'  ' * depth}{re.escape(name)}", line) for line in drawn), (depth, name, drawn)
    (imported,) = shown.named("order.import")
    (receipt,) = shown.named("receipt.send")
    assert receipt["parent_execution_id"] == imported["execution_id"]
    assert receipt["trace_id"] == imported["trace_id"]


def test_killed_it_leaves_no_process_behind(tmp_path: Path) -> None:
    with interrupted_demo(tmp_path, *TRIGGER) as (running, children):
        running.kill()
        until(lambda: not [child for child in children if is_running(child)], 40)


def test_without_what_it_needs_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in {"httpx", "uvicorn"} else object())
    assert missing(TriggerCrew.needed) == "pip install 'otelexec[trigger]'"
