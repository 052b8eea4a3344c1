"""An OTLP endpoint in a process of its own that keeps all it accepts, as a killed relay's tests need it."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

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
def collecting(path: Path) -> Iterator[Collected]:
    """Run the endpoint until the end of the block."""
    path.touch()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.acceptance.collector", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield Collected(path, process.stdout.readline().strip())
        finally:
            process.terminate()


def main() -> None:
    """Collect until the parent's end of stdin is closed."""
    lock = threading.Lock()
    with Path(sys.argv[1]).open("ab", buffering=0) as file:

        def keep(spans: Sequence[DecodedSpan]) -> None:
            with lock:
                file.write(pickle.dumps(list(spans)))

        with OtlpReceiver(answer=keep, keep=False) as receiver:
            sys.stdout.write(f"{receiver.endpoint}\n")
            sys.stdout.flush()
            sys.stdin.read()


if __name__ == "__main__":
    main()
