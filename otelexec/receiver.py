"""
An OTLP receiver in memory, over real HTTP or gRPC on loopback: for your tests and for ours.

    with OtlpReceiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        ...
        assert receiver.wait_for(1)[0].attributes["otelexec.outcome"] == "succeeded"

It can be told to answer as endpoints do on a bad day: see `Answer`. In a process of its own, so that it outlives whatever
is killed, it runs as `python -m otelexec.receiver --port 4318 --log spans.jsonl`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TextIO

from otelexec import semconv
from otelexec.clock import monotonic
from otelexec.decoded import DecodedSpan, decode
from otelexec.receiver_servers import serve_grpc, serve_http

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping, Sequence

BAD_REQUEST: Final = 400


@dataclass(frozen=True, slots=True)
class Answer:
    """
    What a request is answered with.

    Attributes:
        status: HTTP status; over gRPC the code that the OTLP specification pairs with it.
        message: Message of the error, or of `partial_success`.
        rejected_spans: `partial_success.rejected_spans` of a 200; so many spans at the end of the request count as not
            received.
        retry_after: The `Retry-After` header as it stands, seconds or a date; over gRPC seconds only, as `RetryInfo`.
        text: Send an error's message as plain text, as a proxy would, and not as the `google.rpc.Status` of OTLP. HTTP only.
        delay_seconds: Wait before the answer.
        lost: Take the spans in, then close the connection without an answer.
        refused: Close the connection without taking anything in.
    """

    status: int = 200
    message: str = ""
    rejected_spans: int = 0
    retry_after: str | None = None
    text: bool = False
    delay_seconds: float = 0.0
    lost: bool = False
    refused: bool = False

    @property
    def accepts(self) -> bool:
        """Tell whether the request's spans are taken in."""
        return not self.refused and self.status in range(200, 300)


@dataclass(frozen=True, slots=True)
class Received:
    """
    One request and its answer.

    Attributes:
        headers: HTTP headers or gRPC metadata, names in lowercase.
        spans: What it held.
        body: Its bytes, after decompression.
        answer: What it was answered with.
        unix_ns: When it arrived.
    """

    headers: Mapping[str, str]
    spans: tuple[DecodedSpan, ...]
    body: bytes
    answer: Answer
    unix_ns: int


class OtlpReceiver:
    """
    Take in OTLP trace requests from `with` to the end of the block.

    Args:
        protocol: `http` (HTTP/protobuf with optional gzip) or `grpc`.
        port: 0 takes a free one, and keeps it when the receiver is entered again.
        answer: Asked for each request that `script` has no answer for; None means 200.
        poison: A request with a span for which this is true is answered with 400.
        keep: Whether to keep spans and requests in memory; without it only the log has them.
        log: Gets one JSON line per span taken in, written before the answer.
        tls: Serve HTTPS with this context. HTTP only.
    """

    def __init__(
        self,
        protocol: str = "http",
        *,
        port: int = 0,
        answer: Callable[[Sequence[DecodedSpan]], Answer | None] | None = None,
        poison: Callable[[DecodedSpan], bool] | None = None,
        keep: bool = True,
        log: Path | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.protocol = protocol
        self.answer = answer
        self.poison = poison
        self.closing = threading.Event()
        self._keep = keep
        self._log_path = log
        self._log: TextIO | None = None
        self._tls = tls
        self._port = port
        self._script: deque[Answer] = deque()
        self._changed = threading.Condition()
        self._spans: list[DecodedSpan] = []
        self._requests: list[Received] = []
        self._taken = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.closing.clear()
        with ExitStack() as stack:
            if self._log_path is not None:
                self._log = stack.enter_context(self._log_path.open("a", encoding="utf-8"))
            if self.protocol == "grpc":
                self._port = stack.enter_context(serve_grpc(self, self._port))
            else:
                self._port = stack.enter_context(serve_http(self, self._port, self._tls))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.closing.set()
        self._stack.close()

    @property
    def endpoint(self) -> str:
        """Give the base URL, as OTEL_EXPORTER_OTLP_ENDPOINT wants it; entered again, the receiver has the same one."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}"

    @property
    def spans(self) -> list[DecodedSpan]:
        """Give the spans taken in, in order of arrival, repeats included."""
        with self._changed:
            return list(self._spans)

    @property
    def requests(self) -> list[Received]:
        """Give every request that could be read, in order of arrival, refused ones included."""
        with self._changed:
            return list(self._requests)

    @property
    def deliveries(self) -> dict[str, list[bytes]]:
        """Give by span id the bytes of each of its arrivals: one, if nothing was sent twice."""
        found: dict[str, list[bytes]] = {}
        for span in self.spans:
            found.setdefault(span.span_id, []).append(span.encoded)
        return found

    def script(self, *answers: Answer) -> None:
        """Answer the next requests with these, one each, before anything else is asked."""
        with self._changed:
            self._script.extend(answers)

    def wait_for(self, condition: int | Callable[[OtlpReceiver], bool], timeout: float = 10.0) -> list[DecodedSpan]:
        """
        Wait until enough has arrived, and give the spans taken in so far.

        Args:
            condition: A number of spans, or a question asked after each request.
            timeout: Seconds.

        Raises:
            TimeoutError: It did not come to that; the message says what did arrive.
        """
        deadline = monotonic() + timeout
        while True:
            with self._changed:
                seen = self._taken
            # Asked outside the lock, which `spans` and `requests` take themselves.
            if len(self.spans) >= condition if isinstance(condition, int) else condition(self):
                return self.spans
            left = deadline - monotonic()
            if left <= 0:
                names = [span.name for span in self.spans]
                raise TimeoutError(f"{len(names)} spans in {seen} requests after {timeout:g} s: {names[-20:]}")
            with self._changed:
                if seen == self._taken:
                    self._changed.wait(left)

    def take(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        """
        Decide on a request, take its spans in if the answer says so, and give the answer. For the servers.

        Args:
            body: The request, decompressed.
            headers: Names in lowercase.
        """
        unix_ns = time.time_ns()
        try:
            spans = decode(body)
        except ValueError as error:
            return Answer(BAD_REQUEST, str(error))
        with self._changed:
            answer = self._script.popleft() if self._script else None
        if answer is None and self.answer is not None:
            answer = self.answer(spans)
        if answer is None and self.poison is not None and any(map(self.poison, spans)):
            answer = Answer(BAD_REQUEST, "a span in this request is not acceptable")
        answer = answer or Answer()
        if answer.delay_seconds:
            self.closing.wait(answer.delay_seconds)
        taken = spans[: max(len(spans) - answer.rejected_spans, 0)] if answer.accepts else []
        with self._changed:
            if self._log is not None and taken:
                self._log.writelines(_log_line(span, unix_ns) for span in taken)
                self._log.flush()
            if self._keep:
                self._spans += taken
                self._requests.append(Received(headers, tuple(spans), body, answer, unix_ns))
            self._taken += 1
            self._changed.notify_all()
        return answer


def _log_line(span: DecodedSpan, unix_ns: int) -> str:
    line: dict[str, Any] = {
        "trace_id": span.trace_id,
        "span_id": span.span_id,
        "parent_span_id": span.parent_span_id,
        "name": span.name,
        "kind": span.kind,
        "status": span.status,
        "start_unix_ns": span.start_unix_ns,
        "end_unix_ns": span.end_unix_ns,
        "execution_id": span.attributes.get(semconv.EXECUTION_ID),
        "attempt": span.attributes.get(semconv.ATTEMPT),
        "outcome": span.attributes.get(semconv.OUTCOME),
        "sha256": hashlib.sha256(span.encoded).hexdigest(),
        "received_unix_ns": unix_ns,
    }
    return json.dumps(line) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Receive until SIGTERM or SIGINT; the first line on stdout is the endpoint.

    Args:
        arguments: Those of the command line; None takes the process's own.
    """
    parser = argparse.ArgumentParser(prog="python -m otelexec.receiver", description="An OTLP receiver that logs what arrives.")
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes a free one")
    parser.add_argument("--log", type=Path, required=True, help="gets one JSON line per span")
    parser.add_argument("--protocol", choices=("http", "grpc"), default="http")
    chosen = parser.parse_args(arguments)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    with OtlpReceiver(chosen.protocol, port=chosen.port, log=chosen.log, keep=False) as receiver:
        sys.stdout.write(f"{receiver.endpoint}\n")
        sys.stdout.flush()
        stopped.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
