"""
The demo's other processes: `python -m otelexec.cli.demo.process web|worker FOLDER RUN`.

Each ends when its standard input does, so that none outlives the demo, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from opentelemetry import trace

import otelexec
from otelexec.cli.demo import own_queue
from otelexec.cli.demo.jobs import JOBS, publish
from otelexec.cli.demo.own_queue import Message, Queue
from otelexec.cli.demo.stories import QUEUE, RATE_LIMITED, SCHEDULE, SCHEDULE_SECONDS, SCHEDULE_TIMES, SCHEDULED

POLL_SECONDS = 0.05
RATE_LIMIT_SECONDS = 60.0

tracer = trace.get_tracer("shop")


def main() -> None:
    """Be the process that the arguments name."""
    role, folder, run = sys.argv[1:]
    queue = Queue(Path(folder) / QUEUE)
    stop = threading.Event()
    at_end_of_input(stop.set)
    otelexec.configure(service_name=f"demo-{role}")
    if role == "web":
        schedule = threading.Thread(target=keep_schedule, args=(queue, run, stop))
        schedule.start()
        serve(lambda job, payload: publish(job, payload, queue), run, stop, release=queue.release)
        schedule.join()
    else:
        work(queue, stop)


def at_end_of_input(then: Callable[[], object], descriptor: int = 0) -> None:
    """Call something once standard input ends, or another descriptor of it."""

    def wait() -> None:
        # Not sys.stdin: a daemon thread that holds its lock would abort the interpreter's exit.
        while os.read(descriptor, 64):
            pass
        then()

    threading.Thread(target=wait, daemon=True).start()


# The worker


def work(queue: Queue, stop: threading.Event) -> None:
    """Take messages and run them, one after the other."""
    while not stop.is_set():
        message = queue.take(os.getpid())
        if message is None:
            stop.wait(POLL_SECONDS)
            continue
        # A failed job is recorded, and the worker goes on with the next one.
        with otelexec.extract(message.body) as received, contextlib.suppress(Exception, asyncio.CancelledError):
            run_message(message, received.payload, queue)
        # Only now: until here a killed worker's message is delivered once more.
        queue.done(message)


def run_message(message: Message, payload: Mapping[str, Any], queue: Queue) -> None:
    """Run one message as a CONSUMER span around its job, and ask for another attempt where that may help."""
    attributes = {"messaging.system": "demo", "messaging.destination.name": own_queue.NAME, "messaging.message.id": str(message.id)}
    with otelexec.execution(f"process {own_queue.NAME}", kind=trace.SpanKind.CONSUMER, attributes=attributes):
        try:
            running = JOBS[message.job](payload, queue)
            if inspect.isawaitable(running):
                asyncio.run(_finish(running))
        except ConnectionError:
            queue.put(message.job, otelexec.inject(payload, retry=True))
            raise


async def _finish(running: Any) -> None:
    await running


# The web process, with the schedule in it


def serve(
    send: Callable[[str, Mapping[str, Any]], object], run: str, stop: threading.Event, *, release: Callable[[str], int] = lambda _: 0
) -> None:
    """
    Take webhooks on a free loopback port, which is printed.

    Args:
        send: Sends a job with its payload to the workers.
        run: Names this run of the demo on every record.
        stop: Ends it.
        release: Lets a paused execution go on, and gives how many messages that were.
    """

    class Handler(WebhookHandler):
        pass

    Handler.send, Handler.release = staticmethod(send), staticmethod(release)
    Handler.run, Handler.accepted = run, {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,))
        serving.start()
        print(server.server_port, flush=True)  # noqa: T201 (the demo reads it)
        stop.wait()
        server.shutdown()
        serving.join()


def keep_schedule(queue: Queue, run: str, stop: threading.Event) -> None:
    """Ask for the scheduled job a few times."""
    for _ in range(SCHEDULE_TIMES):
        due = datetime.now(UTC).isoformat(timespec="seconds")
        attributes = {"demo_run": run}
        with otelexec.correlate(source="schedule", schedule_id=SCHEDULE, scheduled_for=due, attributes=attributes):
            publish(SCHEDULED, {}, queue)
        if stop.wait(SCHEDULE_SECONDS):
            return


class WebhookHandler(BaseHTTPRequestHandler):
    """
    The web application.

        POST /hooks/PROVIDER/JOB         queue a job: 202 with its execution id, or 429
        POST /approvals/EXECUTION_ID     let a paused execution go on
        DELETE /executions/EXECUTION_ID  cancel one
    """

    send: Callable[[str, Mapping[str, Any]], object]
    release: Callable[[str], int]
    run: str
    accepted: dict[str, float]

    def do_POST(self) -> None:
        """Take a webhook or an approval."""
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        kind, _, rest = self.path.strip("/").partition("/")
        # The internet may write what it likes into its headers: ids are minted here.
        with otelexec.extract_headers(self.headers, trusted=False), self._server_span(f"POST /{kind}"):
            if kind == "hooks":
                provider, _, job = rest.partition("/")
                self._webhook(provider, job, json.loads(body))
            else:
                self._answer(200 if self.release(rest) else 404, {})

    def do_DELETE(self) -> None:
        """Take the wish to cancel an execution."""
        with otelexec.extract_headers(self.headers, trusted=False), self._server_span("DELETE /executions"):
            state = otelexec.request_cancel(self.path.rpartition("/")[2], terminate=True)
            self._answer(202 if state else 404, {"state": state})

    def _webhook(self, provider: str, job: str, payload: Mapping[str, Any]) -> None:
        correlated = otelexec.correlate(
            source="webhook",
            webhook_id=self.headers.get("x-webhook-id"),
            path=self.path,
            provider=provider,
            attributes={"demo_run": self.run},
        )
        with correlated as correlation:
            if job == RATE_LIMITED:
                now = time.monotonic()
                if provider in self.accepted and now < self.accepted[provider] + RATE_LIMIT_SECONDS:
                    self._answer(429, {"execution_id": otelexec.reject("rate_limited", name=job)})
                    return
                self.accepted[provider] = now
            self.send(job, payload)
            self._answer(202, {"execution_id": correlation.execution_id})

    def _server_span(self, name: str) -> Any:
        attributes = {"http.request.method": self.command, "url.path": self.path}
        return tracer.start_as_current_span(name, kind=trace.SpanKind.SERVER, attributes=attributes)

    def _answer(self, status: int, body: Mapping[str, Any]) -> None:
        trace.get_current_span().set_attribute("http.response.status_code", status)
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
        """Say nothing: the demo tells what it sends."""


if __name__ == "__main__":
    main()
