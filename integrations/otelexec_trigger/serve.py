"""
The local engine over the Trigger.dev wire contract, so that its SDK, and our client, can trigger Python tasks with no account.

Every answer that says that something is done is given after the commit that did it. All state is in the store: any number
of servers may serve one, and one that is killed is simply started again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from otelexec import semconv
from otelexec.errors import SettingsError, StoreError, StoreRejected
from otelexec.store import run_statements as statements
from otelexec.store.runs import PutPacket, RunRecord
from otelexec_trigger import engine, wire
from otelexec_trigger.rendering import as_json
from otelexec_trigger.runs import InvalidRequest, RunNotFound, TriggerError

logger = logging.getLogger("otelexec.trigger")

_UPLOAD_SECONDS: Final = 3600
_MAX_LINE_BYTES: Final = wire.MAX_BODY_BYTES + 64 * 1024
"""A line of a batch is a whole run, with its options."""
_MAX_UPLOAD_BYTES: Final = 64 * 1024 * 1024
_PAGE: Final = 20
_MAX_PAGE: Final = 100
_KEY_HEADER: Final = "x-trigger-request-idempotency-key"

Handler = Callable[[Request], Awaitable[Response]]


class Refused(Exception):
    """
    A request gets an error for an answer.

    Args:
        status: The HTTP status.
        message: What is wrong with it.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Json(JSONResponse):
    """An answer in ASCII: what callers send may hold lone surrogates, which JSON can escape and UTF-8 does not have."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


class Server:
    """
    The server's handlers.

    Args:
        secret_key: What callers show as bearer token.

    Raises:
        SettingsError: The key is empty.
    """

    def __init__(self, secret_key: str) -> None:
        key = secret_key.strip()
        if not key:
            raise SettingsError("TRIGGER_SECRET_KEY: set it to the key that callers must show, for example tr_dev_ and random letters.")
        self._key = key.encode()

    def app(self) -> Starlette:
        """Give the ASGI application."""
        routes = [
            ("POST", "/api/v1/tasks/{task:path}/trigger", self.trigger),
            ("POST", "/api/v2/tasks/batch", self.batch),
            ("POST", "/api/v3/batches", self.create_batch),
            ("POST", "/api/v3/batches/{batch}/items", self.batch_items),
            ("GET", "/api/v1/batches/{batch}", self.get_batch),
            ("GET", "/api/v2/batches/{batch}", self.get_batch),
            ("GET", "/api/v3/runs/{run}", self.get_run),
            ("GET", "/api/v1/runs", self.list_runs),
            ("POST", "/api/v2/runs/{run}/cancel", self.cancel),
            ("POST", "/api/v1/runs/{run}/replay", self.replay),
            ("POST", "/api/v1/runs/{run}/reschedule", self.reschedule),
            ("GET", "/api/v1/runs/{run}/result", self.result),
            ("POST", "/api/v1/runs/{run}/tags", self.add_tags),
            ("GET", "/api/v1/runs/{run}/metadata", self.get_metadata),
            ("PUT", "/api/v1/runs/{run}/metadata", self.put_metadata),
            ("POST", "/api/v1/idempotencyKeys/{key}/reset", self.reset_key),
            ("PUT", "/api/v2/packets/{name:path}", self.create_packet),
            ("PUT", "/api/v1/packets/{name:path}", self.create_packet),
            ("GET", "/api/v1/packets/{name:path}", self.find_packet),
        ]
        guarded = [Route(path, self._guarded(handler), methods=[method]) for method, path, handler in routes]
        # What is signed needs no key: that is what a presigned URL is for.
        open_ = [
            Route("/packets/{name:path}", _answered(self.upload), methods=["PUT"]),
            Route("/packets/{name:path}", _answered(self.download), methods=["GET"]),
            Route("/health", _health, methods=["GET"]),
        ]
        return Starlette(routes=[*guarded, *open_], exception_handlers={404: _not_found, 405: _not_allowed})

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            scheme, _, token = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode("utf-8", "replace"), self._key):
                return _error(401, "Invalid or missing API key")
            return await handler(request)

        return _answered(guarded)

    # Runs

    async def trigger(self, request: Request) -> Response:
        """`POST /api/v1/tasks/{task}/trigger`."""
        task = request.path_params["task"]
        if not task:
            raise Refused(404, "a run is of a task")
        body = await _json_object(request, wire.MAX_BODY_BYTES)
        options = dict(_mapping(body, "options"))
        for header, name in (("idempotency-key", "idempotencyKey"), ("idempotency-key-ttl", "idempotencyKeyTTL")):
            if header in request.headers:
                options[name] = request.headers[header]
        headers, key = dict(request.headers), request.headers.get(_KEY_HEADER)
        enqueued = await run_in_threadpool(lambda: self._enqueue(task, body.get("payload"), options, headers, key))
        return _Json({"id": enqueued.run_id, "isCached": enqueued.cached})

    def _enqueue(self, task: str, payload: Any, options: dict[str, Any], headers: Mapping[str, str], key: str | None, **batch: Any) -> Any:
        text, kind, decoded = self._read(payload, options)
        correlation, context = engine.origin(headers, decoded)
        return engine.enqueue(engine.Request(task, text, kind, options, key, **batch), correlation, context)

    def _read(self, payload: Any, options: Mapping[str, Any]) -> tuple[str | None, str, Any]:
        """Give a payload's text, its media type, and what it means."""
        kind = options.get("payloadType") or wire.JSON
        text: str | None
        if kind == wire.STORED:
            text, kind = self._stored(payload)
        elif payload is None or isinstance(payload, str):
            text = payload
        else:
            text, kind = json.dumps(payload, separators=(",", ":")), wire.JSON
        if kind not in (wire.JSON, wire.SUPERJSON, wire.TEXT):
            raise Refused(400, f"payloadType can't be {str(kind)[:64]!r}")
        try:
            return text, kind, wire.decode(text, kind)
        except InvalidRequest:
            # The SDK's text may come without its type.
            return text, wire.TEXT, text

    @staticmethod
    def _stored(name: Any) -> tuple[str, str]:
        if not isinstance(name, str) or not name:
            raise Refused(400, "the payload of application/store is the name of what was uploaded")
        found = engine.read(lambda tx: statements.find_packet(tx, name))
        if found is None:
            raise Refused(400, f"nothing was uploaded as {name[:128]!r}")
        return found

    async def get_run(self, request: Request) -> Response:
        """`GET /api/v3/runs/{run}`."""
        return _Json(as_json(await _run(request)))

    async def list_runs(self, request: Request) -> Response:
        """`GET /api/v1/runs`, in pages by run id."""
        query = request.query_params
        size = _number(query.get("page[size]"), _PAGE)
        if not 1 <= size <= _MAX_PAGE:
            raise Refused(400, f"page[size] is 1 to {_MAX_PAGE}")
        wanted = _filter(query)
        tasks = [task for task in query.get("filter[taskIdentifier]", "").split(",") if task]
        batch = query.get("filter[batch]")

        def find() -> tuple[list[RunRecord], bool, bool]:
            after, before = (_place(query.get(name)) for name in ("page[after]", "page[before]"))
            found = engine.list_runs(limit=size + 1, before=after, after=before, tasks=tasks, batch_id=batch, wanted=wanted)
            more = len(found) > size
            page = found[:size] if before is None else found[-size:]
            return page, more if before is None else bool(page), after is not None if before is None else more

        page, has_next, has_previous = await run_in_threadpool(find)
        pagination = {}
        if page and has_next:
            pagination["next"] = page[-1].run_id
        if page and has_previous:
            pagination["previous"] = page[0].run_id
        environment = {"id": "env_local", "name": "local"}
        return _Json({"data": [as_json(run, whole=False) | {"env": environment} for run in page], "pagination": pagination})

    async def cancel(self, request: Request) -> Response:
        """`POST /api/v2/runs/{run}/cancel`."""
        run = await run_in_threadpool(lambda: engine.cancel(request.path_params["run"]))
        return _Json({"id": run.run_id})

    async def replay(self, request: Request) -> Response:
        """`POST /api/v1/runs/{run}/replay`."""
        headers, key = dict(request.headers), request.headers.get(_KEY_HEADER)
        enqueued = await run_in_threadpool(lambda: engine.replay(request.path_params["run"], headers, request_key=key))
        return _Json({"id": enqueued.run_id})

    async def reschedule(self, request: Request) -> Response:
        """`POST /api/v1/runs/{run}/reschedule`."""
        delay = (await _json_object(request)).get("delay")
        if not isinstance(delay, str):
            raise Refused(400, "delay is a duration such as '2h30m' or a date in ISO 8601")
        return _Json(as_json(await run_in_threadpool(lambda: engine.reschedule(request.path_params["run"], delay))))

    async def result(self, request: Request) -> Response:
        """`GET /api/v1/runs/{run}/result`."""
        run = await _run(request)
        if not engine.is_ended(run):
            raise Refused(404, f"{run.run_id} has not ended")
        told: dict[str, Any] = {"ok": run.state == "succeeded", "id": run.run_id, "taskIdentifier": run.task}
        if told["ok"]:
            told |= {"output": run.result, "outputType": wire.JSON}
        else:
            error = engine.error_of(run) or {"name": engine.status_of(run), "message": engine.status_of(run)}
            told["error"] = {"type": "BUILT_IN_ERROR", "name": error["name"], "message": error["message"], "stackTrace": ""}
        return _Json(told)

    async def add_tags(self, request: Request) -> Response:
        """`POST /api/v1/runs/{run}/tags`."""
        tags = (await _json_object(request)).get("tags")
        if not isinstance(tags, str | list):
            raise Refused(400, "tags is a string or a list of strings")
        await run_in_threadpool(lambda: engine.add_tags(request.path_params["run"], tags))
        return _Json({"message": f"Successfully set {1 if isinstance(tags, str) else len(tags)} new tags."})

    async def get_metadata(self, request: Request) -> Response:
        """`GET /api/v1/runs/{run}/metadata`."""
        return _Json({"metadata": (await _run(request)).metadata, "metadataType": wire.JSON})

    async def put_metadata(self, request: Request) -> Response:
        """`PUT /api/v1/runs/{run}/metadata`."""
        body = await _json_object(request, 2 * 1024 * 1024)
        if body.get("parentOperations") or body.get("rootOperations"):
            raise Refused(400, "runs of the local engine have neither a parent nor a root")
        operations = body.get("operations") or []
        if not isinstance(operations, list):
            raise Refused(400, "operations is a list")

        def change(before: Any) -> Any:
            metadata = body.get("metadata", before)
            for operation in operations:
                metadata = _operated(metadata, operation)
            return metadata

        metadata = await run_in_threadpool(lambda: engine.change_metadata(request.path_params["run"], change))
        return _Json({"metadata": metadata})

    async def reset_key(self, request: Request) -> Response:
        """`POST /api/v1/idempotencyKeys/{key}/reset`."""
        task = (await _json_object(request)).get("taskIdentifier")
        key = request.path_params["key"]
        if not isinstance(task, str):
            raise Refused(400, "taskIdentifier is the id of the key's task")
        if not await run_in_threadpool(lambda: engine.reset_key(task, key)):
            raise Refused(404, f"no run of {task} holds this key")
        return _Json({"id": key})

    # Batches

    async def batch(self, request: Request) -> Response:
        """`POST /api/v2/tasks/batch`, in one phase."""
        body = await _json_object(request, wire.MAX_BODY_BYTES)
        items = body.get("items")
        if not isinstance(items, list) or not 0 < len(items) <= 500:  # noqa: PLR2004 (the server's limit for this call)
            raise Refused(400, "items is a list of 1 to 500 runs")
        headers, key = dict(request.headers), request.headers.get(_KEY_HEADER)

        def enqueue() -> str:
            checked = [_item(item) for item in items]
            for task, payload, options in checked:  # so that the whole is refused, and not what comes after the first ones
                text, kind, _ = self._read(payload, options)
                engine.check(engine.Request(task, text, kind, options))
            batch_id, _ = engine.create_batch(len(items), {}, request_key=key)
            for index, (task, payload, options) in enumerate(checked):
                self._enqueue(task, payload, options, headers, None, batch_id=batch_id, batch_index=index)
            return batch_id

        return _Json({"id": await run_in_threadpool(enqueue), "runCount": len(items)}, 202)

    async def create_batch(self, request: Request) -> Response:
        """`POST /api/v3/batches`: the first of two phases; the trace of this call is that of every item."""
        body = await _json_object(request)
        count, key = body.get("runCount"), body.get("idempotencyKey")
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= wire.MAX_BATCH:
            raise Refused(400, f"runCount is 1 to {wire.MAX_BATCH}")
        if key is not None and (not isinstance(key, str) or len(key) > wire.MAX_KEY_CHARS):
            raise Refused(400, f"idempotencyKey is text of at most {wire.MAX_KEY_CHARS} characters")
        names = (semconv.HEADER_TRACEPARENT, semconv.HEADER_TRACESTATE, semconv.HEADER_BAGGAGE)
        carrier = {name: request.headers[name] for name in names if name in request.headers}
        call = request.headers.get(_KEY_HEADER)
        batch_id, cached = await run_in_threadpool(lambda: engine.create_batch(count, carrier, key=key, request_key=call))
        told: dict[str, Any] = {"id": batch_id, "runCount": count, "isCached": cached}
        if key is not None:
            told["idempotencyKey"] = key
        return _Json(told, 202)

    async def batch_items(self, request: Request) -> Response:
        """`POST /api/v3/batches/{batch}/items`: a run a line, in any order and as often as the caller likes."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() not in ("application/x-ndjson", "application/ndjson"):
            raise Refused(415, "the items are application/x-ndjson")
        batch_id = request.path_params["batch"]
        batch = await run_in_threadpool(lambda: engine.find_batch(batch_id))
        if batch is None:
            raise Refused(404, f"There is no batch {batch_id}.")
        headers = json.loads(batch.carrier)
        accepted = repeated = 0
        async for line in _lines(request):
            index, (task, payload, options) = _indexed(line, batch.run_count)
            enqueued = await run_in_threadpool(self._enqueue, task, payload, options, headers, None, batch_id=batch_id, batch_index=index)
            if enqueued.created or enqueued.cached:
                accepted += 1
            else:
                repeated += 1
        batch = await run_in_threadpool(lambda: engine.find_batch(batch_id))
        enqueued_count = 0 if batch is None else len(batch.runs)
        expected = 0 if batch is None else batch.run_count
        return _Json(
            {
                "id": batch_id,
                "itemsAccepted": accepted,
                "itemsDeduplicated": repeated,
                "sealed": enqueued_count >= expected,
                "enqueuedCount": enqueued_count,
                "expectedCount": expected,
            }
        )

    async def get_batch(self, request: Request) -> Response:
        """`GET /api/v2/batches/{batch}`."""
        batch_id = request.path_params["batch"]

        def find() -> dict[str, Any]:
            batch = engine.find_batch(batch_id)
            if batch is None:
                raise Refused(404, f"There is no batch {batch_id}.")
            runs = [run for run in map(engine.find, batch.runs) if run is not None]
            ended = [run for run in runs if engine.is_ended(run)]
            failed = [run for run in ended if run.state != "succeeded"]
            status = "PENDING" if len(runs) < batch.run_count else "PROCESSING"
            if len(ended) == batch.run_count:
                status = "COMPLETED"
            told = {
                "id": batch_id,
                "status": status,
                "createdAt": wire.iso(batch.created_unix_ns),
                "updatedAt": wire.iso(max([batch.created_unix_ns, *(run.updated_unix_ns for run in runs)])),
                "runCount": batch.run_count,
                "runs": list(batch.runs),
                "successfulRunCount": len(ended) - len(failed),
                "failedRunCount": len(failed),
                "errors": [],
                "processing": {"errors": []},
            }
            if status == "COMPLETED":
                told["completedAt"] = wire.iso(max(run.ended_unix_ns or 0 for run in ended))
            return told

        return _Json(await run_in_threadpool(find))

    # Large payloads

    async def create_packet(self, request: Request) -> Response:
        """`PUT /api/v2/packets/{name}`: where to upload a payload."""
        name = request.path_params["name"]
        return _Json({"presignedUrl": self._signed(request, name, "PUT"), "storagePath": name})

    async def find_packet(self, request: Request) -> Response:
        """`GET /api/v1/packets/{name}`: where to download it."""
        return _Json({"presignedUrl": self._signed(request, request.path_params["name"], "GET")})

    async def upload(self, request: Request) -> Response:
        """Take what is uploaded to a presigned URL."""
        name = self._checked(request, "PUT")
        content = (await _body(request, _MAX_UPLOAD_BYTES)).decode("utf-8", "strict")
        kind = request.headers.get("content-type", wire.JSON).partition(";")[0].strip()
        await run_in_threadpool(lambda: engine.commit(PutPacket(name, content, kind, time.time_ns())))
        return Response(status_code=200)

    async def download(self, request: Request) -> Response:
        """Give what was uploaded."""
        name = self._checked(request, "GET")
        found = await run_in_threadpool(lambda: engine.read(lambda tx: statements.find_packet(tx, name)))
        if found is None:
            raise Refused(404, "nothing was uploaded here")
        return Response(found[0], media_type=found[1])

    def _signed(self, request: Request, name: str, method: str) -> str:
        expires = int(time.time()) + _UPLOAD_SECONDS
        # The SDK's names have the task's id in them.
        url = request.url.replace(path=f"/packets/{quote(name, safe='')}", query="")
        return str(url.include_query_params(method=method, expires=expires, signature=self._signature(method, name, str(expires))))

    def _checked(self, request: Request, method: str) -> str:
        name, query = request.path_params["name"], request.query_params
        expires = query.get("expires", "")
        if not hmac.compare_digest(query.get("signature", "").encode("utf-8", "replace"), self._signature(method, name, expires).encode()):
            raise Refused(403, "the URL is not signed")
        if not expires.isdigit() or int(expires) < time.time():
            raise Refused(403, "the URL has expired")
        return str(name)

    def _signature(self, method: str, name: str, expires: str) -> str:
        return hmac.digest(self._key, f"{method}\n{name}\n{expires}".encode("utf-8", "replace"), hashlib.sha256).hex()


# --- Answers -----------------------------------------------------------------------------------------------------


def _answered(handler: Handler) -> Handler:
    """Make an answer of whatever a handler raises; what its code should not raise is logged."""

    async def answered(request: Request) -> Response:
        try:
            return await handler(request)
        except (Refused, TriggerError) as error:
            return _error(error.status or 422, str(error))
        except StoreRejected as error:
            return _error(400, f"this can't be stored: {error}")
        except StoreError as error:
            logger.warning("otelexec.trigger.store: %s", error)
            return _error(503, "the store can't be reached at the moment")
        except (ClientDisconnect, UnicodeError):
            return _error(400, "the body can't be read to its end as UTF-8")
        except Exception:
            logger.exception("otelexec.trigger.serve: %s %s", request.method, request.url.path)
            return _error(500, "Something went wrong; the server's log has it.")

    return answered


def _error(status: int, message: str) -> _Json:
    return _Json({"error": message}, status)


async def _health(_: Request) -> Response:
    return _Json({"status": "ok"})


async def _not_found(_: Request, __: Exception) -> Response:
    return _error(404, "Not found")


async def _not_allowed(_: Request, __: Exception) -> Response:
    return _error(405, "Method not allowed")


# --- Requests ----------------------------------------------------------------------------------------------------


async def _body(request: Request, limit: int) -> bytes:
    """Read a body; one that is too large is not read to its end."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise Refused(413, f"the body has more than {limit} bytes")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise Refused(413, f"the body has more than {limit} bytes")
    return bytes(body)


async def _json_object(request: Request, limit: int = 256 * 1024) -> dict[str, Any]:
    body = await _body(request, limit)
    if not body.strip():
        return {}
    return _object(body)


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = wire.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise Refused(400, "the body is a JSON object")
    return value


def _mapping(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise Refused(400, f"{name} is an object")
    return value


def _item(item: Any) -> tuple[str, Any, dict[str, Any]]:
    if not isinstance(item, Mapping) or not isinstance(item.get("task"), str) or not item["task"]:
        raise Refused(400, "every item names its task")
    return item["task"], item.get("payload"), dict(_mapping(item, "options"))


def _indexed(line: bytes, count: int) -> tuple[int, tuple[str, Any, dict[str, Any]]]:
    item = _object(line)
    index = item.get("index")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        raise Refused(400, f"the index of an item is 0 to {count - 1}, not {str(index)[:32]}")
    return index, _item(item)


async def _lines(request: Request) -> AsyncIterator[bytes]:
    """Give the lines of a body, one at a time: a whole batch may be larger than what a request may be."""
    rest = b""
    async for chunk in request.stream():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield line
        if len(rest) > _MAX_LINE_BYTES:
            raise Refused(413, f"an item has more than {wire.MAX_BODY_BYTES} bytes")
    if rest.strip():
        yield rest


async def _run(request: Request) -> RunRecord:
    run_id = request.path_params["run"]
    run = await run_in_threadpool(lambda: engine.find(run_id))
    if run is None:
        raise RunNotFound(f"There is no run {run_id}.", status=404)
    return run


def _place(run_id: str | None) -> int | None:
    if run_id is None:
        return None
    run = engine.find(run_id)
    if run is None:
        raise Refused(400, f"There is no run {run_id[:64]}.")
    return run.seq


def _number(text: str | None, default: int) -> int:
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise Refused(400, f"{text[:32]!r} is no whole number") from None


def _filter(query: Mapping[str, str]) -> Callable[[RunRecord], bool]:
    unknown = [name for name in query if name.startswith("filter[") and name not in _FILTERS]
    if unknown:
        raise Refused(400, f"the local engine does not filter by {unknown[0][:64]}: it would give runs that are not meant")
    statuses = {status for status in query.get("filter[status]", "").split(",") if status}
    unknown = sorted(statuses - wire.STATES.keys())
    if unknown:
        raise Refused(400, f"filter[status]: there is no status {', '.join(unknown)[:64]}")
    tags = {tag for tag in query.get("filter[tag]", "").split(",") if tag}
    test = query.get("filter[isTest]")
    if test not in (None, "true", "false"):
        raise Refused(400, "filter[isTest] is true or false")
    since = _milliseconds(query.get("filter[createdAt][from]"), 0) * 1_000_000
    until = _milliseconds(query.get("filter[createdAt][to]"), 2**42) * 1_000_000
    period = query.get("filter[createdAt][period]")
    if period is not None:
        since = max(since, time.time_ns() - int(wire.seconds_of(period) * 1e9))

    def wanted(run: RunRecord) -> bool:
        return (
            (not statuses or engine.status_of(run) in statuses)
            and (not tags or not tags.isdisjoint(json.loads(run.tags)))
            and (test is None or bool(json.loads(run.options).get("test", False)) is (test == "true"))
            and since <= run.created_unix_ns <= until
        )

    return wanted


_FILTERS: Final = frozenset(
    f"filter[{name}]"
    for name in ("status", "taskIdentifier", "tag", "batch", "isTest", "createdAt][from", "createdAt][to", "createdAt][period")
)


def _milliseconds(text: str | None, default: int) -> int:
    """Read a time since 1970: in milliseconds, or as a date."""
    try:
        return _number(text, default)
    except Refused:
        return wire.due_unix_ns(str(text), 0) // 1_000_000


def _operated(metadata: Any, operation: Any) -> Any:
    """Give metadata after one operation on it."""
    if not isinstance(operation, Mapping):
        raise Refused(400, "an operation is an object")
    kind, key, value = str(operation.get("type")), operation.get("key"), operation.get("value")
    if kind == "update" and isinstance(value, Mapping):
        return dict(value)
    known = dict(metadata) if isinstance(metadata, Mapping) else {}
    if kind not in _OPERATIONS or not isinstance(key, str):
        raise Refused(400, f"there is no operation {kind[:32]!r} of this form")
    name = key.removeprefix("$.")
    if kind == "delete":
        known.pop(name, None)
        return known
    return known | {name: _OPERATIONS[kind](known.get(name), value)}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _sum(before: Any, value: Any) -> Any:
    if not isinstance(value, int | float):
        raise Refused(400, "an increment is a number")
    try:
        return (before if isinstance(before, int | float) else 0) + value
    except OverflowError:  # of a fraction and a whole number that is larger than any fraction
        raise Refused(400, "the sum is too large") from None


_OPERATIONS: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "set": lambda _, value: value,
    "append": lambda before, value: [*_list(before), value],
    "remove": lambda before, value: [each for each in _list(before) if each != value],
    "increment": _sum,
    "delete": lambda _, __: None,
}
