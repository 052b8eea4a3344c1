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
from otelexec.context import current_execution
from otelexec.correlation import Correlation, with_ids
from otelexec.drivers import call_async, call_sync
from otelexec.endings import Ending, describe, raised_by_signal_handler
from otelexec.errors import ExecutionBusy, ExecutionCancelled, OtelexecError, SettingsError, StoreError
from otelexec.lifecycle import Steps, lifecycle
from otelexec.options import Options
from otelexec.running import RunningExecution
from otelexec.store.rows import CANCELLED, SUCCEEDED
from otelexec.store.runs import HoldKey
from otelexec_trigger.carried import received, unwrapped
from otelexec_trigger.executors import awaited, is_coroutine_function, name_of, run_to_end
from otelexec_trigger.verifiers import VerificationError, Verified, Verifier, identity_of, lowercase, raw

logger = logging.getLogger("otelexec.trigger")

MAX_BODY_BYTES: Final = 1_048_576
DUPLICATE: Final = "duplicate"
"""Classification of the attempt that a redelivery after success makes, and which calls nothing."""

_RETRY_AFTER: Final = {"retry-after": "5"}
_PATIENCE_SECONDS: Final = 5.0
_MAX_TOLD_CHARS: Final = 4_096
_HELD_SECONDS: Final = 86_400.0
"""How long a proof is held after it is valid no more: the clocks that it is verified by differ."""

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


@dataclass(slots=True)
class _Attempt:
    """What a verified delivery is worked on with. `execution` is there once it was opened in the store."""

    payload: Any
    context: Context
    steps: Steps
    execution: RunningExecution | None = None


class Receiver:
    """
    An ASGI application that takes deliveries of a push backend and runs an executor with each.

    Args:
        executor: Any callable of one argument, what JSON makes of the body; text or bytes where it is no JSON. What it returns
            is awaited if it can be. The execution around it is `otelexec.current_execution()`.
        verifier: Knows the backend's signatures.
        name: Name of the execution; None: the executor's qualified name.
        identity: Takes headers (found by a name in any case) and body and names the delivery; None, or where it gives None or
            nothing: as the verifier has it. A redelivery must have the same name, another delivery must not.
        max_body_bytes: Largest body, in bytes.

    Raises:
        SettingsError: `max_body_bytes` is below 1.
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
        self._name = name or name_of(executor)
        self._identity = identity
        self._max_body_bytes = max_body_bytes
        self._is_async = is_coroutine_function(executor)

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
        attempt = self._prepare(headers, body)
        if isinstance(attempt, Reply):
            return attempt
        before = otel_context.get_current()
        otel_context.attach(attempt.context)
        try:
            if self._is_async:
                run_to_end(call_async(_runtime.get(), attempt.steps, lambda: self._call_and_wait(attempt), None))
            else:
                call_sync(_runtime.get(), attempt.steps, lambda: self._call(attempt))
        except BaseException as error:
            return self._answer(attempt, error)
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
        attempt = prepared

        async def deliver() -> Reply:
            try:
                await call_async(_runtime.get(), attempt.steps, lambda: self._call_and_wait(attempt), None)
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # a SystemExit would end the server's loop
                return self._answer(attempt, error)
            return _told(200, "ok")

        # A task of its own, which a request to cancel the execution cancels: what cancels this one is the server.
        token = otel_context.attach(attempt.context)
        task = asyncio.create_task(deliver())
        otel_context.detach(token)
        try:
            return await task
        except asyncio.CancelledError as error:
            own = asyncio.current_task()
            if own is None or own.cancelling():
                raise
            return self._answer(attempt, error)

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
        if reply.status == 413 and scope.get("http_version", "1.1").startswith("1"):  # noqa: PLR2004 (HTTP/2 has no such header)
            headers["connection"] = "close"
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": raw})
        await send({"type": "http.response.body", "body": reply.body})

    async def _serve(self, scope: ASGIScope, receive: ASGIReceive) -> Reply | None:
        if scope["method"] != "POST":
            return _told(405, "a delivery is a POST", {"allow": "POST"})
        headers = lowercase(scope["headers"])
        length = headers.get("content-length", "").lstrip("0")
        # By the number of digits first: int() refuses to read too many.
        if length.isdecimal() and (len(length) > len(str(self._max_body_bytes)) or int(length) > self._max_body_bytes):
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
                return await self.deliver_async(headers, bytes(body))

    def _too_large(self) -> Reply:
        return _told(413, f"a delivery has at most {self._max_body_bytes} bytes")

    # One delivery

    def _prepare(self, headers: object, body: object) -> Reply | _Attempt:
        """Verify a delivery and give the attempt that is to be made, or the answer that turns it away."""
        found = lowercase(headers)
        try:
            content = raw(body)
            if len(content) > self._max_body_bytes:
                return self._too_large()
            verified = self._verifier.verify(found, content)
            named = self._identity(found, content) if self._identity is not None else None
            # Never text made of a None: every delivery without a name would be the duplicate of the first.
            identity = verified.identity if named is None or named == "" else identity_of(str(named))
        except VerificationError as error:
            return self._refuse(error)
        except Exception:
            logger.exception("otelexec.trigger.refused: %s", self._name)
            return _told(400, "the delivery can't be read")
        try:
            self._bind(verified)
        except VerificationError as error:
            return self._refuse(error)
        except StoreError as error:
            return self._unavailable(error)
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
        payload = _decode(content)
        return _Attempt(unwrapped(payload), self._context(found, payload, identity), lifecycle(_runtime.get(), options))

    @staticmethod
    def _bind(verified: Verified) -> None:
        """Let a proof that does not cover the identity serve this one only."""
        runtime = _runtime.get()
        if not verified.proof or not runtime.records:
            return
        seconds = max(0.0, verified.valid_until - time.time()) + _HELD_SECONDS
        write = HoldKey(f"proof/{verified.proof}", verified.identity, int(seconds * 1e9))
        holder = runtime.journal.group.commit(write, durable=True, timeout_seconds=_PATIENCE_SECONDS)
        if holder != verified.identity:
            raise VerificationError("The token came with another message id before.")

    def _context(self, headers: Mapping[str, str], payload: Any, identity: str) -> Context:
        context, scope = received(payload, read_headers(headers), trusted=False)
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
        return with_ids(context, scope, correlation, identity)

    def _call(self, attempt: _Attempt) -> Any:
        if _begins(attempt):
            value = self._executor(attempt.payload)
            return run_to_end(awaited(value)) if inspect.isawaitable(value) else value
        return None

    async def _call_and_wait(self, attempt: _Attempt) -> Any:
        if _begins(attempt):
            return await awaited(self._executor(attempt.payload))
        return None

    # Answers to what did not go well

    def _answer(self, attempt: _Attempt, error: BaseException) -> Reply:
        """Answer what a delivery raised. Raises it where it is not the executor's: the process is to end."""
        if isinstance(error, KeyboardInterrupt | GeneratorExit) or raised_by_signal_handler(error):
            raise error
        execution = attempt.execution
        if execution is None:
            return self._not_begun(error)
        ending = execution.ending
        if ending is not None and ending.state == SUCCEEDED:  # SystemExit(0)
            return _told(200, "ok")
        if ending is not None and ending.state == CANCELLED and execution.cancel_requested:
            return _told(200, "cancelled")
        logger.warning("otelexec.trigger.raised: %s", self._name, exc_info=error)
        if isinstance(error, PermanentFailure):
            return _told(422, describe(error, _MAX_TOLD_CHARS)[1])
        return _told(500, "the executor failed")

    def _not_begun(self, error: BaseException) -> Reply:
        if isinstance(error, ExecutionCancelled):
            return _told(200, "cancelled")
        if isinstance(error, StoreError):
            return self._unavailable(error)
        if isinstance(error, ExecutionBusy):
            # The attempt that is in the way may be one of a process that has died, and nobody else may be there to notice: a
            # runtime looks for such ones only once its thread runs, which an attempt that is not made does not start.
            _runtime.get().heartbeat.ensure()
            return _told(409, "the delivery is being worked on", _RETRY_AFTER)
        logger.error("otelexec.trigger.failed: %s was not begun", self._name, exc_info=error)
        return _told(500, "the delivery was not begun")

    def _refuse(self, error: VerificationError) -> Reply:
        logger.warning("otelexec.trigger.refused: %s: %s", self._name, error)
        return _told(401, str(error))

    def _unavailable(self, error: StoreError) -> Reply:
        logger.warning("otelexec.trigger.store: %s: %s", self._name, error)
        return _told(503, "the store can't be reached at the moment", _RETRY_AFTER)


def _begins(attempt: _Attempt) -> bool:
    """Tell whether the executor is to be called: not when the execution has succeeded before, then the attempt ends as a duplicate."""
    execution = current_execution()
    if not isinstance(execution, RunningExecution):
        return True
    attempt.execution = execution
    if execution.duplicate:
        execution.ending = Ending(CANCELLED, DUPLICATE)
    return not execution.duplicate


def _decode(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        pass
    try:
        return body.decode()
    except UnicodeDecodeError:
        return body


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
