"""Large payloads: where to upload them and to download them, by URLs that are signed."""

from __future__ import annotations

import hashlib
import hmac
import time
from typing import Final
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from otelexec.store import run_queries
from otelexec.store.runs import PutPacket
from otelexec_trigger import engine, wire
from otelexec_trigger.asking import storable
from otelexec_trigger.parsing import Refused, read_body

_URL_SECONDS: Final = 3600
_MAX_UPLOAD_BYTES: Final = 64 * 1024 * 1024


class Packets:
    """
    The handlers of large payloads.

    Args:
        key: What the URLs are signed with.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    async def create(self, request: Request) -> Response:
        """`PUT /api/v2/packets/{name}`: where to upload a payload."""
        name = request.path_params["name"]
        return JSONResponse({"presignedUrl": self._signed(request, name, "PUT"), "storagePath": name})

    async def find(self, request: Request) -> Response:
        """`GET /api/v1/packets/{name}`: where to download it."""
        return JSONResponse({"presignedUrl": self._signed(request, request.path_params["name"], "GET")})

    async def upload(self, request: Request) -> Response:
        """Take what is uploaded to a presigned URL."""
        name = self._checked(request, "PUT")
        content = (await read_body(request, _MAX_UPLOAD_BYTES)).decode("utf-8", "strict")
        content, kind = storable(content, request.headers.get("content-type", wire.JSON).partition(";")[0].strip())
        await run_in_threadpool(lambda: engine.commit(PutPacket(name, content, kind)))
        return Response(status_code=200)

    async def download(self, request: Request) -> Response:
        """Give what was uploaded."""
        name = self._checked(request, "GET")
        found = await run_in_threadpool(lambda: engine.read(lambda tx: run_queries.find_packet(tx, name)))
        if found is None:
            raise Refused(404, "nothing was uploaded here")
        return Response(found[0], media_type=found[1])

    def _signed(self, request: Request, name: str, method: str) -> str:
        expires = int(time.time()) + _URL_SECONDS
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
