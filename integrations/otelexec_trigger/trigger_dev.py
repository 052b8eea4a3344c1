"""
The client of Trigger.dev's REST contract; `otelexec trigger serve` speaks it as well.

The platform drops the `baggage` header, so the context travels in the payload's reserved key, and a readable copy of the
ids in tags and metadata, where the dashboard finds them.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote, urlencode

import httpx
from opentelemetry import context as otel_context
from opentelemetry import trace

from otelexec import inject, request_cancel, semconv
from otelexec.correlation import Correlation
from otelexec.errors import SettingsError
from otelexec.propagation import entries
from otelexec.publishing import Message, publish, settle_queued
from otelexec.w3c import encode_traceparent
from otelexec_trigger import wire
from otelexec_trigger.backend import AsyncTriggerBackend, Delay, Operations, Trigger, TriggerBackend
from otelexec_trigger.calls import Do, Enter, Http, Leave, Steps, published
from otelexec_trigger.clients import ClientOfLoop, ClientOfProcess, client_maker
from otelexec_trigger.encoding import check_text, encode, json_text, options_of
from otelexec_trigger.exchange import Attempts, Exchange
from otelexec_trigger.rendering import run_of
from otelexec_trigger.runs import BackendError, EnqueueError, InvalidRequest, Run, RunNotFound, TriggerError

logger = logging.getLogger("otelexec.trigger")

SYSTEM: Final = "trigger.dev"
"""`messaging.system`."""
API_URL: Final = "https://api.trigger.dev"

TIMEOUT_SECONDS: Final = 30.0
MAX_ATTEMPTS: Final = 5
FIRST_WAIT_SECONDS: Final = 1.0
_PAGE: Final = 100
_BATCH_SENDS: Final = 5
_METADATA_KEY: Final = "otelexec"


class TriggerDevOperations(Operations):
    """
    What a Trigger.dev server does.

    Args:
        api_url: Where it is.
        secret_key: The environment's key.
        max_attempts: How often a request is sent at most.
        first_wait_seconds: How long to wait before the second attempt; each further one waits 1.6 times as long, up to 30 s.
    """

    def __init__(self, api_url: str, secret_key: str, *, max_attempts: int, first_wait_seconds: float) -> None:
        self._url = api_url.rstrip("/")
        self._server = Exchange(self._url, secret_key, max_attempts=max_attempts, first_wait_seconds=first_wait_seconds)

    # Asking

    def trigger(self, wanted: Trigger) -> Steps[str]:
        """Ask for a run."""
        options_of(wanted)
        encode(wanted.payload)
        path = f"/api/v1/tasks/{_segment(wanted.task)}/trigger"

        def send(message: Message) -> Steps[str]:
            context = otel_context.get_current()
            payload, options = _prepare(wanted, message.correlation)
            attempts = Attempts()
            try:
                payload = yield from self._offload(payload, options)
                body = _without_none({"payload": payload, "options": options})
                answer = yield from self._server.ask("POST", path, _body(body), attempts, entries(context, message.correlation))
                run_id = _text(answer, "id")
                if run_id is None:
                    text = f"{self._url} accepted the run of {wanted.task} and did not say its id"
                    raise BackendError(text, retryable=True, status=200)
                message.set_message_id(run_id)
            except BaseException as error:
                if attempts.unknown:
                    message.acceptance_unknown()
                if isinstance(error, TriggerError):
                    raise self._enqueue_error(error, attempts) from error
                raise
            return run_id

        return (yield from published(_block(wanted), send))

    def batch_trigger(self, wanted: Sequence[Trigger]) -> Steps[str]:
        """Ask for several runs, at most a thousand in one batch."""
        if not wanted:
            raise InvalidRequest("A batch has at least one item.")
        for each in wanted:
            options_of(each)
            encode(each.payload)
        first: str | None = None
        for start in range(0, len(wanted), wire.MAX_BATCH):
            try:
                batch_id = yield from self._batch(wanted[start : start + wire.MAX_BATCH])
            except EnqueueError as error:
                if first is None:
                    raise
                text = f"the first {start} of {len(wanted)} items were accepted, then: {error}"
                raise EnqueueError(text, acceptance="unknown", retryable=error.retryable, status=error.status) from error
            first = first or batch_id
        return first or ""

    def _batch(self, wanted: Sequence[Trigger]) -> Steps[str]:
        base = otel_context.get_current()
        blocks: list[tuple[publish, Message]] = []
        attempts = Attempts(whole=False)  # the server takes the items one after the other, and may refuse the call in between
        failure: BaseException | None = None
        try:
            lines = []
            for index, each in enumerate(wanted):
                otel_context.attach(base)  # the messages of one call are siblings
                block = _block(each)
                message: Message = yield Enter(block)
                blocks.append((block, message))
                payload, options = _prepare(each, message.correlation)
                try:
                    payload = yield from self._offload(payload, options)
                except TriggerError as error:
                    raise self._enqueue_error(error, attempts) from error
                lines.append(_body(_without_none({"index": index, "task": each.task, "payload": payload, "options": options})))
            otel_context.attach(base)
            try:
                return (yield from self._send_batch(wanted, b"\n".join(lines) + b"\n", base, attempts))
            except TriggerError as error:
                raise self._enqueue_error(error, attempts) from error
        except BaseException as error:
            failure = error
            raise
        finally:
            for block, message in reversed(blocks):
                if attempts.unknown:
                    message.acceptance_unknown()
                yield Leave(block, failure)
            otel_context.attach(base)

    def _send_batch(self, wanted: Sequence[Trigger], lines: bytes, base: Any, attempts: Attempts) -> Steps[str]:
        span = trace.get_current_span(base).get_span_context()
        carried = {semconv.HEADER_TRACEPARENT: encode_traceparent(span)} if span.is_valid else {}
        tasks = sorted({each.task for each in wanted})
        created = yield from self._server.ask(
            "POST", "/api/v3/batches", _body({"runCount": len(wanted), "taskIdentifiers": tasks}), Attempts(), carried
        )
        batch_id = _text(created, "id")
        if batch_id is None:
            raise BackendError(f"{self._url} announced a batch and did not say its id", status=200)
        try:
            path = f"/api/v3/batches/{_segment(batch_id)}/items"
        except InvalidRequest as error:
            raise BackendError(f"{self._url} announced a batch, but {error}", status=200) from None
        for _ in range(_BATCH_SENDS):
            # Some may be accepted from here on; sending all of them again is safe, since the server knows them by their index.
            answer = yield from self._server.ask("POST", path, lines, attempts, {"content-type": "application/x-ndjson"})
            if answer.get("sealed") is True:
                return batch_id
            if answer.get("sealed") is not False:
                raise BackendError(
                    f"{self._url} was sent batch {batch_id} and did not say whether it has all of it", retryable=True, status=200
                )
        raise BackendError(f"batch {batch_id} was sent {_BATCH_SENDS} times and is not complete", retryable=True)

    def _offload(self, payload: str | None, options: dict[str, Any]) -> Steps[str | None]:
        """Upload a payload that is too large for the call itself."""
        if payload is None or len(payload.encode()) < wire.OFFLOAD_BYTES:
            return payload
        name = f"otelexec_{uuid.uuid4().hex}/payload.{'txt' if options['payloadType'] == wire.TEXT else 'json'}"
        answer = yield from self._server.ask("PUT", f"/api/v2/packets/{name}", b"", Attempts())
        url = _text(answer, "presignedUrl")
        if url is None:
            raise EnqueueError(f"{self._url} gave no place to upload a payload of {len(payload)} characters", retryable=True)
        # Where the bytes go is another server, which must not see the key.
        uploaded = yield from self._server.send(
            Http("PUT", url, {"content-type": options["payloadType"]}, payload.encode(), presigned=True), Attempts()
        )
        if uploaded.status_code >= 300:  # noqa: PLR2004 (anything but a success)
            raise EnqueueError(
                f"the upload of the payload was answered {uploaded.status_code}", status=uploaded.status_code, retryable=True
            )
        options["payloadType"] = wire.STORED
        return _text(answer, "storagePath") or name

    def _enqueue_error(self, error: TriggerError, attempts: Attempts) -> EnqueueError:
        if isinstance(error, EnqueueError):
            return error
        acceptance: Any = "unknown" if attempts.unknown else "rejected"
        return EnqueueError(str(error), acceptance=acceptance, retryable=error.retryable or attempts.unknown, status=error.status)

    # Runs

    def get(self, run_id: str) -> Steps[Run]:
        """Give a run."""
        told = yield from self._told(run_id)
        if told.get("output") is None and isinstance(told.get("outputPresignedUrl"), str):
            answer = yield from self._server.send(Http("GET", told["outputPresignedUrl"], presigned=True), Attempts())
            if answer.status_code < 300:  # noqa: PLR2004 (a success)
                told["output"] = _output(answer)
        return run_of(told)

    def cancel(self, run_id: str) -> Steps[bool]:
        """Cancel a run: first the wish, then the backend, then the record."""
        try:
            told = yield from self._told(run_id)
        except RunNotFound:
            return False
        if run_of(told).has_ended:
            return True
        execution_id = _execution_id(told)
        if execution_id is not None:
            yield Do(lambda: request_cancel(execution_id, terminate=True))
        try:
            yield from self._server.ask("POST", f"/api/v2/runs/{_segment(run_id)}/cancel", b"", Attempts())
        except RunNotFound:
            return False
        if execution_id is not None:
            yield Do(lambda: settle_queued(execution_id))
        return True

    def page(self, cursor: str | None, tasks: Sequence[str]) -> Steps[tuple[list[Run], str | None]]:
        """Give a page of runs."""
        query = {"page[size]": str(_PAGE)}
        if cursor is not None:
            query["page[after]"] = cursor
        if tasks:
            query["filter[taskIdentifier]"] = ",".join(tasks)
        answer = yield from self._server.ask("GET", f"/api/v1/runs?{urlencode(query)}", None, Attempts())
        data, pagination = answer.get("data"), answer.get("pagination")
        if not isinstance(data, list):
            raise BackendError(f"{self._url} was asked for its runs and gave none", status=200)
        runs = [run_of(told) for told in data if isinstance(told, dict)]
        return runs, _text(pagination, "next") if isinstance(pagination, dict) and runs else None

    def replay(self, run_id: str) -> Steps[str]:
        """Ask for the same once more."""
        carried = entries_here()
        answer = yield from self._server.ask("POST", f"/api/v1/runs/{_segment(run_id)}/replay", b"", Attempts(), carried)
        new_id = _text(answer, "id")
        if new_id is None:
            raise BackendError(f"{self._url} replayed {run_id} and did not say the new run's id", status=200)
        return new_id

    def reschedule(self, run_id: str, delay: Delay) -> Steps[Run]:
        """Give a delayed run another time."""
        body = _body({"delay": wire.delay_text(delay)})
        return run_of((yield from self._ask_for_run("POST", f"/api/v1/runs/{_segment(run_id)}/reschedule", body)))

    def add_tags(self, run_id: str, tags: str | Sequence[str]) -> Steps[None]:
        """Add tags to a run."""
        body = _body({"tags": wire.checked_tags(tags)})
        yield from self._server.ask("POST", f"/api/v1/runs/{_segment(run_id)}/tags", body, Attempts())

    def _told(self, run_id: str) -> Steps[dict[str, Any]]:
        return (yield from self._ask_for_run("GET", f"/api/v3/runs/{_segment(run_id)}", None))

    # Requests

    def _ask_for_run(self, method: str, path: str, content: bytes | None) -> Steps[dict[str, Any]]:
        told = yield from self._server.ask(method, path, content, Attempts())
        if _text(told, "id") is None:
            raise BackendError(f"{method} {self._url}{path} was answered with something that is no run", status=200)
        return told


def _output(response: httpx.Response) -> Any:
    """Give an output that was kept apart; as text where it is not the JSON that it should be."""
    try:
        return wire.decode(response.text, response.headers.get("content-type", wire.JSON).partition(";")[0].strip())
    except InvalidRequest:
        return response.text


def _block(wanted: Trigger) -> publish:
    return publish(wanted.task, destination=wanted.queue or wanted.task, system=SYSTEM, operation="trigger")


def _prepare(wanted: Trigger, correlation: Correlation) -> tuple[str | None, dict[str, Any]]:
    """Give payload and options of a message, with its correlation where the platform keeps it; in the message's own block."""
    given = wanted.payload
    payload, payload_type = encode(inject(given) if isinstance(given, Mapping) else given)
    options = options_of(wanted)
    options["payloadType"] = payload_type
    if payload is not None:
        options["payloadSize"] = len(payload.encode())
    if wanted.key is None:
        options["idempotencyKey"] = wire.idempotency_hash(correlation.execution_id)
    members = correlation.members()
    tags = options.get("tags", [])
    added, dropped = wire.correlation_tags(members, len(tags))
    options["tags"] = [*tags, *added]
    if dropped:
        logger.warning("otelexec.trigger.tags: no room for %s among the %d tags of a run", ", ".join(dropped), wire.MAX_TAGS)
    if wanted.metadata is None or isinstance(wanted.metadata, Mapping):
        shown = {name.removeprefix(semconv.PREFIX): value for name, value in members.items()}
        own = wanted.metadata or {}
        metadata = {**own, _METADATA_KEY: shown}
        if len(json_text(metadata, "metadata").encode()) <= wire.MAX_METADATA_BYTES:
            options["metadata"] = metadata
            if _METADATA_KEY in own and _named(own) is None:  # else it is that of an earlier run, which was passed on
                logger.warning("otelexec.trigger.metadata: %r is the correlation's, what the call gave there is left out", _METADATA_KEY)
    if "metadata" in options:
        options["metadata"] = json_text(options["metadata"], "metadata")
        options["metadataType"] = wire.JSON
    return payload, options


def entries_here() -> dict[str, str]:
    """Give the trace headers of the current span; nothing outside any."""
    span = trace.get_current_span().get_span_context()
    return {semconv.HEADER_TRACEPARENT: encode_traceparent(span)} if span.is_valid else {}


def _execution_id(told: Mapping[str, Any]) -> str | None:
    named = _named(told.get("metadata"))
    if named is not None:
        return named
    # Metadata that is no object has no room for it, and a task may have replaced what was there.
    tags, prefix = told.get("tags"), f"{semconv.EXECUTION_ID}:"
    found = [tag for tag in tags if isinstance(tag, str) and tag.startswith(prefix)] if isinstance(tags, list) else []
    return found[0].removeprefix(prefix) if found else None


def _named(metadata: object) -> str | None:
    """Give the execution id that metadata tells of."""
    ours = metadata.get(_METADATA_KEY) if isinstance(metadata, Mapping) else None
    return _text(ours, "execution_id") if isinstance(ours, Mapping) else None


def _segment(name: object) -> str:
    """Give an id as a part of a path, where dots and nothing would lead somewhere else."""
    if not isinstance(name, str) or name in ("", ".", ".."):
        raise InvalidRequest(f"an id is text such as run_1234, not {name!r}")
    check_text(name, "an id")
    return quote(name, safe="")


def _body(value: Any) -> bytes:
    return json_text(value, "the request").encode()


def _without_none(value: dict[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in value.items() if each is not None}


def _text(answer: Mapping[str, Any], name: str) -> str | None:
    value = answer.get(name)
    return value if isinstance(value, str) and value else None


def _operations(
    api_url: str | None, secret_key: str | None, max_attempts: int, first_wait_seconds: float, timeout_seconds: float
) -> TriggerDevOperations:
    # A file or a secret store often has a line's end behind it.
    key = (secret_key or os.environ.get("TRIGGER_SECRET_KEY", "")).strip()
    if not key:
        raise SettingsError("TRIGGER_SECRET_KEY: set it to the environment's key, tr_dev_... or tr_prod_..., or give secret_key=")
    if not (key.isascii() and key.isprintable()):
        raise SettingsError("TRIGGER_SECRET_KEY: has characters that no header can hold")
    url = api_url or os.environ.get("TRIGGER_API_URL") or API_URL
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        parsed = httpx.URL("")
    if parsed.userinfo:
        # Not repeated, for it may hold a password; and what has it in its URL would show it in errors, on records and on spans.
        raise SettingsError("TRIGGER_API_URL: leave the user name and the password out, what is sent is the key (TRIGGER_SECRET_KEY)")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        shown = "what it is" if "@" in str(url) else repr(str(url)[:64])
        raise SettingsError(f"TRIGGER_API_URL: must start with http:// or https:// and name a host, not {shown}")
    if max_attempts < 1:
        raise SettingsError(f"max_attempts is 1 or more, not {max_attempts}")
    if not (timeout_seconds > 0 and first_wait_seconds >= 0):
        raise SettingsError(
            f"timeout_seconds is more than 0, and first_wait_seconds not less, not {timeout_seconds} and {first_wait_seconds}"
        )
    return TriggerDevOperations(url, key, max_attempts=max_attempts, first_wait_seconds=first_wait_seconds)


class TriggerDevBackend(TriggerBackend):
    """
    Trigger.dev, over its REST API.

    Args:
        api_url: The server; None: TRIGGER_API_URL, else the cloud's.
        secret_key: The environment's key; None: TRIGGER_SECRET_KEY.
        timeout_seconds: How long one attempt waits for a connection, and for each part of the answer.
        max_attempts: How often a request is sent at most.
        first_wait_seconds: How long to wait before the second attempt; each further one waits 1.6 times as long, up to 30 s.

    Raises:
        SettingsError: There is no key, the URL is none, a number is too small, or the environment's proxies or certificates can't be
            used.
    """

    def __init__(
        self,
        api_url: str | None = None,
        secret_key: str | None = None,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        max_attempts: int = MAX_ATTEMPTS,
        first_wait_seconds: float = FIRST_WAIT_SECONDS,
    ) -> None:
        operations = _operations(api_url, secret_key, max_attempts, first_wait_seconds, timeout_seconds)
        super().__init__(operations, ClientOfProcess(client_maker(httpx.Client, timeout_seconds)))


class AsyncTriggerDevBackend(AsyncTriggerBackend):
    """The same, with `await`; see `TriggerDevBackend` for the arguments."""

    def __init__(
        self,
        api_url: str | None = None,
        secret_key: str | None = None,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        max_attempts: int = MAX_ATTEMPTS,
        first_wait_seconds: float = FIRST_WAIT_SECONDS,
    ) -> None:
        operations = _operations(api_url, secret_key, max_attempts, first_wait_seconds, timeout_seconds)
        super().__init__(operations, ClientOfLoop(client_maker(httpx.AsyncClient, timeout_seconds)))
