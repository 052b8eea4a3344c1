"""The web application: it takes webhooks and triggers a task over HTTP. Usage: python web.py PORT."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry import trace
from otelexec_trigger import EnqueueError, TriggerDevBackend

import otelexec

tracer = trace.get_tracer("trigger_app")
# TRIGGER_API_URL and TRIGGER_SECRET_KEY say where: `otelexec trigger serve`, or Trigger.dev itself.
backend = TriggerDevBackend()


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
                payload = {"invoice": int(given["invoice"]), "pages": int(given["pages"])}
            except (ValueError, TypeError, KeyError):
                self.answer(422, {"execution_id": otelexec.reject("malformed", name="invoice.run")})
                return
            try:
                run = backend.trigger("invoice.run", payload, tags=f"invoice_{payload['invoice']}")
            except EnqueueError as error:
                self.answer(503 if error.retryable else 500, {"error": str(error), "acceptance": error.acceptance})
                return
            self.answer(202, {"execution_id": request.execution_id, "run": run})

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
