"""What the command line makes of records: JSON, times, tables and time lines; its commands are run in tests/acceptance."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from otelexec import records
from otelexec.cli import console, options, waterfall
from otelexec.cli.options import Failure, duration
from otelexec.cli.table import executions_table
from otelexec.decoded import DecodedSpan
from otelexec.errors import StoreUnavailable
from otelexec.store.records import AttemptRecord, ExecutionRecord
from otelexec.store.rows import Cancellation

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND
TRACE = "a" * 32

PINNED = {
    "execution_id", "name", "state", "request_id", "source", "correlation", "parent_execution_id", "trace_id", "span_id",
    "started_unix_ns", "ended_unix_ns", "cancel_requested", "attempts",
}  # fmt: skip
PINNED_OF_ATTEMPT = {
    "attempt", "state", "duplicate", "trace_id", "span_id", "started_unix_ns", "ended_unix_ns", "deadline_unix_ns", "error_type",
    "error_message", "finalized_by", "classification", "reconciled_unix_ns", "progress", "output", "observed", "outer_span_id",
    "outer_outcome", "worker",
}  # fmt: skip


def attempt(number: int = 1, **fields: Any) -> AttemptRecord:
    known: dict[str, Any] = dict.fromkeys(AttemptRecord.__slots__)
    at = START + number * SECOND
    known.update(attempt=number, state="succeeded", duplicate=False, trace_id=TRACE, span_id=f"{number:016x}", host="vm", pid=7)
    known.update(started_unix_ns=at, ended_unix_ns=at + SECOND // 2, finalized_by="executor")
    return AttemptRecord(**{**known, **fields})


def execution(*attempts: AttemptRecord, **fields: Any) -> ExecutionRecord:
    known: dict[str, Any] = dict.fromkeys(ExecutionRecord.__slots__)
    known.update(seq=1, execution_id="e-1", name="invoice.run", state="succeeded", request_id="r-1", source="webhook")
    known.update(correlation='{"webhook_id": "wh_1", "tenant": "acme"}', attempts=attempts, ended_unix_ns=START + 9 * SECOND)
    return ExecutionRecord(**{**known, **fields})


def span(span_id: str, parent: str | None, start: int, end: int, name: str = "child") -> DecodedSpan:
    return DecodedSpan(
        TRACE, span_id, parent, name, "internal", START + start, START + end, "unset", "", {}, {}, (), (), "", "app", b""
    )  # fmt: skip


def drawn(roots: list[waterfall.Bar], width: int = 80) -> list[str]:
    out = Console(width=width, color_system=None)
    with out.capture() as capture:
        out.print(waterfall.draw(roots, width=width, now_unix_ns=START + 10 * SECOND))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_the_json_has_every_promised_name_and_json_columns_as_values() -> None:
    record = execution(
        attempt(progress='{"message": "block 3", "done": 3}', output="[1]"), cancellation=Cancellation(START, terminate=True)
    )
    found = records.execution_json(record)
    assert found.keys() >= PINNED
    assert found["correlation"] == {"webhook_id": "wh_1", "tenant": "acme"}
    assert found["cancel_requested"] is True
    [only] = found["attempts"]
    assert only.keys() >= PINNED_OF_ATTEMPT
    assert (only["progress"], only["output"], only["observed"]) == ({"message": "block 3", "done": 3}, [1], None)
    assert only["worker"] == {"host": "vm", "pid": 7, "service_name": None}
    assert json.loads(json.dumps(found)) == found


def test_the_ids_are_those_of_the_newest_attempt_that_is_no_duplicate() -> None:
    found = records.execution_json(execution(attempt(1, state="failed"), attempt(2), attempt(3, duplicate=True)))
    assert found["span_id"] == f"{2:016x}"
    assert found["started_unix_ns"] == START + SECOND
    assert [each["duplicate"] for each in found["attempts"]] == [False, False, True]


def test_the_ids_are_the_producers_until_there_is_an_attempt() -> None:
    queued = execution(state="queued", producer_trace_id=TRACE, producer_span_id="b" * 16, queued_unix_ns=START)
    assert records.ids(queued) == (TRACE, "b" * 16)
    assert records.ids(replace(queued, attempts=(attempt(trace_id=None, span_id=None),))) == (None, None)


@pytest.mark.parametrize("state", ["queued", "running", "retrying", "paused"])
def test_there_is_no_end_before_a_terminal_state(state: str) -> None:
    assert records.execution_json(execution(attempt(), state=state))["ended_unix_ns"] is None


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (-5, "0 µs"),
        (840_000, "840 µs"),
        (12_300_000, "12.3 ms"),
        (999_900_000, "1.00 s"),
        (1_240_000_000, "1.24 s"),
        (59_999_000_000, "1m 00s"),
        (123 * SECOND, "2m 03s"),
        (3_720 * SECOND, "1h 02m"),
        (76 * 3_600 * SECOND, "3d 04h"),
    ],
)
def test_a_duration_is_short_and_has_its_unit(nanoseconds: int, text: str) -> None:
    assert console.duration(nanoseconds) == text


@given(st.text())
def test_a_text_from_outside_can_neither_break_the_line_nor_steer_the_terminal(text: str) -> None:
    assert console.clean(text).isprintable()


def test_an_escape_sequence_is_defused() -> None:
    assert console.clean("\x1b[2Jboom\nnext\x07") == " [2Jboom next "


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5_400), ("12h", 43_200), ("30d", 2_592_000), (" 2 w ", 1_209_600), ("1.5s", 1.5)])
def test_a_duration_option_takes_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert duration("--older-than", text) == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1y", "1d2h", "9" * 400 + "w", "٣d"])
def test_another_duration_is_one_line_and_exit_2(text: str) -> None:
    with pytest.raises(Failure, match="--older-than: must be") as raised:
        duration("--older-than", text)
    assert raised.value.code == 2


def test_the_line_about_a_store_that_is_waited_for_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = 2

    class Away:
        def ingested(self, _: str) -> int:
            nonlocal left
            left -= 1
            if left >= 0:
                raise StoreUnavailable("It is away.")
            return 0

    monkeypatch.setattr(options, "WAIT_SECONDS", 0)
    away: Any = Away()
    options._look(away, waits=True)
    assert capsys.readouterr().err == "error: It is away; waiting for it\n"


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_name_of_a_deep_span_can_be_read(width: int) -> None:
    found = [span(f"{n:016x}", f"{n - 1:016x}", 0, SECOND, name=f"deep {n}") for n in range(2, 30)]
    lines = drawn(waterfall.bars(execution(attempt()), found), width)
    assert lines[-1].lstrip().startswith("deep 29 ")


def test_a_wide_name_has_the_room_that_there_is() -> None:
    name = "\u6bb5\u968e" * 10  # twenty characters, forty columns
    lines = drawn(waterfall.bars(execution(attempt()), [span("c" * 16, "1".zfill(16), 0, SECOND, name=name)]), 120)
    assert lines[-1].lstrip().startswith(f"{name} ")


@pytest.mark.parametrize("width", [80, 100, 129, 130, 160, 250])
def test_the_table_fits_the_terminal_and_keeps_states_times_and_what_tells_ids_apart(width: int) -> None:
    """Name and error give way, however long they are."""
    same = "01a2073e-84f3-75bf-8e36-0e9e4af2e1"
    found = [
        execution(attempt(), execution_id=f"{same}{n}", name="a.very.long.name." * 9, state="timed_out", error_message="y " * 300)
        for n in range(3)
    ]
    out = Console(width=width, color_system=None)
    with out.capture() as capture:
        out.print(executions_table(found, width=width), soft_wrap=True)
    lines = capture.get().splitlines()
    assert len(lines) == 4
    for n, line in enumerate(lines[1:]):
        assert len(line) <= width
        assert "timed_out" in line
        assert f"{same}{n}" in line


def test_a_time_line_has_children_below_parents_and_says_where_the_others_are() -> None:
    outer = attempt(outer_span_id="f" * 16, outer_outcome="succeeded", outer_started_unix_ns=START, outer_ended_unix_ns=START + 2 * SECOND)
    record = execution(outer, producer_trace_id=TRACE, producer_span_id="e" * 16, queued_unix_ns=START)
    held = [span("0" * 15 + "9", outer.span_id, SECOND, SECOND + SECOND // 4, "SELECT")]
    lines = drawn(waterfall.bars(record, held))
    assert [line.split("  █")[0].strip().split("  ")[0] for line in lines][:2] == ["publish", "outer #1"]
    assert lines[2].startswith("    invoice.run #1")
    assert lines[3].startswith("      SELECT")
    assert [line.endswith("delivered") for line in lines] == [True, True, True, False]


def test_what_runs_is_drawn_until_now() -> None:
    record = execution(attempt(state="running", ended_unix_ns=None), state="running")
    [line] = drawn(waterfall.bars(record, []))
    assert line.endswith("9.00 s…  running")


def test_spans_that_are_each_others_parents_are_shown() -> None:
    lines = drawn(waterfall.bars(execution(), [span("a" * 16, "b" * 16, 0, 5, "one"), span("b" * 16, "a" * 16, 0, 5, "two")]))
    assert {"one", "two"} <= {word for line in lines for word in line.split()}


def test_a_time_line_ends_after_200_bars_and_counts_the_rest() -> None:
    lines = drawn(waterfall.bars(execution(), [span(f"{n:016x}", None, n, n + 5) for n in range(1, 251)]))
    assert len(lines) == waterfall.MAX_BARS + 1
    assert lines[-1].startswith("... and 50 spans")


@given(st.integers(0, 10**15), st.integers(0, 10**15), st.integers(0, 10**15), st.integers(16, 200))
def test_a_bar_is_visible_and_stays_on_its_line(start: int, took: int, rest: int, line: int) -> None:
    text = waterfall._bar(start, start + took, max(1, start + took + rest), line)
    assert 0 < len(text) <= line
    assert text.strip()
