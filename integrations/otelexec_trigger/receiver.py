"""
Push receivers: deliveries over HTTP that are verified, run once, and answered so that the backend delivers again exactly when it should.

    verified, ran            200
    the executor raised      500: the redelivery is the same execution's next attempt
    it has succeeded before  200, recorded as a duplicate attempt, and not run
    it runs at this moment   409 with Retry-After
    it was cancelled         200: it is not to come again
    PermanentFailure raised  422
    forged, replayed, stale  401, and nothing is recorded
    too large                413, not read to its end
    the store can't be read  503: without it nobody could tell whether it has run
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind

from otelexec import runtime as _runtime
from otelexec import semconv
from otelexec.carrier import read_headers
from otelexec.context import SCOPE_KEY
from otelexec.correlation import Correlation, Scope, with_ambient
from otelexec.drivers import call_async, call_sync
from otelexec.endings import Ending, raised_by_signal_handler
from otelexec.envelope import receive
from otelexec.errors import ExecutionBusy, ExecutionCancelled, OtelexecError, SettingsError, StoreError
from otelexec.execution import Execution, Options, current_execution
from otelexec.lifecycle import Steps, lifecycle
from otelexec.propagation import incoming
from otelexec.store.runs import HoldKey
from otelexec.store.writes import CANCELLED
from otelexec_trigger.verifiers import VerificationError, Verified, Verifier, lowercase

logger = logging.getLogger("otelexec.trigger")

MAX_BODY_BYTES: Final = 1_048_576
DUPLICATE: Final = "duplicate"
"""Classification of the attempt that a redelivery after success makes, and which calls nothing."""

_RETRY_AFTER: Final = {"retry-after": "5"}
_PATIENCE_SECONDS: Final = 5.0
_HELD_SECONDS: Final = 86_400.0
"""How long a proof is held at least: the clock that it was verified by may not be the store's."""

ASGIScope = MutableMapping[str, Any]
ASGIReceive = Callable[[], Awaitable[MutableMapping[str, Any]]]
ASGISend = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class PermanentFailure(OtelexecError):
    """Raised by an executor: the delivery failed, and would fail again. The backend is told not to repeat it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """
    The answer to a delivery.

    Attributes:
        status: The HTTP status.
        body: JSON text.
        headers: Further headers, by lowercase name.
    """

    status: int
    body: bytes = b"{}"
    headers: Mapping[str, str] = field(default_factory=dict)


class Receiver:
    """
    An ASGI application that takes deliveries of a push backend and runs an executor with each.

    Args:
        executor: A function or coroutine function of one argument: what JSON makes of the body; text or bytes where it is no
            JSON. The execution around it is `otelexec.current_execution()`.
        verifier: Knows the backend's signatures.
        name: Name of the execution; None: the executor's qualified name.
        identity: Takes headers (by lowercase name) and body and names the delivery; None: as the verifier has it. A redelivery
            must have the same name, another delivery must not.
        max_body_bytes: Largest body, in bytes.

    Raises:
        SettingsError: The limit is none.
    """

    def __init__(
        self,
        executor: Callable[[Any], Any],
        *,
        verifier: Verifier,
        name: str | None = None,
        identity: Callable[[Mapping[str, str], bytes], str] | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        if max_body_bytes < 1:
            raise SettingsError(f"max_body_bytes is 1 or more, not {max_body_bytes}")
        self._executor = executor
        self._verifier = verifier
        self._name = name or f"{executor.__module__}.{executor.__qualname__}"
        self._identity = identity
        self._max_body_bytes = max_body_bytes
        self._is_async = inspect.iscoroutinefunction(inspect.unwrap(executor))

    # A plain function

    def deliver(self, headers: object, body: bytes) -> Reply:
        """
        Take a delivery.

        Args:
            headers: A mapping or pairs, of text or bytes; names in any case.
            body: The raw body, as it was signed.

        Returns:
            What to answer. Never raises because of the delivery or the executor.
        """
        prepared = self._prepare(headers, body)
        if isinstance(prepared, Reply):
            return prepared
        context, steps = prepared
        before = otel_context.get_current()
        otel_context.attach(context)
        try:
            if self._is_async:
                asyncio.run(call_async(_runtime.get(), steps, lambda: self._call_async(body), None))
            else:
                call_sync(_runtime.get(), steps, lambda: self._call(body))
        except Exception as error:
            if raised_by_signal_handler(error):
                raise
            return self._failure(error)
        finally:
            otel_context.attach(before)
        return _told(200, "ok")

    async def deliver_async(self, headers: object, body: bytes) -> Reply:
        """Take a delivery without blocking the event loop: a coroutine function runs in it, any other in a thread."""
        if not self._is_async:
            return await asyncio.to_thread(self.deliver, headers, body)
        prepared = await asyncio.to_thread(self._prepare, headers, body)
        if isinstance(prepared, Reply):
            return prepared
        context, steps = prepared
        token = otel_context.attach(context)
        try:
            await call_async(_runtime.get(), steps, lambda: self._call_async(body), None)
        except Exception as error:
            return self._failure(error)
        finally:
            otel_context.detach(token)
        return _told(200, "ok")

    # ASGI

    async def __call__(self, scope: ASGIScope, receive: ASGIReceive, send: ASGISend) -> None:
        """Serve one HTTP request (ASGI 3.0)."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            msg = f"a Receiver serves HTTP, not {scope['type']}"
            raise ValueError(msg)
        reply = await self._serve(scope, receive)
        if reply is None:  # the client is gone, and has not sent the whole delivery
            return
        headers = {"content-type": "application/json", "content-length": str(len(reply.body)), **reply.headers}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": raw})
        await send({"type": "http.response.body", "body": reply.body})

    async def _serve(self, scope: ASGIScope, receive: ASGIReceive) -> Reply | None:
        if scope["method"] != "POST":
            return _told(405, "a delivery is a POST", {"allow": "POST"})
        headers = lowercase(scope["headers"])
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            return self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                return self._too_large()
            if not message.get("more_body", False):
                return await self.deliver_async(scope["headers"], bytes(body))

    def _too_large(self) -> Reply:
        return _told(413, f"a delivery has at most {self._max_body_bytes} bytes", {"connection": "close"})

    # One delivery

    def _prepare(self, headers: object, body: bytes) -> Reply | tuple[Context, Steps]:
        """Verify a delivery and give the context and the lifecycle of its attempt, or the answer that turns it away."""
        if len(body) > self._max_body_bytes:
            return self._too_large()
        found = lowercase(headers)
        try:
            verified = self._verifier.verify(found, body)
            identity = verified.identity if self._identity is None else str(self._identity(found, body))
            self._bind(verified)
        except VerificationError as error:
            logger.warning("otelexec.trigger.refused: %s: %s", self._name, error)
            return _told(401, str(error))
        except StoreError as error:
            return self._failure(error)
        except Exception:
            logger.exception("otelexec.trigger.refused: %s", self._name)
            return _told(400, "the delivery can't be read")
        options = Options(
            self._name,
            kind=SpanKind.CONSUMER,
            attributes={
                semconv.MESSAGING_SYSTEM: self._verifier.provider,
                semconv.MESSAGING_OPERATION_NAME: "deliver",
                semconv.MESSAGING_OPERATION_TYPE: "process",
                semconv.MESSAGING_MESSAGE_ID: identity,
            },
            exclusive=_runtime.get().records,
        )
        return self._context(found, body, identity), lifecycle(_runtime.get(), options)

    @staticmethod
    def _bind(verified: Verified) -> None:
        """Let a proof that does not cover the identity serve this one only."""
        runtime = _runtime.get()
        if not verified.proof or not runtime.records:
            return
        until = max(verified.valid_until, time.time() + _HELD_SECONDS)
        write = HoldKey(f"proof/{verified.proof}", verified.identity, int(until * 1e9))
        holder = runtime.commit(write, durable=True, timeout_seconds=_PATIENCE_SECONDS)
        if holder != verified.identity:
            raise VerificationError("The token came with another message id before.")

    def _context(self, headers: Mapping[str, str], body: bytes, identity: str) -> Context:
        payload = _decode(body)
        token = otel_context.attach(Context())
        try:
            if isinstance(payload, Mapping) and semconv.PAYLOAD_KEY in payload:
                context, scope, _ = receive(payload, trusted=False)
            else:
                context, scope = incoming(read_headers(headers), trusted=False)
        finally:
            otel_context.detach(token)
        # The name is part of it: two receivers may get one message each under the same id.
        execution_id = hashlib.sha256(f"{self._name}\n{identity}".encode("utf-8", "surrogatepass")).hexdigest()
        correlation = Correlation.from_members(
            {
                semconv.EXECUTION_ID: execution_id,
                semconv.REQUEST_ID: execution_id,
                semconv.SOURCE: "webhook",
                semconv.PREFIX + "webhook_id": identity,
                semconv.PREFIX + "provider": self._verifier.provider,
            }
        )
        own = Scope(correlation, links=scope.links, trusted=False, message_id=identity)
        return otel_context.set_value(SCOPE_KEY, own, with_ambient(context, correlation))

    def _call(self, body: bytes) -> Any:
        return None if _is_duplicate() else self._executor(_without_envelope(_decode(body)))

    async def _call_async(self, body: bytes) -> Any:
        return None if _is_duplicate() else await self._executor(_without_envelope(_decode(body)))

    def _failure(self, error: Exception) -> Reply:
        if isinstance(error, ExecutionBusy):
            return _told(409, "the delivery is being worked on", _RETRY_AFTER)
        if isinstance(error, ExecutionCancelled):
            return _told(200, "cancelled")
        if isinstance(error, PermanentFailure):
            return _told(422, str(error))
        if isinstance(error, StoreError):
            logger.warning("otelexec.trigger.store: %s: %s", self._name, error)
            return _told(503, "the store can't be reached at the moment", _RETRY_AFTER)
        logger.info("otelexec.trigger.failed: %s", self._name, exc_info=error)
        return _told(500, "the executor failed")


def _is_duplicate() -> bool:
    """Tell whether the execution has succeeded before; then its attempt ends as a duplicate, and calls nothing."""
    execution = current_execution()
    if not isinstance(execution, Execution) or not execution.duplicate:
        return False
    execution.ending = Ending(CANCELLED, DUPLICATE)
    return True


def _decode(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        pass
    try:
        return body.decode()
    except UnicodeDecodeError:
        return body


def _without_envelope(payload: Any) -> Any:
    if isinstance(payload, dict) and semconv.PAYLOAD_KEY in payload:
        return {key: value for key, value in payload.items() if key != semconv.PAYLOAD_KEY}
    return payload


def _told(status: int, message: str, headers: Mapping[str, str] | None = None) -> Reply:
    key = "status" if status < 400 else "error"  # noqa: PLR2004 (HTTP's client errors)
    return Reply(status, json.dumps({key: message}).encode(), headers or {})


async def _lifespan(receive: ASGIReceive, send: ASGISend) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        elif message["type"] == "lifespan.shutdown":
            await send({"type": "lifespan.shutdown.complete"})
            return
