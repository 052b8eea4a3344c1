"""The end of the demo: what was recorded, the spans beside it, and where these go."""

from __future__ import annotations

import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console

from otelexec import endpoint as _endpoint
from otelexec.cli import waterfall
from otelexec.cli.demo import view
from otelexec.decoded import DecodedSpan, decode
from otelexec.errors import SettingsError
from otelexec.relay import Relay
from otelexec.runtime import Runtime
from otelexec.store.base import Store
from otelexec.store.records import ExecutionRecord
from otelexec.store.upkeep import ClaimOutbox, SettleOutbox

SHOWN_TRACE = "order.import"
KILLED = "video.encode"
CLAIM_SECONDS = 10.0
BATCH = 1_000
WATERFALL_COLUMNS = 100
DRAIN_SECONDS = 10.0
CONNECT_SECONDS = 1.0
DEFAULT_PORTS = {"http": 80, "https": 443}


def show(console: Console, runtime: Runtime, records: Sequence[ExecutionRecord], *, complete: bool) -> list[str]:
    """
    Show the table and one trace.

    Args:
        console: Where.
        runtime: This process's runtime.
        records: The executions of this run.
        complete: Whether all spans must still be in the outbox; not so where another process's relay may have sent some.

    Returns:
        What is wrong, a line each.
    """
    spans = held_spans(runtime, records)
    console.print()
    console.print(view.table(records, view.index(spans), width=console.width))
    chosen = next((record for record in records if record.name == SHOWN_TRACE and record.attempts), None)
    if chosen is not None:
        trace_id = chosen.attempts[0].trace_id
        console.print(f"\nThe trace of {chosen.name} ([dim]{trace_id}[/]):\n")
        roots = waterfall.bars(chosen, [span for span in spans if span.trace_id == trace_id])
        console.print(waterfall.draw(roots, width=min(console.width, WATERFALL_COLUMNS)))
    console.print()
    wrong = view.faults(records, spans, complete=True)
    if complete or not wrong:
        return wrong
    console.print(
        "[dim]Another process has this store open. Spans that its relay has sent already could not be compared.[/]", soft_wrap=True
    )
    return view.faults(records, spans, complete=False)


def held_spans(runtime: Runtime, records: Sequence[ExecutionRecord]) -> list[DecodedSpan]:
    """Read the spans of these executions' traces that wait in the outbox: a claim on all rows, given back at once."""
    wanted = {attempt.trace_id for record in records for attempt in record.attempts}
    found: list[DecodedSpan] = []
    claimed: list[int] = []
    try:
        while True:
            [rows] = runtime.journal.commit_all([ClaimOutbox(runtime.process_id, CLAIM_SECONDS, BATCH)])
            if not isinstance(rows, list) or not rows:
                return found
            claimed += [row.id for row in rows]
            found += [span for row in rows for span in decode(row.request) if span.trace_id in wanted]
    finally:
        runtime.journal.commit_all([SettleOutbox(runtime.process_id, released=claimed)])


def farewell(console: Console, runtime: Runtime, store: Store, records: Sequence[ExecutionRecord], wrong: Sequence[str]) -> None:
    """
    Say how it went, deliver the spans if something listens, and say what to try next.

    Args:
        console: Where.
        runtime: This process's runtime.
        store: The store.
        records: The executions of this run.
        wrong: What is wrong, a line each.
    """
    attempts = sum(len(record.attempts) for record in records)
    if wrong:
        console.print(f"[bold red]Not every execution is closed with its span ({len(records)} executions, {attempts} attempts):[/]")
        for line in wrong:
            console.print(f"  {line}", markup=False, soft_wrap=True)
    else:
        console.print(
            f"[bold green]{len(records)} executions, {attempts} attempts: every one is closed with its span[/], "
            "with the same outcome and the same end to the nanosecond, the killed one too.",
            soft_wrap=True,
        )
    _deliver(console, runtime, store, records)
    killed = next((record for record in records if record.name == KILLED), None)
    url = shlex.quote(store.url)
    command = _command()
    console.print("\nLook around:")
    console.print(f"  export OTELEXEC_STORE={url}", soft_wrap=True, markup=False)
    console.print(f"  {command} list", markup=False)
    if killed is not None:
        console.print(f"  {command} show {killed.execution_id}", soft_wrap=True, markup=False)


def _deliver(console: Console, runtime: Runtime, store: Store, records: Sequence[ExecutionRecord]) -> None:
    try:
        where = _endpoint.read(runtime.settings.otlp_endpoint)
    except SettingsError as error:
        console.print(f"The spans wait in the outbox of the store: {error}", markup=False, soft_wrap=True)
        return
    waiting = store.statistics().outbox_spans
    target = where.url if "://" in where.url else f"//{where.url}"
    if not _listens(target):
        console.print(f"{waiting} spans wait in the outbox of the store: nothing listens at {where.shown}.", soft_wrap=True)
        console.print("\nTo see them in Jaeger, start one in another terminal, then deliver:")
        console.print("  make jaeger")
        console.print(f"  OTELEXEC_STORE={shlex.quote(store.url)} {_command()} relay --drain", soft_wrap=True, markup=False)
        return
    relay = Relay(runtime.journal.commit_all, runtime.settings, runtime.process_id, waiting=store.outbox_rows)
    drained = relay.drain(DRAIN_SECONDS)
    relay.stop(1.0)
    statistics = store.statistics()
    if not drained or statistics.parked:
        left = f"{statistics.outbox_spans} spans are still in the outbox" if not drained else "it refused some of them"
        console.print(f"[yellow]{where.shown} did not take everything: {left}. `otelexec doctor` says why.[/]", soft_wrap=True)
        return
    console.print(f"{waiting} spans were delivered to {where.shown}.")
    jaeger = runtime.settings.jaeger_url
    if not _listens(jaeger):
        console.print(f"No Jaeger answers at {jaeger}; OTELEXEC_JAEGER_URL says where yours is, for links.")
        return
    console.print("In Jaeger:")
    for record in records:
        if record.parent_execution_id is None and record.attempts:
            trace_id = record.attempts[-1].trace_id
            console.print(f"  {record.name:<16} {record.state:<10} {jaeger}/trace/{trace_id}", soft_wrap=True, markup=False)


def _listens(url: str) -> bool:
    parts = urlsplit(url)
    try:
        with socket.create_connection(
            (parts.hostname or "localhost", parts.port or DEFAULT_PORTS.get(parts.scheme, 4317)), CONNECT_SECONDS
        ):
            return True
    except (OSError, ValueError):
        return False


def _command() -> str:
    """Give what to type for `otelexec`: the name where the shell finds it, else the path of the script that runs."""
    script = Path(sys.argv[0])
    if shutil.which("otelexec") or script.name != "otelexec":
        return "otelexec"
    try:
        return str(script.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(script)
