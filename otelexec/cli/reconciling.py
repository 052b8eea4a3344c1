"""`otelexec reconcile`: close what dead workers left open."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Annotated

import typer

from otelexec.cli import console, options
from otelexec.cli.progress import Advance
from otelexec.errors import StoreError
from otelexec.reconcile import Reconciler
from otelexec.settings import MAX_SECONDS

if TYPE_CHECKING:
    from otelexec.reconcile import Reconciled


def reconcile(
    *,
    once: Annotated[bool, typer.Option("--once", help="Do one round and exit.")] = False,
    interval: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0.05,
            max=MAX_SECONDS,
            help="Between two rounds. Default: OTELEXEC_RECONCILE_INTERVAL_SECONDS, else 15.",
            show_default=False,
        ),
    ] = None,
    store: options.StoreOption = None,
    spool: options.SpoolOption = None,
) -> None:
    """
    Close the attempts of dead workers as `lost`, with the spans that they could not end.

    A dead process of this machine is seen as such at once; any other one counts as dead when its lease is over. What waits in the
    spool is taken in first. Without --once it stays until SIGINT or SIGTERM, also while the store is away.
    """
    if interval is not None and once:
        raise options.Failure("--interval: goes without --once only", 2)
    settings = options.load(store=store, spool=spool)
    with options.opened(settings, with_spool=True, waits=not once) as opened:
        reconciler = Reconciler(opened.store, opened.spool)
        if once:
            console.say(_told(_round(reconciler)) or "Nothing to close.")
            return
        seconds = settings.reconcile_interval_seconds if interval is None else interval
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        console.say(f"Looking for dead workers in {opened.store.url} every {seconds:g} s; Ctrl-C ends it.")
        failed = ""
        while not ended.is_set():
            try:
                done = _told(_round(reconciler))
                failed = ""
                if done:
                    console.say(done)
            except options.Failure as failure:
                if str(failure) != failed:  # an outage is said once
                    failed = str(failure)
                    console.complain(failed)
            ended.wait(seconds)


def _round(reconciler: Reconciler) -> Reconciled:
    with Advance("Closing", "closed") as advance:
        try:
            return reconciler.run_once(advanced=advance.add)
        except StoreError as error:
            raise options.Failure(f"the round is not finished: {error}") from error
        except OSError as error:
            raise options.Failure(f"nothing was closed, since the spool can't be read and may hold the truth: {error}") from error


def _told(done: Reconciled) -> str:
    """Say in one line what a round did; empty if nothing."""
    if not done:
        return ""
    parts = [
        console.plural(count, word)
        for count, word in ((done.attempts, "attempt"), (done.outers, "outer executor"), (done.spans, "other span"))
        if count
    ]
    closed = f"Closed {', '.join(parts)} of {console.plural(done.processes, 'dead process', 'dead processes')}." if parts else ""
    taken = f"Took in {console.plural(done.ingested, 'write')} from the spool." if done.ingested else ""
    return " ".join(filter(None, (taken, closed)))
