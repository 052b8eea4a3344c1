"""The web application: it takes webhooks and leaves the work to `worker.py`. Usage: python app.py FOLDER PORT."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from folder_queue import FolderQueue
from opentelemetry import trace

import otelexec

tracer = trace.get_tracer("webhook_app")


class Webhooks(BaseHTTPRequestHandler):
    """Takes `POST /hooks/PROVIDER` with `{"invoice": 7, "pages": 20}`."""

    queue: FolderQueue

    def do_POST(self) -> None:
        """Take one webhook."""
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        provider = self.path.rpartition("/")[2]
        # Webhooks come from outside: what they say of themselves in otelexec's headers is not believed, ids are minted here.
        with (
            otelexec.extract_headers(self.headers, trusted=False),
            tracer.start_as_current_span("POST /hooks", kind=trace.SpanKind.SERVER),
            otelexec.correlate(source="webhook", webhook_id=self.headers.get("x-webhook-id"), path=self.path, provider=provider),
        ):
            invoice = parsed(body)
            if invoice is None:
                # A terminal record with a span, although nothing ran: `otelexec list` shows it.
                self.answer(422, {"execution_id": otelexec.reject("malformed", name="invoice.run")})
                return
            # The record says `queued` before the message leaves; if put() raises, it says `rejected`.
            with otelexec.publish("invoice.run", destination="invoices") as message:
                self.queue.put(message.id, otelexec.inject(invoice))
            self.answer(202, {"execution_id": message.id})

    def answer(self, status: int, body: Mapping[str, Any]) -> None:
        """Send a JSON answer."""
        data = json.dumps(body).encode() + b"\n"
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def parsed(body: bytes) -> dict[str, Any] | None:
    """Give what a webhook asks for; None when it can't be understood."""
    try:
        given = json.loads(body)
        return {"invoice": int(given["invoice"]), "pages": int(given["pages"])}
    except (ValueError, TypeError, KeyError):
        return None


def main() -> None:
    """Serve until Ctrl-C."""
    folder, port = sys.argv[1:]
    otelexec.configure(service_name="webhook-app")
    Webhooks.queue = FolderQueue(Path(folder))
    with ThreadingHTTPServer(("127.0.0.1", int(port)), Webhooks) as server, contextlib.suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
