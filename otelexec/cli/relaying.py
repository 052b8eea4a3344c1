"""`otelexec relay`: deliver what the outbox holds, until it is empty or for good."""

from __future__ import annotations

import math
import signal
import threading
import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from otelexec.cli import console, options
from otelexec.cli.progress import Advance
from otelexec.errors import StoreError
from otelexec.reconcile import dead_relays, take_in
from otelexec.relay import Relay
from otelexec.settings import MAX_SECONDS
from otelexec.store.outbox_statements import last_parked
from otelexec.store.upkeep import DiscardParked, RetryParked
from otelexec.store.writes import Heartbeat

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from otelexec.cli.options import Opened
    from otelexec.relay import Progress
    from otelexec.store.writes import Write

DRAIN_SECONDS: Final = 60.0
SPOOL_SECONDS: Final = 5.0
"""How often the relay that stays looks for records that the store could not take."""
REPORT_SECONDS: Final = 10.0
"""At most so often it says what it has sent."""
_RETRY_SECONDS: Final = 0.2
_LEAST_SECONDS: Final = 0.5
_MOST_SECONDS: Final = 5.0


def relay(
    *,
    drain: Annotated[bool, typer.Option("--drain", help="Exit with 0 as soon as nothing is left that can be delivered.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0,
            max=MAX_SECONDS,
            help=f"With --drain: exit with 1 if it takes longer. Default: {DRAIN_SECONDS:g}.",
            show_default=False,
        ),
    ] = None,
    retry_parked: Annotated[
        bool, typer.Option("--retry-parked", help="First let the spans go out again that the endpoint refused for good.")
    ] = False,
    discard_parked: Annotated[
        bool, typer.Option("--discard-parked", help="First delete the spans that the endpoint refused for good; their records stay.")
    ] = False,
    store: options.StoreOption = None,
    spool: options.SpoolOption = None,
    otlp_endpoint: options.EndpointOption = None,
) -> None:
    """
    Deliver spans to the OTLP endpoint, beside what the workers deliver themselves.

    Without --drain it stays until SIGINT or SIGTERM, also while the store is away. Headers, protocol, compression, certificates and
    timeout come from the standard OTEL_EXPORTER_OTLP_* variables. Spans that the endpoint refused for good are parked and don't
    count; `doctor` names them.
    """
    if timeout is not None and not drain:
        raise options.Failure("--timeout: goes with --drain only", 2)
    if retry_parked and discard_parked:
        raise options.Failure("--retry-parked, --discard-parked: only one of them", 2)
    settings = options.load(store=store, spool=spool, otlp_endpoint=otlp_endpoint)
    with options.opened(settings, with_spool=True, waits=not drain) as opened:
        opened.announce()
        work = _Relaying(opened)
        if retry_parked:
            console.say(f"{console.plural(_each_parked(opened, RetryParked), 'parked row')} will be sent again.")
        if discard_parked:
            console.say(f"{console.plural(_each_parked(opened, DiscardParked), 'parked row')} deleted.")
        if drain:
            work.drain(DRAIN_SECONDS if timeout is None else timeout)
        else:
            work.serve()


def _each_parked(opened: Opened, step: Callable[[int], RetryParked | DiscardParked]) -> int:
    """Have all that is parked at this time written, step by step, and give how many rows that were."""
    count, upto = 0, opened.store.read(last_parked)
    while upto is not None and (done := opened.commit([step(upto)])[0]):
        count += done
    return count


class _Relaying:
    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        store, own = opened.store, opened.process.process_id
        self._relay = Relay(
            self._commit,
            opened.settings,
            own,
            waiting=store.outbox_rows,
            dead=lambda: dead_relays(store, own),
            on_progress=self._count,
        )
        self._spans = self._parked = 0
        self._reason = ""
        self._deadline = math.inf
        self._advance: Advance | None = None

    def _patience(self) -> float:
        """Give how long a commit may wait for other writers: what is left of the time, and enough to settle what was sent."""
        return max(_LEAST_SECONDS, min(_MOST_SECONDS, self._deadline - time.monotonic()))

    def _commit(self, writes: Sequence[Write]) -> list[Any]:
        return self._opened.commit(writes, self._patience())

    def _count(self, progress: Progress) -> None:
        """Take note of a round, in the relay's thread."""
        self._spans += progress.spans
        self._parked += progress.parked
        if progress.reason or progress.spans:
            # A round that was only cut short by the end says nothing; why the ones before failed still holds.
            self._reason = progress.reason
        if self._advance is not None:
            self._advance.add(progress.rows, progress.reason)

    def drain(self, timeout: float) -> None:
        self._deadline = time.monotonic() + timeout
        try:
            with Advance("Delivering", "rows", self._opened.store.outbox_rows()) as self._advance:
                emptied = self._drain(self._deadline)
        finally:
            self._advance = None
            self._goodbye()
        parked = f"; {console.plural(self._parked, 'row')} parked, see `otelexec doctor`" if self._parked else ""
        if emptied:
            console.say(f"Delivered {console.plural(self._spans, 'span')} to {self._relay.endpoint.shown}; nothing is left{parked}.")
            return
        raise options.Failure(f"not drained within {timeout:g} s: {self._left()}; {self._relay.endpoint.shown}: {self._why()}{parked}")

    def _drain(self, deadline: float) -> bool:
        """Take the spool in, then empty the outbox, and once more if the spool has been filled in the meantime."""
        spool = self._opened.spool
        while True:
            taken_in = self._take_in()
            left = deadline - time.monotonic()
            emptied = self._relay.drain(max(left, 0.0))
            if taken_in and emptied and not spool.segments():
                return True
            if time.monotonic() >= deadline:
                return False
            if not taken_in:
                time.sleep(_RETRY_SECONDS)

    def _take_in(self) -> bool:
        try:
            take_in(self._opened.store, self._opened.spool, timeout_seconds=self._patience())
        except (StoreError, OSError) as error:
            self._reason = f"the spool can't be taken in: {error}"
            return False
        if self._opened.spool.left:
            self._reason = "the spool holds records that only a newer otelexec can read"
        return not self._opened.spool.left

    def _left(self) -> str:
        try:
            found = self._opened.store.statistics()
        except StoreError as error:
            return str(error)
        waiting = len(self._opened.spool.segments())
        spool = f", and {console.plural(waiting, 'segment')} of the spool" if waiting else ""
        return f"{console.plural(found.outbox_spans, 'span')} in {console.plural(found.outbox_rows, 'row')} left{spool}"

    def _why(self) -> str:
        return self._reason or "another relay has them in hand, or the time was too short"

    def serve(self) -> None:
        """Deliver until a signal ends it; what is under way then is finished and settled."""
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        where = self._relay.endpoint.shown
        console.say(f"Delivering from {self._opened.store.url} to {where}; Ctrl-C ends it.")
        heartbeat = self._opened.settings.heartbeat
        self._relay.start()
        said, said_at, beat_at = 0, 0.0, time.monotonic()
        while not ended.wait(min(SPOOL_SECONDS, heartbeat)):
            self._take_in()
            now = time.monotonic()
            if now - beat_at >= heartbeat:
                beat_at = now
                self._heartbeat(ended=False)
            if self._spans > said and now - said_at >= REPORT_SECONDS:
                console.say(f"{console.plural(self._spans - said, 'span')} delivered.")
                said, said_at = self._spans, now
        self._relay.stop(self._opened.settings.exit_timeout_seconds)
        self._goodbye()
        console.say(f"{console.plural(self._spans, 'span')} delivered in all.")

    def _heartbeat(self, *, ended: bool) -> None:
        """Say to other hosts that this relay lives; the relay itself reports a store that is away."""
        try:
            self._commit([Heartbeat(self._opened.process, ended=ended)])
        except StoreError as error:
            self._reason = str(error)

    def _goodbye(self) -> None:
        self._heartbeat(ended=True)
