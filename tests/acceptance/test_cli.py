"""The command line as its users have it: real processes, a real store, a real OTLP endpoint, a real terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

import otelexec
from otelexec import identity
from otelexec.receiver import Answer, OtlpReceiver
from otelexec.store.rows import Cancellation, ExecutionRow
from otelexec.store.spool import Spool
from otelexec.store.sqlite import SqliteStore
from otelexec.store.upkeep import ClaimOutbox, SettleOutbox
from otelexec.store.writes import Heartbeat, RecordQueued, RequestCancel
from otelexec.testing.rows import opened, opening
from tests.patience import PATIENCE
from tests.records import until
from tests.servers import ROOT
from tests.stores import DroppedStore

SECONDS = 60.0
WORK = """
import os, signal, sys, time
import otelexec
from opentelemetry import trace

otelexec.configure(service_name="billing", relay=False, reconcile=False)
tracer = trace.get_tracer("app")

@otelexec.execution("invoice.run", core=True)
def run_invoice(number):
    with tracer.start_as_current_span("SELECT invoices"):
        otelexec.current_execution().progress("block 1", done=1, total=2)
    otelexec.current_execution().set_output({"number": number})
    if number == 2:
        raise ValueError("no address for \\x1b[2J" + "x" * 300)

for number in (1, 2):
    with otelexec.correlate(source="webhook", webhook_id="wh_1", path="/hooks", provider="stripe", attributes={"tenant": "acme"}):
        with otelexec.publish("invoice.run"):
            payload = otelexec.inject({"number": number})
    with otelexec.extract(payload):
        try:
            with otelexec.execution("job"):
                run_invoice(number)
        except ValueError:
            pass
with otelexec.correlate(source="schedule", schedule_id="nightly", scheduled_for="2026-11-22T03:00:00Z"):
    otelexec.reject("rate_limited", name="nightly.report")
if sys.argv[1:]:
    with otelexec.execution("video.encode"):
        print("running", flush=True)
        if sys.argv[1] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while not otelexec.current_execution().cancel_requested:
            time.sleep(0.01)
"""
CLAIM = """
import os, signal, sys
from pathlib import Path
from otelexec import identity
from otelexec.store.sqlite import SqliteStore
from otelexec.store.upkeep import ClaimOutbox
from otelexec.store.writes import Heartbeat

store = SqliteStore(Path(sys.argv[1]))
process = identity.this_process(identity.mint_process_id(), lease_seconds=600, resource=b"", scope=b"")
_, rows = store.commit([Heartbeat(process), ClaimOutbox(process.process_id, 600)], durable=True, timeout_seconds=5)
assert rows
os.kill(os.getpid(), signal.SIGKILL)
"""
NO_SPACE = "error: input or output failed: No space left on device"


READING = [["list"], ["list", "--json"], ["show", "x"], ["doctor"], ["doctor", "--json"]]


@dataclass(frozen=True)
class Cli:
    """The command line with the environment of one test."""

    path: Path
    environ: Mapping[str, str]

    @property
    def store(self) -> SqliteStore:
        return DroppedStore(self.path)

    @staticmethod
    def command(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "otelexec", *arguments]

    def __call__(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env={**self.environ, **environ}, capture_output=True, text=True, timeout=SECONDS, check=False
        )

    def ok(self, *arguments: str, **environ: str) -> str:
        done = self(*arguments, **environ)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    def fails(self, code: int, *arguments: str, **environ: str) -> str:
        """Run what must fail and give its one line on stderr."""
        done = self(*arguments, **environ)
        assert done.returncode == code, done
        [line] = done.stderr.splitlines()
        assert line.startswith("error: ")
        return line

    def records(self, *arguments: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.ok("list", "--json", *arguments).splitlines()]

    @contextmanager
    def started(self, *arguments: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
        """Start a command that stays; what a failed test leaves running is killed."""
        process = subprocess.Popen(
            self.command(*arguments), env={**self.environ, **environ}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def work(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", WORK, *arguments], env=self.environ, capture_output=True, text=True, timeout=SECONDS, check=False
        )

    def on_terminal(self, columns: int, *arguments: str, **environ: str) -> tuple[int, str]:
        """Run a command on a terminal of this width; gives its exit code and everything that it wrote there."""
        main, side = pty.openpty()
        ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        environ = {**self.environ, "TERM": "xterm-256color", **environ}
        process = subprocess.Popen(self.command(*arguments), env=environ, stdin=side, stdout=side, stderr=side, close_fds=True)
        os.close(side)
        written = bytearray()
        deadline = time.monotonic() + SECONDS
        try:
            while time.monotonic() < deadline:
                if select.select([main], [], [], 0.1)[0]:
                    try:
                        written += os.read(main, 65_536)
                    except OSError:  # EIO: the other side is closed, as everything has been read
                        break
                elif process.poll() is not None:
                    break
            return process.wait(max(0.1, deadline - time.monotonic())), written.decode()
        finally:
            os.close(main)
            if process.poll() is None:
                process.kill()
                process.wait()


def make_cli(folder: Path) -> Cli:
    """Give the command line with an environment of its own; nothing of the machine's comes in."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL", "COLUMNS", "FORCE_COLOR", "NO_COLOR"))}
    # A port where nothing listens, so that no test sends anything to a collector of this machine.
    environ |= {"PYTHONPATH": str(ROOT), "HOME": str(folder), "OTELEXEC_OTLP_ENDPOINT": "http://127.0.0.1:9", "TERM": "dumb", "TZ": "UTC"}
    return Cli(folder / "store.db", {**environ, "OTELEXEC_STORE": f"sqlite:///{folder / 'store.db'}"})


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return make_cli(tmp_path)


@pytest.fixture(scope="module")
def store_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the store that a worker left behind with executions that succeeded, failed and were rejected."""
    cli = make_cli(tmp_path_factory.mktemp("worked"))
    done = cli.work()
    assert done.returncode == 0, done
    return cli.path


@pytest.fixture
def worked(cli: Cli, store_file: Path) -> Cli:
    """Give the command line with a copy of that store."""
    shutil.copy(store_file, cli.path)
    return cli


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def spans_in_outbox(cli: Cli) -> int:
    store = cli.store
    try:
        return store.statistics().outbox_spans
    finally:
        store.close()


def test_list_prints_one_json_object_a_line_with_the_record_as_it_is(worked: Cli) -> None:
    rejected, failed, succeeded = worked.records()
    assert [each["state"] for each in (rejected, failed, succeeded)] == ["rejected", "failed", "succeeded"]
    assert rejected["correlation"] == {"schedule_id": "nightly", "scheduled_for": "2026-11-22T03:00:00Z"}
    assert succeeded["correlation"] == {"webhook_id": "wh_1", "path": "/hooks", "provider": "stripe", "tenant": "acme"}
    [attempt] = succeeded["attempts"]
    assert attempt["progress"]["done"] == 1
    assert attempt["output"] == {"number": 1}
    assert (attempt["trace_id"], attempt["span_id"]) == (succeeded["trace_id"], succeeded["span_id"])
    assert attempt["outer_outcome"] == "succeeded"
    assert attempt["started_unix_ns"] == succeeded["started_unix_ns"] <= attempt["ended_unix_ns"] == succeeded["ended_unix_ns"]
    assert failed["error_type"] == "ValueError"
    assert failed["error_message"].startswith("no address for \x1b[2J")


def test_list_takes_state_and_limit(worked: Cli) -> None:
    assert [each["name"] for each in worked.records("--limit", "2")] == ["nightly.report", "invoice.run"]
    assert [each["state"] for each in worked.records("--state", "succeeded", "--limit", "5")] == ["succeeded"]
    assert worked.records("--state", "lost") == []
    assert "No such execution" in worked.ok("list", "--state", "lost")


def test_list_takes_a_time(worked: Cli) -> None:
    assert worked.records("--since", "1h") == worked.records()
    assert worked.records("--since", "0s") == []
    assert "--since" in worked.fails(2, "list", "--since", "yesterday")


def test_an_execution_is_found_by_who_asked_for_it(worked: Cli) -> None:
    asked = worked.records("--where", "webhook_id=wh_1", "--where", "tenant=acme", "--source", "webhook")
    found = next(each for each in asked if each["state"] == "succeeded")
    assert all(each["correlation"]["webhook_id"] == "wh_1" for each in asked)
    assert worked.records("--where", "webhook_id=wh_1", "--where", "tenant=other") == []
    assert worked.records("--request", found["request_id"], "--state", "succeeded", "--name", found["name"]) == [found]
    assert worked.records("--source", "webhook", "--name", "nightly.report") == []
    assert found["execution_id"] in worked.ok("show", found["request_id"])
    assert "list --where" in worked.fails(1, "show", "nobody")
    assert "KEY=VALUE" in worked.fails(2, "list", "--where", "webhook_id")


def test_a_request_of_several_executions_is_told_where_they_are_listed(cli: Cli) -> None:
    store = cli.store
    for number in range(2):
        row = opening(f"t{number}", f"e{number}")
        opened(store, replace(row, execution=replace(row.execution, request_id="r1")))
    assert "`otelexec list --request r1`" in cli.fails(1, "show", "r1")
    assert [each["execution_id"] for each in cli.records("--request", "r1")] == ["e1", "e0"]


def test_in_a_pipe_the_table_is_plain_and_nothing_is_cut(worked: Cli) -> None:
    text = worked.ok("list")
    assert "\x1b" not in text
    header, *rows = text.splitlines()
    assert header.split() == ["STARTED", "STATE", "TOOK", "TRIES", "NAME", "SOURCE", "EXECUTION", "ERROR"]
    assert [each["execution_id"] in row for each, row in zip(worked.records(), rows, strict=True)] == [True] * 3
    assert "x" * 300 in rows[1]


def test_on_a_terminal_of_80_columns_no_line_breaks_and_states_are_coloured(worked: Cli) -> None:
    code, text = worked.on_terminal(80, "list")
    assert code == 0
    assert "\x1b[32msucceeded" in text
    plain = _without_colours(text)
    assert "\x1b" not in plain  # the error message's own is gone
    lines = plain.splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= 80
    shown = lines[1].split()[-1]
    assert shown.endswith("…")
    assert json.loads(worked.ok("show", shown, "--json"))["name"] == "nightly.report"


def _without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[mKhlAG]|\x1b\]8;[^\x1b]*\x1b\\", "", text)


def test_what_the_encoding_has_not_is_replaced(worked: Cli) -> None:
    shown = worked.ok("list", PYTHONIOENCODING="ascii", COLUMNS="100").splitlines()[1].split()[-1]
    assert shown.endswith("?")  # an ellipsis
    assert json.loads(worked.ok("show", shown, "--json"))["name"] == "nightly.report"
    assert "?????" in worked.ok("show", shown, PYTHONIOENCODING="ascii")


@pytest.mark.parametrize("where", [">/dev/full", ">&-"])
@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["--help"]])
def test_an_output_that_can_not_be_written_is_one_line_and_exit_1(worked: Cli, arguments: list[str], where: str) -> None:
    command = ["sh", "-c", f'exec "$@" {where}', "sh", *worked.command(*arguments)]
    done = subprocess.run(command, env=worked.environ, stderr=subprocess.PIPE, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line == ("error: stdout is closed: there is nowhere to write to" if "&" in where else NO_SPACE)


def test_without_a_stderr_a_command_does_its_work(worked: Cli) -> None:
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *worked.command("list", "--json")]
    done = subprocess.run(command, env=worked.environ, stdout=subprocess.PIPE, text=True, timeout=SECONDS, check=False)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 3)


def test_a_width_of_0_is_none(worked: Cli) -> None:
    assert worked.ok("list", COLUMNS="0") == worked.ok("list")


@pytest.mark.parametrize("arguments", [["list"], ["show"], ["doctor"]])
def test_in_a_pipe_no_line_ends_in_blanks(worked: Cli, arguments: list[str]) -> None:
    if arguments == ["show"]:
        arguments = ["show", worked.records("--state", "succeeded")[0]["execution_id"]]
    text = worked(*arguments).stdout
    assert text
    assert [line for line in text.splitlines() if line.endswith(" ")] == []


def test_an_empty_store_is_no_error(cli: Cli) -> None:
    cli.store.commit([], durable=True, timeout_seconds=5)
    assert cli.ok("list", "--json") == ""
    assert cli.ok("list").startswith("No execution in sqlite:///")
    assert cli.ok("reconcile", "--once") == "Nothing to close.\n"
    assert cli.ok("prune", "--older-than", "1d").startswith("Deleted 0 executions")
    assert "nothing is left" in cli.ok("relay", "--drain")


@pytest.mark.parametrize(
    "arguments", [*READING, ["cancel", "x"], ["prune", "--older-than", "1d"], ["relay", "--drain"], ["reconcile", "--once"]]
)
def test_without_a_store_every_command_names_the_absolute_path_and_creates_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = cli.fails(2, *arguments, OTELEXEC_STORE="sqlite:///folder/none.db")
    assert str(tmp_path / "folder" / "none.db") in line
    assert not (tmp_path / "folder").exists()


def test_a_file_that_is_no_store_yet_is_left_as_it_is(cli: Cli) -> None:
    cli.path.touch()
    assert str(cli.path) in cli.fails(2, "list")
    assert cli.path.read_bytes() == b""


def test_a_store_of_a_newer_version_is_one_line_and_exit_2(worked: Cli) -> None:
    connection = sqlite3.connect(worked.path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    for arguments in (["list"], ["doctor"], ["relay", "--drain"]):
        assert "Upgrade" in worked.fails(2, *arguments)


@pytest.mark.parametrize(
    ("arguments", "environ", "named"),
    [
        (["list"], {"OTELEXEC_LEASE_SECONDS": "soon"}, "OTELEXEC_LEASE_SECONDS"),
        (["list"], {"OTELEXEC_STORE": "mysql://u:secret@h/d"}, "OTELEXEC_STORE"),
        (["list"], {"OTELEXEC_STORE": "none"}, "OTELEXEC_STORE"),
        (["list", "--store", "bogus"], {}, "--store"),
        (["list", "--limit", "0"], {}, "--limit"),
        (["list", "--state", "happy"], {}, "--state"),
        (["show", "x", "--jaeger-url", "jaeger"], {}, "--jaeger-url"),
        (["relay", "--otlp-endpoint", "bogus"], {}, "--otlp-endpoint"),
        (["relay", "--drain"], {"OTEL_EXPORTER_OTLP_PROTOCOL": "smoke"}, "OTEL_EXPORTER_OTLP_PROTOCOL"),
        (["relay", "--timeout", "5"], {}, "--timeout"),
        (["relay", "--drain", "--timeout", "inf"], {}, "--timeout"),
        (["reconcile", "--once", "--interval", "5"], {}, "--interval"),
        (["reconcile", "--interval", "1e10"], {}, "--interval"),
        (["prune", "--older-than", "30"], {}, "--older-than"),
        (["prune"], {}, "--older-than"),
        (["show"], {}, "EXECUTION_ID"),
        (["lst"], {}, "lst"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it_and_exit_2(
    worked: Cli, arguments: list[str], environ: dict[str, str], named: str
) -> None:
    line = worked.fails(2, *arguments, **environ)
    assert named in line
    assert "secret" not in line


def test_an_option_goes_before_its_variable(worked: Cli, tmp_path: Path) -> None:
    text = worked.ok("list", "--json", "--store", f"sqlite:///{worked.path}", OTELEXEC_STORE=f"sqlite:///{tmp_path}/none.db")
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize("command", ["list", "show", "cancel", "relay", "reconcile", "doctor", "prune", "demo"])
def test_every_command_explains_itself(cli: Cli, command: str) -> None:
    text = cli.ok(command, "--help", COLUMNS="200")
    assert f"otelexec {command}" in text
    if command != "demo":
        assert "OTELEXEC_STORE" in text


def test_without_arguments_the_commands_are_listed(cli: Cli) -> None:
    text = cli.ok()
    for command in ("list", "show", "cancel", "relay", "reconcile", "doctor", "prune", "demo"):
        assert f" {command} " in text


def test_the_version_is_printed(cli: Cli) -> None:
    assert cli.ok("--version") == f"otelexec {otelexec.__version__}\n"


def test_show_has_the_held_spans_and_the_link_to_jaeger(worked: Cli) -> None:
    [wanted] = worked.records("--state", "succeeded")
    found = json.loads(worked.ok("show", wanted["execution_id"], "--json", OTELEXEC_JAEGER_URL="https://jaeger.example/ui/"))
    assert {name: found[name] for name in wanted} == wanted
    assert found["trace_urls"] == [f"https://jaeger.example/ui/trace/{wanted['trace_id']}"]
    assert {each["name"] for each in found["held_spans"]} == {"send", "job", "invoice.run", "SELECT invoices"}
    text = worked.ok("show", wanted["execution_id"], "--jaeger-url", "http://127.0.0.1:16686", COLUMNS="100")
    assert f"http://127.0.0.1:16686/trace/{wanted['trace_id']}" in text
    worker = wanted["attempts"][0]["worker"]
    assert worker["service_name"] == "billing"
    assert f"{worker['pid']} on {worker['host']}, service billing\n" in text
    assert "block 1 (1 of 2)" in text
    assert "█" in text
    assert "delivered" not in text


def test_show_draws_delivered_attempts_from_the_record(worked: Cli, receiver: OtlpReceiver) -> None:
    worked.ok("relay", "--drain", "--otlp-endpoint", receiver.endpoint)
    [wanted] = worked.records("--state", "succeeded")
    found = json.loads(worked.ok("show", wanted["execution_id"], "--json"))
    assert found["held_spans"] == []
    lines = worked.ok("show", wanted["execution_id"], COLUMNS="100").splitlines()
    assert [line.strip().split("  ")[0] for line in lines if line.endswith("delivered")] == ["publish", "outer #1", "invoice.run #1"]
    assert lines[-1] == "Spans below a delivered one are in Jaeger."


def test_show_says_which_ids_a_short_prefix_could_mean(worked: Cli) -> None:
    ids = [each["execution_id"] for each in worked.records()]
    line = worked.fails(1, "show", ids[0][:6])
    assert all(each in line for each in ids)  # minted within a second, so that they begin alike
    assert "nonsense" in worked.fails(1, "show", "nonsense")


def test_a_drain_delivers_outbox_and_spool_and_leaves_nothing(worked: Cli, receiver: OtlpReceiver) -> None:
    held = spans_in_outbox(worked)
    store = worked.store
    process = identity.this_process("p" * 32, lease_seconds=30, resource=b"", scope=b"")
    Spool(store.spool_folder, lambda: process).append(
        RecordQueued(ExecutionRow("from-spool", "late", "r-1", "direct", "{}", None), None, process.process_id, time.time_ns()),
        durable=True,
    )
    store.close()
    text = worked.ok("relay", "--drain", "--otlp-endpoint", receiver.endpoint)
    assert text == f"Delivered {held} spans to {receiver.endpoint}/v1/traces; nothing is left.\n"
    assert len(receiver.spans) == held
    assert spans_in_outbox(worked) == 0
    assert "from-spool" in [each["execution_id"] for each in worked.records()]
    assert not list(store.spool_folder.glob("*.jsonl"))


def test_a_spool_whose_store_was_never_made_is_taken_in(cli: Cli, receiver: OtlpReceiver) -> None:
    process = identity.this_process("p" * 32, lease_seconds=30, resource=b"", scope=b"")
    Spool(cli.store.spool_folder, lambda: process).append(
        RecordQueued(ExecutionRow("from-spool", "late", "r-1", "direct", "{}", None), None, process.process_id, time.time_ns()),
        durable=True,
    )
    cli.ok("relay", "--drain", "--otlp-endpoint", receiver.endpoint)
    assert [each["execution_id"] for each in cli.records()] == ["from-spool"]


def test_a_drain_outlasts_a_transient_refusal(worked: Cli, receiver: OtlpReceiver) -> None:
    held = spans_in_outbox(worked)
    receiver.script(Answer(503), Answer(429, retry_after="1"), Answer(401), Answer(200))
    done = worked("relay", "--drain", "--timeout", "50", "--otlp-endpoint", receiver.endpoint)
    assert done.returncode == 0
    assert len(receiver.spans) == held
    assert all(line.startswith(("warning: ", "error: ", "Delivering")) for line in done.stderr.splitlines())


def test_a_drain_ends_with_1_at_its_timeout_and_says_why_in_one_line(worked: Cli) -> None:
    held = spans_in_outbox(worked)
    done = worked("relay", "--drain", "--timeout", "1")
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: not drained within 1 s: {held} spans in ")
    assert "refused" in line
    assert spans_in_outbox(worked) == held


def test_parked_rows_neither_hold_a_drain_up_nor_are_lost(worked: Cli, receiver: OtlpReceiver) -> None:
    held = spans_in_outbox(worked)
    receiver.poison = lambda span: span.name == "SELECT invoices"
    done = worked("relay", "--drain", "--otlp-endpoint", receiver.endpoint)
    assert done.returncode == 0
    assert "parked, see `otelexec doctor`" in done.stdout
    assert len(receiver.spans) < held
    found = json.loads(worked("doctor", "--json", "--otlp-endpoint", receiver.endpoint).stdout)
    assert not found["ok"]
    assert len(found["parked"]) == 2
    assert all("400" in each["reason"] for each in found["parked"])
    receiver.poison = None
    text = worked.ok("relay", "--drain", "--retry-parked", "--otlp-endpoint", receiver.endpoint)
    assert text.startswith("2 parked rows will be sent again.\n")
    assert len(receiver.spans) == held
    assert json.loads(worked.ok("doctor", "--json", "--otlp-endpoint", receiver.endpoint))["parked"] == []


def test_parked_rows_that_nobody_wants_any_more_can_be_deleted(worked: Cli, receiver: OtlpReceiver) -> None:
    """They would keep their executions from being pruned, and doctor from being content, for ever."""
    receiver.poison = lambda span: span.name == "SELECT invoices"
    assert worked("relay", "--drain", "--otlp-endpoint", receiver.endpoint).returncode == 0
    known, sent = worked.ok("list", "--json"), len(receiver.spans)
    both = worked("relay", "--drain", "--retry-parked", "--discard-parked", "--otlp-endpoint", receiver.endpoint)
    assert both.returncode == 2
    text = worked.ok("relay", "--drain", "--discard-parked", "--otlp-endpoint", receiver.endpoint)
    assert text.startswith("2 parked rows deleted.\n")
    assert json.loads(worked.ok("doctor", "--json", "--otlp-endpoint", receiver.endpoint))["parked"] == []
    assert (worked.ok("list", "--json"), len(receiver.spans)) == (known, sent)
    worked.ok("prune", "--older-than", "0s")
    assert worked.ok("list", "--json", "--state", "succeeded") == ""


def test_a_drain_does_not_wait_for_the_lease_of_a_killed_relay(worked: Cli, receiver: OtlpReceiver) -> None:
    """The killed one claimed everything for 600 s."""
    held = spans_in_outbox(worked)
    killed = subprocess.run([sys.executable, "-c", CLAIM, str(worked.path)], env=worked.environ, timeout=SECONDS, check=False)
    assert killed.returncode == -signal.SIGKILL
    worked.ok("relay", "--drain", "--timeout", "20", "--otlp-endpoint", receiver.endpoint)
    assert len(receiver.spans) == held


def test_a_killed_drain_leaves_nothing_that_the_next_one_has_to_wait_for(worked: Cli, receiver: OtlpReceiver) -> None:
    """Its process row stands in the store before it claims."""
    held = spans_in_outbox(worked)
    receiver.answer = lambda _: Answer(503, delay_seconds=5)
    with worked.started("relay", "--drain", "--otlp-endpoint", receiver.endpoint) as process:
        store = worked.store
        until(store.claim_owners)
        process.kill()
        process.wait()
        assert store.claim_owners()
        store.close()
    receiver.answer = None
    worked.ok("relay", "--drain", "--timeout", "20", "--otlp-endpoint", receiver.endpoint)
    assert len({span.span_id for span in receiver.spans}) == held


def test_the_relay_of_a_worker_takes_over_from_a_killed_relay(worked: Cli, receiver: OtlpReceiver) -> None:
    """No command is needed for it."""
    held = spans_in_outbox(worked)
    subprocess.run([sys.executable, "-c", CLAIM, str(worked.path)], env=worked.environ, timeout=SECONDS, check=False)
    code = "import otelexec, sys\nwith otelexec.execution('idle'):\n    print('x', flush=True)\n    sys.stdin.read()\n"
    environ = {**worked.environ, "OTELEXEC_OTLP_ENDPOINT": receiver.endpoint, "OTELEXEC_RECONCILE": "false"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environ, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        receiver.wait_for(held, timeout=20)
    finally:
        process.communicate(b"", timeout=SECONDS)


def test_a_drain_waits_for_a_relay_that_lives(worked: Cli, receiver: OtlpReceiver) -> None:
    store = worked.store
    process = identity.this_process("p" * 32, lease_seconds=30, resource=b"", scope=b"")
    _, rows = store.commit([Heartbeat(process), ClaimOutbox(process.process_id, 600)], durable=False, timeout_seconds=5)
    assert isinstance(rows, list)
    line = worked.fails(1, "relay", "--drain", "--timeout", "1", "--otlp-endpoint", receiver.endpoint)
    assert "another relay has them in hand" in line
    assert not receiver.requests
    store.commit([SettleOutbox(process.process_id, released=[row.id for row in rows])], durable=False, timeout_seconds=5)
    store.close()


def test_a_drain_keeps_to_its_time_while_the_store_is_locked(worked: Cli, receiver: OtlpReceiver) -> None:
    connection = sqlite3.connect(worked.path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    begun = time.monotonic()
    done = worked("relay", "--drain", "--timeout", "0.2", "--otlp-endpoint", receiver.endpoint)
    took = time.monotonic() - begun
    connection.close()
    assert done.returncode == 1
    assert "not drained within 0.2 s" in done.stderr
    assert took < 5 * PATIENCE  # as long as a single commit waits otherwise; two of them were waited for


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_relay_that_stays_delivers_until_a_signal_and_ends_well(worked: Cli, receiver: OtlpReceiver, number: signal.Signals) -> None:
    held = spans_in_outbox(worked)
    with worked.started("relay", "--otlp-endpoint", receiver.endpoint) as process:
        receiver.wait_for(held, timeout=30)
        process.send_signal(number)
        out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (0, "")
    assert f"{held} spans delivered in all.\n" in out
    assert spans_in_outbox(worked) == 0


def test_ctrl_c_ends_a_drain_quietly_with_130_and_gives_its_rows_back(worked: Cli, receiver: OtlpReceiver) -> None:
    receiver.answer = lambda _: Answer(503, delay_seconds=0.2)
    with worked.started("relay", "--drain", "--otlp-endpoint", receiver.endpoint) as process:
        until(lambda: receiver.requests)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert out == ""
    assert all(line.startswith("warning: ") for line in err.splitlines())
    assert worked.store.claim_owners() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_never_falls_between_an_answer_and_its_deletion(worked: Cli, receiver: OtlpReceiver, number: signal.Signals) -> None:
    """The request under way is answered a second later, and what it held is deleted then."""
    arrived = threading.Event()

    def answer_late(_: object) -> Answer:
        arrived.set()
        return Answer(delay_seconds=1)

    receiver.answer = answer_late
    with worked.started("relay", "--drain", "--otlp-endpoint", receiver.endpoint) as process:
        assert arrived.wait(SECONDS)
        process.send_signal(number)
        process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number
    assert spans_in_outbox(worked) == 0


def test_sigterm_ends_a_drain_with_143_and_gives_its_rows_back(worked: Cli, receiver: OtlpReceiver) -> None:
    receiver.answer = lambda _: Answer(503, delay_seconds=0.2)
    with worked.started("relay", "--drain", "--otlp-endpoint", receiver.endpoint) as process:
        until(lambda: receiver.requests)
        process.terminate()
        process.communicate(timeout=SECONDS)
    assert process.returncode == 143
    assert worked.store.claim_owners() == []


def test_a_drain_shows_a_bar_on_a_terminal_and_plain_lines_elsewhere(worked: Cli, receiver: OtlpReceiver) -> None:
    receiver.script(*[Answer(503, delay_seconds=0.3)] * 2)
    code, text = worked.on_terminal(100, "relay", "--drain", "--timeout", "30", "--otlp-endpoint", receiver.endpoint)
    assert code == 0
    assert "Delivering" in text
    assert "rows" in text
    assert "nothing is left" in _without_colours(text)
    assert "\x1b" not in worked.ok("relay", "--drain", "--otlp-endpoint", receiver.endpoint)


def test_reconcile_once_closes_what_a_killed_worker_left(cli: Cli, receiver: OtlpReceiver) -> None:
    assert cli.work("kill").returncode == -signal.SIGKILL
    [left] = cli.records("--state", "running")
    found = json.loads(cli("doctor", "--json").stdout)
    assert [each["pid"] for each in found["workers"]["dead"]] == [left["attempts"][0]["worker"]["pid"]]
    done = cli("reconcile", "--once")
    assert (done.returncode, done.stdout) == (0, "Closed 1 attempt of 1 dead process.\n")
    assert f"execution {left['execution_id']} attempt 1" in done.stderr
    [lost] = cli.records("--state", "lost")
    assert lost["attempts"][0]["classification"] == "killed"
    assert lost["span_id"] == left["span_id"]
    assert cli.ok("reconcile", "--once") == "Nothing to close.\n"
    cli.ok("relay", "--drain", "--otlp-endpoint", receiver.endpoint)
    assert receiver.deliveries[lost["span_id"]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_reconcile_stays_until_a_signal_and_ends_well(cli: Cli, number: signal.Signals) -> None:
    cli.work("kill")
    with cli.started("reconcile", "--interval", "0.1") as process:
        until(lambda: cli.records("--state", "lost"), 30)
        process.send_signal(number)
        out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert "Closed 1 attempt of 1 dead process." in out


def test_doctor_says_all_is_well_with_0(cli: Cli, receiver: OtlpReceiver) -> None:
    cli.work()
    text = cli.ok("doctor", "--otlp-endpoint", receiver.endpoint)
    assert "WRONG" not in text
    assert str(cli.path) in text
    assert "need PostgreSQL" in text
    found = json.loads(cli.ok("doctor", "--json", "--otlp-endpoint", receiver.endpoint))
    assert found["ok"]
    assert found["problems"] == []
    assert found["executions"] == {"failed": 1, "rejected": 1, "succeeded": 1}
    assert found["outbox"]["spans"] == spans_in_outbox(cli)
    assert not receiver.requests


def test_doctor_finds_spool_endpoint_and_unseen_cancellation(worked: Cli) -> None:
    store = worked.store
    process = identity.this_process("p" * 32, lease_seconds=30, resource=b"", scope=b"")
    Spool(store.spool_folder, lambda: process).append(RequestCancel("e-1", Cancellation(1, terminate=False)), durable=True)
    store.close()
    connection = sqlite3.connect(worked.path)
    with connection:
        connection.execute("UPDATE execution SET state = 'running' WHERE name = 'nightly.report'")
        connection.execute("INSERT INTO cancellation SELECT execution_id, 1, 1 FROM execution WHERE name = 'nightly.report'")
        connection.execute("UPDATE outbox SET written_unix_ns = written_unix_ns - 100000000000")
    connection.close()
    done = worked("doctor", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["endpoint"]["reachable"] is False
    assert len(found["spool"]["segments"]) == 1
    assert len(found["unseen_cancellations"]) == 1
    assert found["outbox"]["oldest_age_seconds"] > 99
    assert len(found["problems"]) == 4
    text = worked("doctor", COLUMNS="80").stdout
    assert text.count("WRONG") == 4
    assert max(map(len, text.splitlines())) <= 92  # the last line is one sentence and is not cut


def test_doctor_counts_all_that_is_parked(worked: Cli) -> None:
    with closing(sqlite3.connect(worked.path)) as connection, connection:
        connection.execute(
            """WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1500)
               INSERT INTO parked (id, request, count, reason, parked_unix_ns) SELECT i, x'00', 2, 'HTTP 400', 1 FROM n"""
        )
    text = " ".join(worked("doctor", COLUMNS="300").stdout.split())
    assert "3,000 spans in 1,500 rows that the endpoint refused for good: of the oldest 100, 100 x HTTP 400" in text


def test_doctor_reports_a_store_that_is_locked_or_damaged(worked: Cli, receiver: OtlpReceiver) -> None:
    connection = sqlite3.connect(worked.path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    done = worked("doctor", "--json", "--otlp-endpoint", receiver.endpoint)
    connection.close()
    assert done.returncode == 1
    assert "locked" in json.loads(done.stdout)["store"]["error"]
    worked.path.write_bytes(b"no database " * 1_000)
    found = json.loads(worked("doctor", "--json", "--otlp-endpoint", receiver.endpoint).stdout)
    assert found["store"]["reachable"] is False
    assert worked.path.read_bytes().startswith(b"no database")
    assert "no database" not in worked.fails(1, "list")


def test_doctor_names_files_without_their_escape_sequences(worked: Cli) -> None:
    """In a folder that is shared, others name files, too."""
    spool = worked.path.with_name(f"{worked.path.name}.spool")
    spool.mkdir()
    (spool / "x\x1b]0;theirs\x07.damaged").touch()
    worked.path.with_name(f"{worked.path.name}.corrupt-\x1b[2J").touch()
    text = worked("doctor").stdout
    assert "]0;theirs .damaged" in text
    assert ".corrupt- [2J" in text
    assert "\x1b" not in text


def test_prune_deletes_what_is_old_and_delivered_only(worked: Cli, receiver: OtlpReceiver) -> None:
    assert worked.ok("prune", "--older-than", "0s").startswith("Deleted 0 executions")
    worked.ok("relay", "--drain", "--otlp-endpoint", receiver.endpoint)
    assert worked.ok("prune", "--older-than", "1h").startswith("Deleted 0 executions")
    assert worked.ok("prune", "--older-than", "0s").startswith("Deleted 3 executions that ended before ")
    assert worked.records() == []


def test_cancel_reaches_a_running_execution_in_another_process(cli: Cli) -> None:
    worker = subprocess.Popen([sys.executable, "-c", WORK, "wait"], env=cli.environ, stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "running\n"
        [running] = cli.records("--state", "running")
        assert "within 0.5 s" in cli.ok("cancel", running["execution_id"])
        assert worker.wait(timeout=30) == 0
    finally:
        worker.kill()
        worker.communicate()
    found = json.loads(cli.ok("show", running["execution_id"], "--json"))
    assert found["cancel_requested"] is True
    assert found["cancel_terminate"] is None
    assert "already ended" in cli.fails(1, "cancel", running["execution_id"])
    assert "no execution" in cli.fails(1, "cancel", "nonsense")


@pytest.fixture
def full(cli: Cli) -> Cli:
    """Give the command line with 10,000 executions in the store."""
    store = cli.store
    for start in range(0, 10_000, 1_000):
        rows = [ExecutionRow(f"e-{n:05}", "work", f"r-{n}", "direct", "{}", None) for n in range(start, start + 1_000)]
        store.commit([RecordQueued(row, None, "p", time.time_ns()) for row in rows], durable=False, timeout_seconds=5)
    store.close()
    return cli


@pytest.mark.parametrize("command", ["list", "show", "cancel", "doctor"])
def test_a_command_imports_nothing_that_only_others_need(command: str) -> None:
    code = "import sys; from otelexec import cli; cli.main(sys.argv[1:]); print({'requests', 'uvicorn', 'celery', 'rq'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code, command, "--help"], capture_output=True, text=True, timeout=SECONDS, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_ten_thousand_executions_are_listed_whole_as_json_and_in_part_as_a_table(full: Cli) -> None:
    ids = [each["execution_id"] for each in full.records()]
    assert ids == [f"e-{n:05}" for n in reversed(range(10_000))]
    done = full("list")
    assert len(done.stdout.splitlines()) == 51
    assert done.stderr.startswith("note: the newest 50 are shown")
    assert len(full.ok("list", "--limit", "10000").splitlines()) == 10_001


@pytest.mark.parametrize("arguments", [["list", "--json"], ["list"], ["show", "", "--json"], ["doctor"], ["--help"]])
def test_a_reader_that_goes_away_is_no_traceback(worked: Cli, arguments: list[str]) -> None:
    if arguments[0] == "show":
        arguments[1] = worked.records()[0]["execution_id"]
    with worked.started(*arguments) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=SECONDS)
    assert err == ""
    assert process.returncode == 1
