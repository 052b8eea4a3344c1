"""
Relay 100,000 outbox rows of one span each to a sink on loopback: rate, and growth of the relay's memory.

Relay and sink run in processes of their own. The sink reads requests and answers 200 without looking at them, so that
what is measured is the relay; both share the machine's cores.
"""

from __future__ import annotations

import gc
import multiprocessing
import socketserver
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from otelexec import otlp, settings
from otelexec.relay import Progress, Relay
from otelexec.store.sqlite import SqliteStore
from otelexec.store.writes import AddSpans
from tests.benchmarks.measure import Result
from tests.benchmarks.sample import ended_span

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection

    from otelexec.store.writes import Write

TARGET_RATE = 100_000
TARGET_GROWTH = 8.0
BATCH = 500
START_SECONDS = 60.0
END_SECONDS = 600.0


class _Accept(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while line := self.rfile.readline():
            length = 0
            while line not in (b"\r\n", b""):
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
                line = self.rfile.readline()
            self.rfile.read(length)
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n")


def _sink(parent: Connection) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Accept) as server:
        parent.send(server.server_address[1])
        server.serve_forever()


def _relay(parent: Connection, path: Path, port: int) -> None:
    store = SqliteStore(path, create=False)
    process = psutil.Process()

    def commit(writes: Sequence[Write]) -> list[Any]:
        return store.commit(writes, durable=False, timeout_seconds=5.0)

    def waiting() -> int:
        return store.statistics().outbox_rows

    peak = 0
    spans = 0

    def seen(progress: Progress) -> None:
        nonlocal peak, spans
        spans += progress.spans
        peak = max(peak, process.memory_info().rss)

    relay = Relay(commit, settings.load(otlp_endpoint=f"http://127.0.0.1:{port}"), "benchmark", waiting=waiting, on_progress=seen)
    relay.run_once()  # imports, connections and SQLite's page cache are there before, whatever the number of rows
    gc.collect()
    before = process.memory_info().rss
    start = time.perf_counter()
    emptied = relay.drain(END_SECONDS)
    took = time.perf_counter() - start
    relay.stop(1.0)
    parent.send((emptied, spans, took, (peak - before) / 2**20))


def _answer(process: Any, pipe: Connection, patience_seconds: float) -> Any:
    if not pipe.poll(patience_seconds):
        msg = f"{process.name} did not answer within {patience_seconds:g} s"
        raise RuntimeError(msg)
    return pipe.recv()


def _fill(path: Path, rows: int) -> None:
    store = SqliteStore(path)
    span = ended_span()
    request = otlp.wrap(otlp.encode_resource(span.resource), {otlp.encode_scope(span.instrumentation_scope): [otlp.encode_span(span)]})
    for start in range(0, rows, BATCH):
        store.commit([AddSpans(request, 1)] * min(BATCH, rows - start), durable=False, timeout_seconds=5.0)
    store.close()


def run(folder: Path, *, short: bool = False) -> list[Result]:
    """
    Measure.

    Args:
        folder: For the store.
        short: A tenth of the rows, and one run instead of three.
    """
    rows = 10_000 if short else 100_000
    context = multiprocessing.get_context("spawn")
    rates, growths = [], []
    port_here, port_there = context.Pipe()
    sink = context.Process(target=_sink, args=(port_there,), name="the sink", daemon=True)
    sink.start()
    try:
        port = _answer(sink, port_here, START_SECONDS)
        for turn in range(1 if short else 3):
            path = folder / f"{turn}.db"
            _fill(path, rows)
            here, there = context.Pipe()
            relay = context.Process(target=_relay, args=(there, path, port), name="the relay", daemon=True)
            relay.start()
            emptied, spans, took, growth = _answer(relay, here, END_SECONDS + START_SECONDS)
            relay.join()
            if not emptied:
                msg = "the relay did not deliver everything"
                raise RuntimeError(msg)
            rates.append(spans / took)
            growths.append(growth)
    finally:
        sink.terminate()
        sink.join()
    work = f"relay {rows:,} rows to a sink"
    return [
        Result(work, "-", rates, "spans/s", TARGET_RATE, at_least=True),
        Result(f"{work}: RSS growth", "-", growths, "MiB", TARGET_GROWTH),
    ]
