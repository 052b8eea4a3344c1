"""The web application: it takes webhooks and sends a chain of tasks. Usage: python web.py PORT."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from invoices import app
from opentelemetry import trace

import otelexec

tracer = trace.get_tracer("celery_app")


class Webhooks(BaseHTTPRequestHandler):
    """Takes `POST /hooks/PROVIDER` with `{"invoice": 7, "pages": 20}`."""

    def do_POST(self) -> None:
        """Take one webhook."""
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        provider = self.path.rpartition("/")[2]
        # Webhooks come from outside: what they say of themselves in otelexec's headers is not believed, ids are minted here.
        with (
            otelexec.extract_headers(self.headers, trusted=False),
            tracer.start_as_current_span("POST /hooks", kind=trace.SpanKind.SERVER),
            otelexec.correlate(source="webhook", webhook_id=self.headers.get("x-webhook-id"), path=self.path, provider=provider) as request,
        ):
            try:
                given = json.loads(body)
                chain = app.signature("invoice.fetch", (int(given["invoice"]), int(given["pages"])))
            except (ValueError, TypeError, KeyError):
                self.answer(422, {"execution_id": otelexec.reject("malformed", name="invoice.fetch")})
                return
            # Nothing of otelexec's: the first task takes the scope's id, those after it have their own, the request id is shared.
            (chain | app.signature("invoice.work") | app.signature("invoice.mail")).delay()
            self.answer(202, {"request_id": request.request_id})

    def answer(self, status: int, body: Mapping[str, Any]) -> None:
        """Send a JSON answer."""
        data = json.dumps(body).encode() + b"\n"
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    """Serve until Ctrl-C."""
    with ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Webhooks) as server, contextlib.suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
