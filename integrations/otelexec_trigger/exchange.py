"""Calls of a Trigger.dev server: what is sent again and when, and what is known of a call that failed."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, Final

import httpx

from otelexec.endings import raised_by_signal_handler
from otelexec_trigger import wire
from otelexec_trigger.calls import Http, Steps, Wait
from otelexec_trigger.clients import NotSent
from otelexec_trigger.runs import BackendError, RunNotFound, TriggerError

LAST_WAIT_SECONDS: Final = 30.0
_FACTOR: Final = 1.6
_RETRIED: Final = frozenset({408, 409, 429})


class Attempts:
    """
    What the attempts of one call tell.

    Attributes:
        unknown: Whether any of them may have been accepted. So it is from before one is sent until it is known to have been refused:
            whatever comes in between, be it out of a signal handler, says nothing of what the backend has.

    Args:
        whole: Whether a refusal is of all that was asked for.
    """

    def __init__(self, *, whole: bool = True) -> None:
        self.unknown = False
        self._before = False
        self._whole = whole

    def sent(self) -> None:
        """Say that one is on its way."""
        self._before, self.unknown = self.unknown, True

    def failed(self, error: Exception) -> None:
        """Say that one got no answer."""
        # Nothing was sent where no connection was made.
        nothing = httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout | httpx.UnsupportedProtocol | httpx.InvalidURL
        if isinstance(error, nothing | NotSent):
            self.unknown = self._before

    def answered(self, status: int) -> None:
        """Say what one was answered."""
        if self._whole and 300 <= status < 500 and status not in _RETRIED:  # noqa: PLR2004 (HTTP's redirections and client errors)
            self.unknown = self._before


class Exchange:
    """
    One server and its key.

    Args:
        url: Where it is.
        key: What it is shown.
        max_attempts: How often a request is sent at most.
        first_wait_seconds: How long to wait before the second attempt; each further one waits 1.6 times as long, up to 30 s.
    """

    def __init__(self, url: str, key: str, *, max_attempts: int, first_wait_seconds: float) -> None:
        self.url = url
        self._key = key
        self._max_attempts = max_attempts
        self._first_wait = first_wait_seconds

    def ask(
        self, method: str, path: str, content: bytes | None, attempts: Attempts, headers: Mapping[str, str] | None = None
    ) -> Steps[dict[str, Any]]:
        """
        Make one logical call, in as many attempts as it takes.

        Args:
            method: Of HTTP.
            path: Behind the server's URL.
            content: The body; None without one.
            attempts: Learns what becomes of them.
            headers: Beside those of every call.

        Returns:
            The answer's JSON object.

        Raises:
            TriggerError: It was refused, or not answered.
        """
        response = yield from self.send(
            Http(
                method,
                self.url + path,
                {
                    "authorization": f"Bearer {self._key}",
                    "content-type": "application/json",
                    "x-trigger-api-version": wire.API_VERSION,
                    "x-trigger-source": "sdk",
                    "x-trigger-request-idempotency-key": str(uuid.uuid4()),
                    **(headers or {}),
                },
                content,
            ),
            attempts,
        )
        if response.status_code >= 300:  # noqa: PLR2004 (anything but a success)
            raise refusal(response, f"{method} {self.url}{path.partition('?')[0]}")
        return object_of(response) or {}

    def send(self, request: Http, attempts: Attempts) -> Steps[httpx.Response]:
        """Send a request until it is answered with something that another attempt would not change; gives the answer."""
        wait = self._first_wait
        for left in reversed(range(self._max_attempts)):
            pause = wait
            attempts.sent()
            try:
                response: httpx.Response = yield request
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                attempts.failed(error)
                if not left:
                    raise self._unanswered(request, error) from error
            except NotSent as error:
                attempts.failed(error)
                raise
            except RuntimeError as error:
                # A client or an event loop that was closed in the meantime says it so.
                if type(error) is not RuntimeError or raised_by_signal_handler(error):
                    raise
                raise self._unanswered(request, error) from error
            else:
                attempts.answered(response.status_code)
                if not left or not is_retried(response):
                    return response
                pause = max(wait, wire.wait_seconds(response.status_code, response.headers))
            yield Wait(min(pause, LAST_WAIT_SECONDS))
            wait = min(wait * _FACTOR, LAST_WAIT_SECONDS)
        raise AssertionError("max_attempts is 1 or more")

    def _unanswered(self, request: Http, error: Exception) -> BackendError:
        return BackendError(f"{request.method} {self.url}: {type(error).__name__} {error}".rstrip(), retryable=True)


def is_retried(response: httpx.Response) -> bool:
    """Tell whether a request with this answer is worth another try."""
    wanted = response.headers.get("x-should-retry")
    if wanted in ("true", "false"):
        return bool(wanted == "true") and response.status_code >= 400  # noqa: PLR2004 (an error of any kind)
    return response.status_code in _RETRIED or response.status_code >= 500  # noqa: PLR2004 (HTTP's server errors)


def refusal(response: httpx.Response, what: str) -> TriggerError:
    """Make the error of an answer that is no success; `what` says to what it was."""
    body = object_of(response) or {}
    said = body.get("error") or body.get("title") or body.get("detail")
    text = f"{what} was answered {response.status_code}" + (f": {str(said)[:500]}" if said else "")
    kind = RunNotFound if response.status_code == 404 and "/runs/" in what else BackendError  # noqa: PLR2004 (HTTP)
    return kind(text, status=response.status_code, retryable=is_retried(response))


def object_of(response: httpx.Response) -> dict[str, Any] | None:
    """Give the JSON object of an answer; None where it is none."""
    try:
        found = response.json()
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
