"""`otelexec doctor`: is everything as it should be, and if not, what to do about it."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import typer
from rich.table import Table
from rich.text import Text

from otelexec import endpoint as endpoints
from otelexec import identity
from otelexec.cli import console, options
from otelexec.errors import StoreError, StoreNotFound, StoreVersionError
from otelexec.runtime import open_store
from otelexec.store.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from otelexec.settings import Settings
    from otelexec.store.base import Store
    from otelexec.store.records import Statistics

CONNECT_SECONDS: Final = 3.0
WRITE_SECONDS: Final = 2.0
"""How long to wait for another process that writes before the store counts as locked."""
LATE_SECONDS: Final = 60.0
"""A span that waits longer than that has nobody to deliver it, whatever backoff a relay may be in."""
UNSEEN_SECONDS: Final = 10.0
"""A running attempt looks for cancellations far more often."""
CLOCK_SECONDS: Final = 1.0
_EARLIEST_UNIX_NS: Final = 1_704_067_200_000_000_000  # 2024; a clock before it was never set
_SHOWN: Final = 5
TABLES_SHOWN: Final = 4
ONE_MACHINE: Final = "SQLite is for the processes of one machine; processes on different machines need PostgreSQL."


@dataclass(frozen=True, slots=True)
class Check:
    """
    One thing looked at.

    Attributes:
        name: What; also the name in `--json`.
        finding: What was found, in a line for people.
        problem: What is wrong and what to do; empty when all is well.
        data: The same for programs.
    """

    name: str
    finding: str
    problem: str = ""
    data: Any = None


def doctor(
    *,
    as_json: options.JsonOption = False,
    store: options.StoreOption = None,
    spool: options.SpoolOption = None,
    otlp_endpoint: options.EndpointOption = None,
) -> None:
    """
    Look at store, outbox, parked spans, spool, endpoint and clock, and say what to do where something is wrong.

    Exits with 0 when all is well and with 1 when something is wrong. The endpoint is only connected to, for at most 3 s; nothing is sent.
    """
    settings = options.load(store=store, spool=spool, otlp_endpoint=otlp_endpoint)
    checks = [*_store_checks(settings), _endpoint(settings)]
    note = ONE_MACHINE if settings.store.startswith("sqlite:") else ""
    problems = [check.problem for check in checks if check.problem]
    if as_json:
        data = {check.name: check.data for check in checks}
        console.print_json({"ok": not problems, "problems": problems, **data, "note": note})
    else:
        _print(checks, note)
    if problems:
        raise typer.Exit(1)


def _print(checks: Iterable[Check], note: str) -> None:
    out = console.out()
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        mark = Text("WRONG", style="bold red") if check.problem else Text("ok", style="green")
        table.add_row(mark, Text(check.name.replace("_", " "), style="bold"), Text(console.clean(check.finding)))
        if check.problem:
            table.add_row("", "", Text(console.clean(check.problem), style="yellow"))
    out.print(table)
    if note:
        out.print(Text(note, style="dim"))


def _store_checks(settings: Settings) -> Iterable[Check]:
    store = open_store(settings, create=False)
    if store is None:
        raise AssertionError("load() lets no `none` through")
    try:
        try:
            found = store.statistics()
            yield _store(store, found)
            yield _executions(found)
            yield _outbox(found, store.now_unix_ns())
            yield _parked(found)
            yield _spool(settings, store)
            yield _workers(store)
            yield _cancellations(store, found)
            yield _clock(store)
        except (StoreNotFound, StoreVersionError):
            raise
        except StoreError as error:
            data = {"url": store.url, "path": _path(store), "size_bytes": None, "schema": None, "reachable": False, "error": str(error)}
            yield Check("store", console.clean(str(error)), "the store can't be used; records go to the spool until it can", data)
            yield _spool(settings, store)
    finally:
        store.close()


def _store(store: Store, found: Statistics) -> Check:
    bytes_, tables = found.size_bytes, dict(found.table_bytes)
    path = _path(store)
    trouble = None
    try:
        store.check_writable(timeout_seconds=WRITE_SECONDS)
    except StoreError as error:
        trouble = str(error)
    data = {
        "url": store.url,
        "path": path,
        "size_bytes": bytes_,
        "table_bytes": tables,
        "schema": SCHEMA_VERSION,
        "reachable": True,
        "error": trouble,
    }
    finding = f"{path or store.url}, {console.size(bytes_)}, schema {SCHEMA_VERSION}, can be read{'' if trouble else ' and written'}"
    if tables:
        largest = list(tables.items())[:TABLES_SHOWN]
        finding += f"; largest: {', '.join(f'{name} {console.size(size)}' for name, size in largest)}"
    beside = [] if path is None else Path(path).parent.glob(f"{Path(path).name}.corrupt-*")
    aside = sorted(str(each) for each in beside if not each.name.endswith(("-wal", "-shm")))
    problems = [] if trouble is None else [f"{console.clean(trouble)}; what workers record goes to the spool until it can be written"]
    if aside:
        problems.append(f"damaged files were set aside: {', '.join(aside)}; look at them, then move them away")
    return Check("store", finding, "; ".join(problems), {**data, "set_aside": aside})


def _path(store: Store) -> str | None:
    return store.url.removeprefix("sqlite:///") if store.url.startswith("sqlite:///") else None


def _executions(found: Statistics) -> Check:
    states = ", ".join(f"{count:,} {state}" for state, count in found.executions.items())
    oldest = found.queued_oldest_unix_ns
    since = "" if oldest is None else f"; the oldest queued since {console.local_time(oldest)}"
    return Check("executions", f"{states}{since}" or "none yet", data=dict(found.executions))


def _outbox(found: Statistics, now: int) -> Check:
    oldest = found.outbox_oldest_unix_ns
    age = None if oldest is None else max(0.0, (now - oldest) / 1e9)
    data = {
        "rows": found.outbox_rows,
        "spans": found.outbox_spans,
        "claimed_rows": found.claimed_rows,
        "oldest_unix_ns": oldest,
        "oldest_age_seconds": age,
    }
    if age is None:
        return Check("outbox", "empty", data=data)
    finding = f"{console.plural(found.outbox_spans, 'span')} in {console.plural(found.outbox_rows, 'row')}"
    finding += f" to deliver, the oldest for {console.duration(int(age * 1e9))}; {found.claimed_rows:,} in a relay's hands"
    late = age > LATE_SECONDS
    return Check(
        "outbox", finding, "nobody delivers these spans: run `otelexec relay --drain`, it says what stands in the way" if late else "", data
    )


def _parked(found: Statistics) -> Check:
    data = [{"id": row.id, "spans": row.count, "reason": row.reason, "parked_unix_ns": row.parked_unix_ns} for row in found.parked]
    if not data:
        return Check("parked", "none", data=data)
    reasons = Counter(console.clean(row.reason) for row in found.parked)
    said = "; ".join(f"{count} x {reason}" if count > 1 else reason for reason, count in reasons.most_common(5))
    spans = console.plural(found.parked_spans, "span")
    which = f"of the oldest {len(data)}, " if found.parked_rows > len(data) else ""
    finding = f"{spans} in {console.plural(found.parked_rows, 'row')} that the endpoint refused for good: {which}{said}"
    advice = "correct the cause at the endpoint, then run `otelexec relay --drain --retry-parked`; `--discard-parked` gives them up"
    return Check("parked", finding, advice, data)


def _spool(settings: Settings, store: Store) -> Check:
    spool = options.spool_of(settings, store)
    segments: list[dict[str, Any]] = []
    damaged: list[str] = []
    for path in spool.segments():
        try:
            status = path.stat()
        except OSError:  # taken in just now
            continue
        segments.append({"file": str(path), "size_bytes": status.st_size, "modified_unix_ns": status.st_mtime_ns})
    try:
        damaged = sorted(str(path) for path in spool.folder.glob("*.damaged"))
        readable = not spool.folder.exists() or os.access(spool.folder, os.R_OK | os.W_OK | os.X_OK)
    except OSError:
        readable = False
    others = _other_spools(settings, store, spool.folder)
    data = {"folder": str(spool.folder), "segments": segments, "damaged": damaged, "others": others}
    if not readable:
        return Check("spool", str(spool.folder), "the spool's folder can't be read and written: correct its permissions", data)
    if segments:
        size = console.size(sum(segment["size_bytes"] for segment in segments))
        finding = f"{console.plural(len(segments), 'segment')}, {size}, wait in {spool.folder}"
        return Check("spool", finding, "these records are not in the store yet: run `otelexec relay --drain` to take them in", data)
    if damaged:
        problem = f"torn lines of killed processes were set aside: {', '.join(damaged)}; look at them, then move them away"
        return Check("spool", "empty", problem, data)
    if others:
        problem = (
            f"records wait in {', '.join(others)}, for a database under another URL than this one: where it is this one, "
            "take them in with `otelexec relay --drain --spool FOLDER`"
        )
        return Check("spool", "empty", problem, data)
    return Check("spool", "empty", data=data)


def _other_spools(settings: Settings, store: Store, folder: Path) -> list[str]:
    """Give the spools beside a database's that hold something: one database may go by several names, and have one for each."""
    if settings.spool is not None or _path(store) is not None or not folder.parent.is_dir():
        return []
    beside = sorted(each for each in folder.parent.glob("postgres-*.spool") if each != folder)
    return [str(each) for each in beside if options.spool_of(settings.model_copy(update={"spool": each}), store).segments()]


def _workers(store: Store) -> Check:
    now = store.now_unix_ns()
    rows = [(process, identity.liveness(process, now)) for process in store.processes()]
    dead = [process for process, state in rows if state != "alive" and store.open_work([process.process_id], limit=1)]
    alive = sum(state == "alive" for _, state in rows)
    data = {
        "alive": alive,
        "dead": [
            {"process_id": each.process_id, "host": each.host, "pid": each.pid, "heartbeat_unix_ns": each.heartbeat_unix_ns}
            for each in dead
        ],
    }
    finding = f"{console.plural(alive, 'process has', 'processes have')} something open"
    if not dead:
        return Check("workers", finding, data=data)
    who = _first([f"{each.pid} on {console.clean(each.host)}" for each in dead])
    finding += f"; {console.plural(len(dead), 'dead one')} left work open: {who}"
    return Check("workers", finding, "run `otelexec reconcile --once` to close what they left", data)


def _first(texts: Sequence[str]) -> str:
    return ", ".join(texts[:_SHOWN]) + (", ..." if len(texts) > _SHOWN else "")


def _cancellations(store: Store, found: Statistics) -> Check:
    wishes = store.cancellations(list(found.unseen_cancellations))
    now = store.now_unix_ns()
    unseen = [each for each in found.unseen_cancellations if each in wishes and now - wishes[each].requested_unix_ns > UNSEEN_SECONDS * 1e9]
    if not unseen:
        return Check("unseen_cancellations", "none", data=unseen)
    shown = _first([console.clean(each) for each in unseen])
    finding = f"{console.plural(len(unseen), 'execution')} should be terminated and still run: {shown}"
    return Check(
        "unseen_cancellations", finding, "what runs there can only be told, not stopped: it must look at `.cancel_requested`", unseen
    )


def _clock(store: Store) -> Check:
    offset = (store.now_unix_ns() - time.time_ns()) / 1e9
    now = time.time_ns()
    newest = max(
        (attempt.ended_unix_ns or attempt.started_unix_ns for record in store.executions(limit=20) for attempt in record.attempts),
        default=0,
    )
    ahead = (newest - now) / 1e9
    problem = ""
    if now < _EARLIEST_UNIX_NS:
        problem = "this machine's clock was never set: times in records and spans are wrong"
    elif abs(offset) > CLOCK_SECONDS:
        problem = f"this machine's clock and the store's differ by {abs(offset):.1f} s: synchronise them (NTP)"
    elif ahead > CLOCK_SECONDS:
        problem = f"a record is {console.duration(newest - now)} in the future: the clock was set back, or is wrong on a worker"
    data = {"now_unix_ns": now, "store_offset_seconds": offset, "newest_record_unix_ns": newest or None, "ok": not problem}
    return Check(
        "clock", f"{console.local_time(now)}, as the store's" if abs(offset) <= CLOCK_SECONDS else console.local_time(now), problem, data
    )


def _endpoint(settings: Settings) -> Check:
    where = endpoints.read(settings.otlp_endpoint)
    data: dict[str, Any] = {"url": where.shown, "protocol": where.protocol, "reachable": True, "error": None}
    try:
        with _connected(where):
            pass
    except (OSError, ValueError) as error:
        # ValueError: a host that the resolver's encoding refuses.
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno and error.errno > 0 else str(error) or "no answer"
        data.update(reachable=False, error=reason)
        problem = "nothing listens there: start Jaeger or a collector, or correct OTEL_EXPORTER_OTLP_ENDPOINT; spans are kept meanwhile"
        return Check("endpoint", f"{where.shown} ({where.protocol}): {reason}", problem, data)
    return Check("endpoint", f"{where.shown} ({where.protocol}) can be connected to", data=data)


def _connected(where: endpoints.Endpoint) -> socket.socket:
    """Connect to an endpoint; raises OSError or ValueError where that can't be done."""
    resolver, _, named = where.url.partition(":")
    if where.protocol == "grpc" and resolver in endpoints.RESOLVERS:
        if resolver == "unix":
            return _connected_here(named.removeprefix("//"))
        target = named.rpartition("/")[2].partition(",")[0]
    else:
        target = where.url
    parts = urlsplit(f"//{target}" if where.protocol == "grpc" else target)
    default = 4317 if where.protocol == "grpc" else 443 if where.secure else 80
    return socket.create_connection((parts.hostname or "localhost", parts.port or default), timeout=CONNECT_SECONDS)


def _connected_here(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(CONNECT_SECONDS)
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection
