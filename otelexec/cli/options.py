"""The options that commands share, and the store that they open; an option goes before its OTELEXEC_* variable."""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from otelexec import endpoint as endpoints
from otelexec import identity
from otelexec import settings as _settings
from otelexec.cli import console
from otelexec.errors import SettingsError, StoreNotFound, StoreUnavailable
from otelexec.journal import spool_folder
from otelexec.runtime import open_store
from otelexec.store.spool import Spool
from otelexec.store.writes import Heartbeat

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from otelexec.settings import Settings
    from otelexec.store.base import Store
    from otelexec.store.records import ExecutionRecord
    from otelexec.store.rows import ProcessRow
    from otelexec.store.writes import Write

_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_MOST_SECONDS: Final = 100 * 366 * 86_400

WAIT_SECONDS: Final = 1.0
"""How often a command that stays looks whether a store that was away is back."""

StoreOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The store, `sqlite:///PATH` or `postgresql://...`. Default: OTELEXEC_STORE, else `otelexec.db` in the user's state folder.",
        show_default=False,
    ),
]
SpoolOption = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Where workers left what the store could not take. Default: OTELEXEC_SPOOL, else `FILE.spool/` beside "
        "a SQLite store, or one for each database in the user's state folder.",
        show_default=False,
    ),
]
EndpointOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Where spans go. Default: OTELEXEC_OTLP_ENDPOINT, else OTEL_EXPORTER_OTLP_(TRACES_)ENDPOINT, else localhost:4318, "
        "over gRPC localhost:4317.",
        show_default=False,
    ),
]
JaegerOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="Base URL of Jaeger's UI. Default: OTELEXEC_JAEGER_URL, else http://localhost:16686.", show_default=False
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead, for other programs; times are nanoseconds since 1970.")]
ExecutionArgument = Annotated[
    str,
    typer.Argument(
        metavar="EXECUTION_ID",
        help="The execution's id, or its beginning as far as no other one has it; or the id of its request or message.",
        show_default=False,
    ),
]


class Failure(Exception):
    """
    A command could not do what it was asked for.

    Args:
        message: One line.
        code: The exit code.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def load(**arguments: Any) -> Settings:
    """
    Read the settings, arguments first.

    Raises:
        SettingsError: One of them can't be used; it is named as the user spelled it.
    """
    try:
        settings = _settings.load(**arguments)
        if "otlp_endpoint" in arguments:
            endpoints.read(settings.otlp_endpoint)
    except SettingsError as error:
        name, separator, text = str(error).partition(": ")
        name = name.removeprefix("OTELEXEC_").lower()
        if separator and arguments.get(name) is not None:
            raise SettingsError(f"--{name.replace('_', '-')}: {text}") from None
        raise
    if settings.store == "none":
        name = "--store" if arguments.get("store") else "OTELEXEC_STORE"
        raise SettingsError(f"{name}: `none` keeps no records; name the store to use, as sqlite:///PATH or postgresql://...")
    return settings


def spool_of(settings: Settings, store: Store) -> Spool:
    """Give the spool of a store: the folder that workers with the same settings write to."""
    return Spool(spool_folder(settings, store), lambda: _this_process(settings))


def _this_process(settings: Settings) -> ProcessRow:
    # It never opens a span, so nobody will ever need its resource to end one.
    return identity.this_process(identity.mint_process_id(), lease_seconds=settings.lease_seconds, resource=b"", scope=b"")


@dataclass(frozen=True, slots=True)
class Opened:
    """
    An open store and what belongs to it.

    Attributes:
        settings: The settings that named it.
        store: The store.
        spool: The spool beside it.
        process: The row of this process, which goes into the store with its first write; what it claims is then free as
            soon as it is dead.
    """

    settings: Settings
    store: Store
    spool: Spool
    process: ProcessRow

    def commit(self, writes: Sequence[Write], timeout_seconds: float = 5.0) -> list[Any]:
        """Commit in one transaction that survives the process; waits for other writers for `timeout_seconds`."""
        return self.store.commit(writes, durable=False, timeout_seconds=timeout_seconds)

    def announce(self) -> None:
        """Bring the row of this process into the store with whatever is written first."""
        self.store.announce = lambda: (Heartbeat(self.process),)


@contextlib.contextmanager
def opened(settings: Settings, *, with_spool: bool = False, waits: bool = False) -> Iterator[Opened]:
    """
    Open the store that the settings name.

    Args:
        settings: The settings.
        with_spool: Whether a spool alone will do: then the store is made when records wait for it there.
        waits: Whether to wait for a store that is away, as a command that stays does later, too.

    Raises:
        StoreNotFound: There is none; nothing was created.
        StoreError: It can't be read.
    """
    store = open_store(settings, create=False)
    if store is None:
        raise AssertionError("load() lets no `none` through")
    process = _this_process(settings)
    spool = spool_of(settings, store)
    try:
        _look(store, waits=waits)
    except StoreNotFound:
        if not (with_spool and spool.segments()):
            raise
        store = open_store(settings)
        if store is None:
            raise
    try:
        yield Opened(settings, store, spool, process)
    finally:
        store.close()


def _look(store: Store, *, waits: bool) -> None:
    said = False
    while True:
        try:
            store.ingested("")  # any reading tells whether it is there, and this one is the cheapest
        except StoreUnavailable as error:
            if not waits:
                raise
            if not said:
                console.complain(f"{str(error).rstrip('.')}; waiting for it")
                said = True
            time.sleep(WAIT_SECONDS)
        else:
            return


def find(store: Store, given: str) -> ExecutionRecord:
    """
    Find the execution with this id, the only one whose id begins so, or the only one whose request or message has this id.

    Raises:
        Failure: There is none, or more than one.
    """
    record = store.execution(given)
    if record is not None:
        return record
    prefix = given.rstrip("…?")  # as `list` shortens it, also where the encoding has no ellipsis
    found = store.ids_with_prefix(prefix, limit=4) if prefix else []
    if len(found) > 1:
        more = ", ..." if len(found) > 3 else ""  # noqa: PLR2004 (enough to see where they differ)
        raise Failure(f"more than one execution id begins with {prefix}: {', '.join(found[:3])}{more}")
    if not found:
        found = store.executions_of(given, limit=2)
        if len(found) > 1:
            raise Failure(f"more than one execution belongs to {given}: `otelexec list --request {given}` has all of a request")
    record = store.execution(found[0]) if found else None
    if record is None:
        raise Failure(f"no execution {given} in {store.url}; `otelexec list --where KEY=VALUE` finds executions by who asked for them")
    return record


def duration(option: str, text: str) -> float:
    """
    Read a duration like `30d` or `1.5h` and give its seconds.

    Args:
        option: Name of the option that has it.
        text: What was given.

    Raises:
        Failure: It is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*", text, re.ASCII)
    seconds = float(match[1]) * _UNITS[match[2]] if match else -1.0
    if not 0 <= seconds <= _MOST_SECONDS:
        raise Failure(f"{option}: must be a number and a unit like 90m, 12h, 30d or 4w, not {text!r}", 2)
    return seconds
