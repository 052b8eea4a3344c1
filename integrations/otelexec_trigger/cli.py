"""`otelexec trigger serve` and `otelexec trigger worker`."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Final

import typer
import uvicorn

from otelexec import runtime as _runtime
from otelexec.cli import console, options
from otelexec.errors import SettingsError
from otelexec_trigger.serve import Server
from otelexec_trigger.settings import STOP_SECONDS
from otelexec_trigger.sweep import Sweeper
from otelexec_trigger.worker import Worker

app = typer.Typer(help="The local engine: runs in the store, triggered over HTTP or from Python. For development and small loads.")

_CLOSE_SECONDS: Final = 5


class _Server(uvicorn.Server):
    """Ends well when it is told to: uvicorn would raise the signal once more afterwards."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Have SIGTERM and SIGINT end the server."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)
        yield


@app.command()
def serve(
    *,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65_535, help="The port; 0 takes a free one.")] = 3030,
    store: options.StoreOption = None,
) -> None:
    """
    Speak Trigger.dev's wire contract, so that its SDK can trigger Python tasks with no account.

    Callers show the key in TRIGGER_SECRET_KEY. The SDK finds the server by TRIGGER_API_URL=http://ADDRESS:N. All state is in the
    store; the runs are attempted by `otelexec trigger worker`.
    """
    key = os.environ.get("TRIGGER_SECRET_KEY", "")
    Server(key)
    _configure(store)
    listener = listen(host, port)
    console.say(f"Serving Trigger.dev's contract on http://{_shown(listener)}")
    serve_on(listener, key)


def serve_on(listener: socket.socket, key: str) -> None:
    """
    Serve until SIGTERM or SIGINT.

    Args:
        listener: Where to listen; closed at the end.
        key: What callers show.
    """
    server = Server(key)
    sweeper = Sweeper()
    sweeper.start()
    _runtime.get().attend()
    config = uvicorn.Config(
        server.app(),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=_CLOSE_SECONDS,
        log_config=None,
    )
    _Server(config).run(sockets=[listener])
    sweeper.stop(_CLOSE_SECONDS)


@app.command()
def worker(
    *,
    module: Annotated[str, typer.Option("--app", metavar="MODULE", help="The module that registers the tasks.", show_default=False)],
    concurrency: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="How many runs it attempts at a time.")] = 2,
    stop_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="How long tasks may go on after SIGTERM; then they are killed.")
    ] = STOP_SECONDS,
    store: options.StoreOption = None,
) -> None:
    """
    Attempt the runs in the store, each in one of N processes.

    MODULE is imported with the working directory on sys.path; it registers tasks with @otelexec_trigger.task("id"). SIGTERM or SIGINT
    lets the runs that are being attempted end, a second one kills their processes. What was killed is attempted once more as far as it
    has attempts left.
    """
    _configure(store)
    crew = Worker(module, concurrency, stop_seconds=stop_timeout)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: crew.stop())
    console.say(f"Attempting the runs of {module}, {concurrency} at a time")
    crew.run()


def _configure(store: str | None) -> None:
    if store is not None:
        _runtime.configure(store=store)
    if _runtime.get().store is None:
        raise SettingsError("OTELEXEC_STORE: the local engine keeps its runs in the store; it can't be `none`")


def listen(host: str, port: int) -> socket.socket:
    """
    Bind a socket.

    Args:
        host: The address.
        port: The port; 0 for a free one.

    Raises:
        Failure: The address can't be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # A server that was killed leaves connections behind that would keep the port from the next one.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise options.Failure(f"can't listen on {host}:{port}: {error.strerror}", 2) from None
    return listener


def _shown(listener: socket.socket) -> str:
    address = listener.getsockname()
    return f"[{address[0]}]:{address[1]}" if listener.family == socket.AF_INET6 else f"{address[0]}:{address[1]}"
