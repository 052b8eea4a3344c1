"""
The local engine over the Trigger.dev wire contract, so that its SDK, and our client, can trigger Python tasks with no account.

Every answer that says that something is done is given after the commit that did it. All state is in the store: any number
of servers may serve one, and one that is killed is simply started again.
"""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from otelexec import semconv
from otelexec.errors import SettingsError, StoreError, StoreRejected
from otelexec.store import run_queries
from otelexec.store.rows import SUCCEEDED
from otelexec.store.runs import RunRecord
from otelexec_trigger import engine, wire
from otelexec_trigger.asking import RunRequest
from otelexec_trigger.packets import Packets
from otelexec_trigger.parsing import Refused, indexed_item, item_of, mapping, number, operated, read_lines, read_object, run_filter
from otelexec_trigger.rendering import as_json
from otelexec_trigger.runs import InvalidRequest, RunNotFound, TriggerError

logger = logging.getLogger("otelexec.trigger")

_PAGE: Final = 20
_MAX_PAGE: Final = 100
_KEY_HEADER: Final = "x-trigger-request-idempotency-key"

Handler = Callable[[Request], Awaitable[Response]]


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
        packets = Packets(self._key)
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
            ("PUT", "/api/v2/packets/{name:path}", packets.create),
            ("PUT", "/api/v1/packets/{name:path}", packets.create),
            ("GET", "/api/v1/packets/{name:path}", packets.find),
        ]
        guarded = [Route(path, self._guarded(handler), methods=[method]) for method, path, handler in routes]
        # What is signed needs no key: that is what a presigned URL is for.
        open_ = [
            Route("/packets/{name:path}", _answered(packets.upload), methods=["PUT"]),
            Route("/packets/{name:path}", _answered(packets.download), methods=["GET"]),
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
        body = await read_object(request, wire.MAX_BODY_BYTES)
        options = dict(mapping(body, "options"))
        for header, name in (("idempotency-key", "idempotencyKey"), ("idempotency-key-ttl", "idempotencyKeyTTL")):
            if header in request.headers:
                options[name] = request.headers[header]
        headers, key = dict(request.headers), request.headers.get(_KEY_HEADER)
        enqueued = await run_in_threadpool(lambda: self._enqueue(task, body.get("payload"), options, headers, key))
        return _Json({"id": enqueued.run_id, "isCached": enqueued.cached})

    def _enqueue(self, task: str, payload: Any, options: dict[str, Any], headers: Mapping[str, str], key: str | None, **batch: Any) -> Any:
        text, kind, decoded = self._read(payload, options)
        correlation, context = engine.origin(headers, decoded)
        return engine.enqueue(RunRequest(task, text, kind, options, key, **batch), correlation, context)

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
        found = engine.read(lambda tx: run_queries.find_packet(tx, name))
        if found is None:
            raise Refused(400, f"nothing was uploaded as {name[:128]!r}")
        return found

    async def get_run(self, request: Request) -> Response:
        """`GET /api/v3/runs/{run}`."""
        return _Json(as_json(await _run(request)))

    async def list_runs(self, request: Request) -> Response:
        """`GET /api/v1/runs`, in pages by run id."""
        query = request.query_params
        size = number(query.get("page[size]"), _PAGE)
        if not 1 <= size <= _MAX_PAGE:
            raise Refused(400, f"page[size] is 1 to {_MAX_PAGE}")
        wanted = run_filter(query)
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
        delay = (await read_object(request)).get("delay")
        if not isinstance(delay, str):
            raise Refused(400, "delay is a duration such as '2h30m' or a date in ISO 8601")
        return _Json(as_json(await run_in_threadpool(lambda: engine.reschedule(request.path_params["run"], delay))))

    async def result(self, request: Request) -> Response:
        """`GET /api/v1/runs/{run}/result`."""
        run = await _run(request)
        if not engine.is_ended(run):
            raise Refused(404, f"{run.run_id} has not ended")
        told: dict[str, Any] = {"ok": run.state == SUCCEEDED, "id": run.run_id, "taskIdentifier": run.task}
        if told["ok"]:
            told |= {"output": run.result, "outputType": wire.JSON}
        else:
            error = engine.error_of(run) or {"name": engine.status_of(run), "message": engine.status_of(run)}
            told["error"] = {"type": "BUILT_IN_ERROR", "name": error["name"], "message": error["message"], "stackTrace": ""}
        return _Json(told)

    async def add_tags(self, request: Request) -> Response:
        """`POST /api/v1/runs/{run}/tags`."""
        tags = (await read_object(request)).get("tags")
        if not isinstance(tags, str | list):
            raise Refused(400, "tags is a string or a list of strings")
        await run_in_threadpool(lambda: engine.add_tags(request.path_params["run"], tags))
        return _Json({"message": f"Successfully set {1 if isinstance(tags, str) else len(tags)} new tags."})

    async def get_metadata(self, request: Request) -> Response:
        """`GET /api/v1/runs/{run}/metadata`."""
        return _Json({"metadata": (await _run(request)).metadata, "metadataType": wire.JSON})

    async def put_metadata(self, request: Request) -> Response:
        """`PUT /api/v1/runs/{run}/metadata`."""
        body = await read_object(request, 2 * 1024 * 1024)
        if body.get("parentOperations") or body.get("rootOperations"):
            raise Refused(400, "runs of the local engine have neither a parent nor a root")
        operations = body.get("operations") or []
        if not isinstance(operations, list):
            raise Refused(400, "operations is a list")

        def change(before: Any) -> Any:
            metadata = body.get("metadata", before)
            for operation in operations:
                metadata = operated(metadata, operation)
            return metadata

        metadata = await run_in_threadpool(lambda: engine.change_metadata(request.path_params["run"], change))
        return _Json({"metadata": metadata})

    async def reset_key(self, request: Request) -> Response:
        """`POST /api/v1/idempotencyKeys/{key}/reset`."""
        task = (await read_object(request)).get("taskIdentifier")
        key = request.path_params["key"]
        if not isinstance(task, str):
            raise Refused(400, "taskIdentifier is the id of the key's task")
        if not await run_in_threadpool(lambda: engine.reset_key(task, key)):
            raise Refused(404, f"no run of {task} holds this key")
        return _Json({"id": key})

    # Batches

    async def batch(self, request: Request) -> Response:
        """`POST /api/v2/tasks/batch`, in one phase."""
        body = await read_object(request, wire.MAX_BODY_BYTES)
        items = body.get("items")
        if not isinstance(items, list) or not 0 < len(items) <= 500:  # noqa: PLR2004 (the server's limit for this call)
            raise Refused(400, "items is a list of 1 to 500 runs")
        headers, key = dict(request.headers), request.headers.get(_KEY_HEADER)

        def enqueue() -> str:
            checked = [item_of(item) for item in items]
            for task, payload, options in checked:  # so that the whole is refused, and not what comes after the first ones
                text, kind, _ = self._read(payload, options)
                engine.check(RunRequest(task, text, kind, options))
            batch_id, _ = engine.create_batch(len(items), {}, request_key=key)
            for index, (task, payload, options) in enumerate(checked):
                self._enqueue(task, payload, options, headers, None, batch_id=batch_id, batch_index=index)
            return batch_id

        return _Json({"id": await run_in_threadpool(enqueue), "runCount": len(items)}, 202)

    async def create_batch(self, request: Request) -> Response:
        """`POST /api/v3/batches`: the first of two phases; the trace of this call is that of every item."""
        body = await read_object(request)
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
        async for line in read_lines(request):
            index, (task, payload, options) = indexed_item(line, batch.run_count)
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
            failed = [run for run in ended if run.state != SUCCEEDED]
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


# --- Answers -----------------------------------------------------------------------------------------------------


def _answered(handler: Handler) -> Handler:
    """Make an answer of whatever a handler raises; what its code should not raise is logged."""

    async def answered(request: Request) -> Response:
        try:
            return await handler(request)
        except (Refused, TriggerError) as error:
            return _error(error.status or 422, str(error))
        except StoreRejected as error:
            return _error(400, f"this can't be stored: {error.reason}")
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


# --- Runs that requests name --------------------------------------------------------------------------------------


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
