"""`otelexec_trigger.run` in real scripts, started as `@trigger.dev/python` starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from otelexec.store.records import ExecutionRecord
from tests.integrations.stage import ROOT
from tests.records import Records

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SENDER = "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01"
ENVELOPE = {"v": 1, "traceparent": SENDER, "baggage": "otelexec.execution_id=e-1,otelexec.request_id=r-1,otelexec.source=webhook"}

SCRIPT = """
import asyncio, functools, sys
import otelexec
from otelexec_trigger import run

def main(payload):
    print("the script's own line")
    current = otelexec.current_execution()
    return {"payload": payload, "id": current.id, "attempt": current.attempt, "run": current.correlation.fields.get("run_id")}

async def slowly(payload):
    await asyncio.sleep(0)
    return "awaited"

def fail(payload):
    raise LookupError("no such thing")

def leave(payload):
    raise SystemExit(payload)

@otelexec.execution("the.core", core=True)
def core(payload):
    return 42

class Called:
    async def __call__(self, payload):
        return await slowly(payload)

if sys.argv[2] == "decorated":
    @run
    def decorated(payload):
        return decorated.__name__ if "decorated" in globals() else "not there yet"
else:
    run(
        dict(
            main=main, slowly=slowly, fail=fail, leave=leave, core=lambda payload: core(payload),
            called=Called(), returned=lambda payload: slowly(payload), partial=functools.partial(slowly),
            nan=lambda payload: float("nan"), unprintable=lambda payload: {(1, 2): 3},
        )[sys.argv[2]],
        name=None if sys.argv[2] in ("called", "partial") else "script",
    )
"""

Start = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def run(which: str, payload: Any = None, *, attempt: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "OTELEXEC_"))}
        told = f"exec_env=trigger,ctx.run.id=run_abc,ctx.task.id=a task, with a comma,ctx.attempt.number={attempt},ctx.x=y=z"
        return subprocess.run(
            [sys.executable, str(script), json.dumps(payload), which],
            env=kept
            | {
                "OTELEXEC_STORE": f"sqlite:///{tmp_path / 'script.db'}",
                "OTELEXEC_RELAY": "false",
                "TRACEPARENT": PARENT,
                "OTEL_RESOURCE_ATTRIBUTES": told,
                "OTEL_LOG_LEVEL": "DEBUG",
                "HOME": str(tmp_path),
                "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "integrations"))),
            }
            | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture
def read(tmp_path: Path) -> Callable[[], tuple[list[ExecutionRecord], list[Any]]]:
    def give() -> tuple[list[ExecutionRecord], list[Any]]:
        found = Records(tmp_path / "script.db")
        try:
            return found.all(), found.spans()
        finally:
            found.close()

    return give


def test_a_script_is_the_execution_that_the_payload_names(start: Start, read: Any) -> None:
    done = start("main", {"a": 1, "_otelexec": ENVELOPE})
    assert done.returncode == 0, done.stderr
    own, result = done.stdout.splitlines()
    assert own == "the script's own line"
    assert json.loads(result) == {"payload": {"a": 1}, "id": "e-1", "attempt": 1, "run": "run_abc"}
    ((record,), (span,)) = read()
    assert (record.execution_id, record.request_id, record.source, record.state) == ("e-1", "r-1", "webhook", "succeeded")
    assert json.loads(record.correlation)["run_id"] == "run_abc"
    assert (span.trace_id, span.parent_span_id) == (PARENT.split("-")[1], PARENT.split("-")[2])
    assert [link.span_id for link in span.links] == [SENDER.split("-")[2]]
    assert span.attributes["messaging.message.id"] == "run_abc"
    assert span.attributes["messaging.destination.name"] == "a task, with a comma"


def test_the_platform_counts_the_attempts(start: Start, read: Any) -> None:
    payload = {"_otelexec": ENVELOPE}
    assert start("fail", payload).returncode == 1
    assert json.loads(start("main", payload, attempt=2).stdout.splitlines()[-1])["attempt"] == 2
    ((record,), _) = read()
    assert [(attempt.attempt, attempt.state) for attempt in record.attempts] == [(1, "failed"), (2, "succeeded")]


def test_an_attempt_that_never_got_to_the_script_is_counted_too(start: Start, read: Any) -> None:
    assert json.loads(start("main", None, attempt=3).stdout.splitlines()[-1])["attempt"] == 3
    ((record,), _) = read()
    assert [attempt.attempt for attempt in record.attempts] == [3]


def test_without_an_envelope_the_run_names_the_execution(start: Start, read: Any) -> None:
    assert json.loads(start("main", [1]).stdout.splitlines()[-1])["payload"] == [1]
    ((record,), _) = read()
    assert record.execution_id == "run_abc"


def test_what_the_script_raises_goes_to_standard_error(start: Start, read: Any) -> None:
    done = start("fail")
    assert (done.returncode, done.stdout) == (1, "")
    assert "LookupError: no such thing" in done.stderr
    assert "Traceback" in done.stderr
    assert read()[0][0].state == "failed"


@pytest.mark.parametrize("code", [0, 3])
def test_an_exit_keeps_its_code(start: Start, read: Any, code: int) -> None:
    done = start("leave", code)
    assert (done.returncode, done.stdout) == (code, "")
    assert read()[0][0].state == ("succeeded" if code == 0 else "failed")


@pytest.mark.parametrize("which", ["slowly", "called", "returned", "partial"])
def test_a_coroutine_is_awaited(start: Start, which: str) -> None:
    assert start(which).stdout == '"awaited"\n'


def test_it_may_be_a_decorator(start: Start, read: Any) -> None:
    assert start("decorated").stdout == '"not there yet"\n'
    assert read()[0][0].name == "__main__.decorated"


@pytest.mark.parametrize("which", ["nan", "unprintable"])
def test_a_result_that_json_does_not_have_is_a_failure_on_record(start: Start, read: Any, which: str) -> None:
    done = start(which)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" in done.stderr
    assert read()[0][0].state == "failed"


def test_a_payload_that_is_not_signed_leaves_the_run_its_execution(start: Start, read: Any) -> None:
    signing = {"OTELEXEC_SIGNING_KEY": "0123456789abcdef0123456789abcdef"}
    start("fail", {"_otelexec": ENVELOPE}, **signing)
    assert start("slowly", {"_otelexec": ENVELOPE}, attempt=2, **signing).returncode == 0
    ((record,), _) = read()
    assert record.execution_id == "run_abc"
    assert [attempt.state for attempt in record.attempts] == ["failed", "succeeded"]


def test_a_core_takes_the_scripts_attempt_over(start: Start, read: Any) -> None:
    assert start("core").stdout == "42\n"
    ((record,), _) = read()
    assert (record.name, record.attempts[0].outer_outcome) == ("the.core", "succeeded")


def test_a_payload_that_is_no_json_is_a_failure_on_record(start: Start, read: Any, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), "{", "main"],
        env=os.environ | {"OTELEXEC_STORE": f"sqlite:///{tmp_path / 'script.db'}", "OTELEXEC_RELAY": "false", "HOME": str(tmp_path),
                          "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "integrations")))},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "JSONDecodeError" in done.stderr
    assert read()[0][0].state == "failed"


def test_it_runs_without_a_store(start: Start) -> None:
    assert start("slowly", OTELEXEC_STORE="none", OTEL_TRACES_EXPORTER="none").stdout == '"awaited"\n'
