"""The demo as a newcomer runs it: in a process of its own, with a store of its own, without and with a real Jaeger."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from otelexec.cli.demo import KILL_AT_SEGMENT
from otelexec.cli.demo.crew import WORKERS
from otelexec.cli.demo.stories import STORIES
from otelexec.decoded import DecodedSpan
from otelexec.receiver import OtlpReceiver
from tests.records import until
from tests.servers import Jaeger, JaegerSpan, free_ports, read_trace, running_jaeger

ROOT = Path(__file__).resolve().parents[2]
ROLES = ("demo-web", "demo-worker")
PROMISED_SECONDS = 30.0


@dataclass(frozen=True)
class Shown:
    """What a run of the demo left behind."""

    code: int
    output: str
    records: Sequence[Mapping[str, Any]]
    seconds: float

    def named(self, name: str) -> list[Mapping[str, Any]]:
        return [record for record in self.records if record["name"] == name]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Give an environment without any setting of the machine's, in which nothing listens at the default endpoint."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "OTELEXEC_"))}
    closed = free_ports(1)[0]
    own = {
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "XDG_STATE_HOME": str(folder / "state"),
        "OTELEXEC_STORE": f"sqlite:///{folder / 'demo.db'}",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{closed}",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "integrations"))),
    }
    return kept | own | more


def otelexec(arguments: Sequence[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "otelexec", *arguments], env=env, capture_output=True, text=True, timeout=100, check=False)


def run_demo(env: Mapping[str, str], *options: str) -> Shown:
    started = time.monotonic()
    done = otelexec(["demo", *options], env)
    seconds = time.monotonic() - started
    listed = otelexec(["list", "--json"], env)
    assert listed.returncode == 0, listed.stderr
    records = [json.loads(line) for line in listed.stdout.splitlines()]
    return Shown(done.returncode, done.stdout + done.stderr, records, seconds)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """Give a run with nothing at the OTLP endpoint."""
    return run_demo(environment(tmp_path_factory.mktemp("alone")))


@pytest.fixture(scope="module")
def jaeger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jaeger]:
    with running_jaeger(tmp_path_factory.mktemp("jaeger")) as running:
        yield running


@pytest.fixture(scope="module")
def delivered(jaeger: Jaeger, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """Give a run with a real Jaeger at the OTLP endpoint."""
    folder = tmp_path_factory.mktemp("delivered")
    return run_demo(environment(folder, OTEL_EXPORTER_OTLP_ENDPOINT=jaeger.otlp_http_url, OTELEXEC_JAEGER_URL=jaeger.base_url))


def test_it_ends_well_within_its_time_and_says_so(alone: Shown) -> None:
    assert alone.code == 0, alone.output
    assert f"{len(alone.records)} executions" in alone.output
    assert "every one is closed with its span" in alone.output
    assert alone.seconds < PROMISED_SECONDS


def test_every_story_ends_as_told(alone: Shown) -> None:
    jobs = {story.job for story in STORIES}
    ended = Counter(
        (record["name"], tuple(attempt["state"] for attempt in record["attempts"])) for record in alone.records if record["name"] in jobs
    )
    assert ended == Counter((story.job, story.attempts) for story in STORIES)


def test_it_shows_every_kind_of_ending_that_an_attempt_can_have(alone: Shown) -> None:
    states = {attempt["state"] for record in alone.records for attempt in record["attempts"]}
    assert states == {"succeeded", "failed", "timed_out", "cancelled", "paused", "rejected", "lost"}


def test_every_attempt_stands_in_the_table_with_its_span_id(alone: Shown) -> None:
    for record in alone.records:
        for attempt in record["attempts"]:
            assert re.search(rf"{attempt['state']} .*{attempt['span_id']}", alone.output), (record["name"], attempt)


def test_the_killed_attempt_is_lost_with_its_progress_and_the_execution_succeeds_under_the_same_id(alone: Shown) -> None:
    (killed,) = alone.named("video.encode")
    first, second = killed["attempts"]
    assert (first["state"], first["classification"], first["finalized_by"]) == ("lost", "killed", "parent")
    assert first["progress"]["done"] == KILL_AT_SEGMENT
    assert first["worker"]["pid"] != second["worker"]["pid"]
    assert f"SIGKILL to worker {first['worker']['pid']}" in alone.output
    assert killed["state"] == second["state"] == "succeeded"
    assert first["trace_id"] == second["trace_id"]


def test_the_paused_execution_goes_on_from_its_snapshot(alone: Shown) -> None:
    (resumed,) = alone.named("contract.sign")
    assert [attempt["state"] for attempt in resumed["attempts"]] == ["paused", "succeeded"]
    assert resumed["attempts"][1]["output"] == {"signed": "contract with ACME"}


def test_the_core_takes_over_the_attempt_of_the_worker_around_it(alone: Shown) -> None:
    (imported,) = alone.named("order.import")
    (attempt,) = imported["attempts"]
    assert attempt["outer_span_id"] not in {None, attempt["span_id"]}
    assert attempt["outer_outcome"] == "succeeded"
    children = [record for record in alone.records if record["parent_execution_id"] == imported["execution_id"]]
    assert sorted(child["name"] for child in children) == ["receipt.send", "stock.reserve", "stock.reserve"]
    assert {child["trace_id"] for child in children} == {imported["trace_id"]}
    assert {child["request_id"] for child in children} == {imported["request_id"]}


def test_the_webhook_and_the_schedule_stand_on_the_records_that_they_asked_for(alone: Shown) -> None:
    (rejected,) = [record for record in alone.named("newsletter.send") if record["state"] == "rejected"]
    assert (rejected["source"], rejected["error_type"]) == ("webhook", "rate_limited")
    assert rejected["correlation"]["provider"] == "crm"
    assert rejected["correlation"]["path"] == "/hooks/crm/newsletter.send"
    scheduled = alone.named("cache.clean")
    assert {(record["source"], record["correlation"]["schedule_id"]) for record in scheduled} == {("schedule", "every-second")}


def test_the_waterfall_goes_from_the_webhook_to_the_child_across_the_queue(alone: Shown) -> None:
    drawn = alone.output.partition("The trace of order.import")[2].splitlines()
    for depth, name in enumerate(
        ("POST /hooks", "send jobs", "process jobs", "order.import #1", "send jobs", "process jobs", "receipt.send #1")
    ):
        assert any(re.match(rf"{'  ' * depth}{re.escape(name)} +[▏▎▍▌▋▊▉█]", line) for line in drawn), (depth, name, drawn)


def test_without_an_endpoint_the_spans_wait_and_the_printed_commands_work(tmp_path: Path) -> None:
    env = environment(tmp_path)
    shown = run_demo(env)
    waiting = re.search(r"(\d+) spans wait in the outbox", shown.output)
    assert waiting is not None, shown.output
    command = next(line.split() for line in shown.output.splitlines() if line.strip().startswith("otelexec show"))
    looked_at = otelexec(command[1:], env)
    assert looked_at.returncode == 0, looked_at.stderr
    assert "video.encode" in looked_at.stdout

    with OtlpReceiver() as receiver:
        drained = otelexec(["relay", "--drain"], env | {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint})
        assert drained.returncode == 0, drained.stderr
        spans: list[DecodedSpan] = list(receiver.spans)
    assert len(spans) == int(waiting[1])
    outcomes = {span.span_id: span for span in spans if "otelexec.outcome" in span.attributes}
    attempts = [attempt for record in shown.records for attempt in record["attempts"]]
    assert set(outcomes) == {attempt["span_id"] for attempt in attempts}


def test_it_makes_a_new_store_in_the_users_state_folder_each_time_and_names_it(tmp_path: Path) -> None:
    env = environment(tmp_path)
    del env["OTELEXEC_STORE"]
    first, second = otelexec(["demo"], env), otelexec(["demo"], env)
    for number, done in enumerate((first, second), start=1):
        store = tmp_path / "state" / "otelexec" / f"demo-{number}.db"
        assert done.returncode == 0, done.stdout + done.stderr
        assert store.exists()
        assert f"export OTELEXEC_STORE=sqlite:///{store}" in done.stdout


def test_a_store_without_records_is_one_clear_line(tmp_path: Path) -> None:
    done = otelexec(["demo"], environment(tmp_path, OTELEXEC_STORE="none"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: OTELEXEC_STORE: ")


@contextmanager
def interrupted_demo(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """Give a demo in the middle of its work, and the processes that it started."""
    command = [sys.executable, "-u", "-m", "otelexec", "demo", *options]
    with subprocess.Popen(command, env=environment(folder), stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            assert any("POST /hooks/shop" in line for line in running.stdout)
            children = psutil.Process(running.pid).children(recursive=True)
            assert len(children) >= WORKERS + 1
            yield running, children
        finally:
            running.kill()


def test_interrupted_it_ends_every_process_that_it_started(tmp_path: Path) -> None:
    with interrupted_demo(tmp_path) as (running, children):
        running.send_signal(signal.SIGINT)
        output, _ = running.communicate(timeout=30)
        assert running.returncode == 130
        assert "Stopped" in output
        assert not [child for child in children if is_running(child)]


def test_killed_it_leaves_no_process_behind(tmp_path: Path) -> None:
    with interrupted_demo(tmp_path) as (running, children):
        running.kill()
        until(lambda: not [child for child in children if is_running(child)], 30)


def is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# With a real Jaeger


@pytest.fixture(scope="module")
def traces(jaeger: Jaeger, delivered: Shown) -> dict[str, list[JaegerSpan]]:
    """Give every trace of every attempt as Jaeger reads it back."""
    assert delivered.code == 0, delivered.output
    said = re.search(r"(\d+) spans were delivered", delivered.output)
    assert said is not None, delivered.output
    ids = {attempt["trace_id"] for record in delivered.records for attempt in record["attempts"]}
    return until(lambda: whole(jaeger, ids, delivered), 20)


def whole(jaeger: Jaeger, ids: set[str], delivered: Shown) -> dict[str, list[JaegerSpan]]:
    """Give the traces once every attempt is among them, nothing before; spans may still be on their way into Jaeger's storage."""
    read = {trace_id: read_trace(jaeger.base_url, trace_id) for trace_id in ids}
    there = {span.span_id for spans in read.values() for span in spans}
    wanted = {attempt[key] for record in delivered.records for attempt in record["attempts"] for key in ("span_id", "outer_span_id")}
    return read if wanted - {None} <= there else {}


def test_every_trace_in_jaeger_is_whole(traces: Mapping[str, list[JaegerSpan]]) -> None:
    for trace_id, spans in traces.items():
        ids = Counter(span.span_id for span in spans)
        assert max(ids.values()) == 1, trace_id
        assert [span.name for span in spans if span.parent_span_id and span.parent_span_id not in ids] == [], trace_id
        assert [span for span in spans if not span.parent_span_id][0:2] == [spans[0]], trace_id
        assert {span.resource["service.name"] for span in spans} <= set(ROLES)


def test_jaeger_finds_nothing_odd_about_any_span(traces: Mapping[str, list[JaegerSpan]]) -> None:
    assert {span.name: span.warnings for spans in traces.values() for span in spans if span.warnings} == {}


def test_jaeger_has_one_span_with_an_outcome_for_every_attempt_and_it_says_what_the_record_says(
    delivered: Shown, traces: Mapping[str, list[JaegerSpan]]
) -> None:
    in_jaeger = sorted(
        (span.trace_id, span.span_id, span.attributes["otelexec.outcome"], span.started_unix_ns, span.ended_unix_ns, span.status)
        for spans in traces.values()
        for span in spans
        if "otelexec.outcome" in span.attributes
    )
    in_the_records = sorted(
        (
            attempt["trace_id"],
            attempt["span_id"],
            attempt["state"],
            attempt["started_unix_ns"],
            attempt["ended_unix_ns"],
            "error" if attempt["state"] in {"failed", "timed_out", "lost", "rejected"} else "unset",
        )
        for record in delivered.records
        for attempt in record["attempts"]
    )
    assert in_jaeger == in_the_records


def test_jaeger_has_the_outer_spans_with_the_ends_of_the_records(delivered: Shown, traces: Mapping[str, list[JaegerSpan]]) -> None:
    spans = {span.span_id: span for found in traces.values() for span in found}
    outers = [attempt for record in delivered.records for attempt in record["attempts"] if attempt["outer_span_id"] is not None]
    assert {attempt["outer_outcome"] for attempt in outers} >= {"succeeded", "failed", "lost"}
    for attempt in outers:
        outer = spans[attempt["outer_span_id"]]
        assert outer.ended_unix_ns == attempt["outer_ended_unix_ns"]
        assert spans[attempt["span_id"]].parent_span_id == outer.span_id


def test_every_span_carries_the_ids_of_its_record(delivered: Shown, traces: Mapping[str, list[JaegerSpan]]) -> None:
    spans = {span.span_id: span for found in traces.values() for span in found}
    for record in delivered.records:
        for attempt in record["attempts"]:
            attributes = spans[attempt["span_id"]].attributes
            assert attributes["otelexec.execution_id"] == record["execution_id"]
            assert attributes["otelexec.request_id"] == record["request_id"]
            assert attributes["otelexec.source"] == record["source"]
            assert spans[attempt["span_id"]].name == record["name"]


def test_with_jaeger_it_prints_a_link_to_every_trace_and_nothing_waits(jaeger: Jaeger, delivered: Shown) -> None:
    for record in delivered.records:
        assert f"{jaeger.base_url}/trace/{record['trace_id']}" in delivered.output
    assert "wait in the outbox" not in delivered.output
