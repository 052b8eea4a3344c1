"""An OTLP endpoint in a process of its own that keeps all it accepts, as a killed relay's tests need it."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from otelexec.decoded import DecodedSpan
from otelexec.receiver import OtlpReceiver


class Collected:
    """
    What the endpoint has accepted.

    Args:
        path: Its file.
        endpoint: Its base URL.
    """

    def __init__(self, path: Path, endpoint: str) -> None:
        self.endpoint = endpoint
        self._path = path
        self._read = 0

    def news(self) -> list[DecodedSpan]:
        """Give what came since the last time."""
        spans: list[DecodedSpan] = []
        with self._path.open("rb") as file:
            file.seek(self._read)
            while True:
                try:
                    spans += pickle.load(file)
                except EOFError:
                    return spans
                self._read = file.tell()


@contextmanager
def collecting(path: Path, address: str = "127.0.0.1") -> Iterator[Collected]:
    """
    Run the endpoint until the end of the block.

    Args:
        path: Where it keeps what it accepts.
        address: Where it is reached.
    """
    path.touch()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.acceptance.collector", path, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield Collected(path, process.stdout.readline().strip())
        finally:
            process.terminate()


async def _passed_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _forward(address: str, port: int, ready: threading.Event) -> None:
    """Take connections at another address of this machine: the receiver listens on loopback only."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            their_reader, their_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_passed_on(reader, their_writer), _passed_on(their_reader, writer))

    await asyncio.start_server(connected, address, port)
    ready.set()
    await asyncio.Event().wait()


def main() -> None:
    """Collect until the parent's end of stdin is closed."""
    lock = threading.Lock()
    with Path(sys.argv[1]).open("ab", buffering=0) as file:

        def keep(spans: Sequence[DecodedSpan]) -> None:
            with lock:
                file.write(pickle.dumps(list(spans)))

        with OtlpReceiver(answer=keep, keep=False) as receiver:
            address, port = sys.argv[2], urlsplit(receiver.endpoint).port
            assert port is not None
            if address != "127.0.0.1":
                ready = threading.Event()
                threading.Thread(target=asyncio.run, args=(_forward(address, port, ready),), daemon=True).start()
                ready.wait(10)
            sys.stdout.write(f"http://{address}:{port}\n")
            sys.stdout.flush()
            sys.stdin.read()


if __name__ == "__main__":
    main()
