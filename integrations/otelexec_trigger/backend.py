"""
What every Trigger-style backend can be asked, synchronously and asynchronously.

A backend writes its operations once (`Operations`); `TriggerBackend` and `AsyncTriggerBackend` take their steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Self

from otelexec_trigger.calls import Steps, drive, drive_async
from otelexec_trigger.clients import AsyncClient, Client
from otelexec_trigger.runs import InvalidRequest, Run

Duration = str | float | timedelta
"""Text such as `2h30m`, seconds, or a timedelta."""
Delay = Duration | datetime
"""A duration from now, or a date; as text, one in ISO 8601."""


@dataclass(frozen=True, slots=True)
class Trigger:
    """
    What one call of `trigger` asks for; see `TriggerBackend.trigger`.

    Attributes:
        task: The task's id.
        payload: What it is called with; None for nothing.
        key: Names the work, so that it is asked for once; None: this call names it.
        tags: The run's tags.
        delay: How long the run waits before it may begin, or until when; None: not at all.
        ttl: How long it may wait to begin after that; None: as long as the backend lets it.
        metadata: Anything that JSON can hold; None for none.
        queue: The queue's name; None: the task's own.
        concurrency_key: Runs of a queue with the same one run one after the other; None: no such limit.
        max_attempts: How many attempts it has; None: as many as the backend gives it.
    """

    task: str
    payload: Any = None
    key: str | None = None
    tags: str | Sequence[str] | None = None
    delay: Delay | None = None
    ttl: Duration | None = None
    metadata: Any = None
    queue: str | None = None
    concurrency_key: str | None = None
    max_attempts: int | None = None


def _wanted(items: Sequence[Mapping[str, Any]]) -> list[Trigger]:
    try:
        return [Trigger(**item) for item in items]
    except TypeError as error:
        raise InvalidRequest(f"an item is a dict with `task` and the other arguments of trigger(): {error}") from None


class Operations(ABC):
    """What a backend does, as steps."""

    @abstractmethod
    def trigger(self, wanted: Trigger) -> Steps[str]:
        """Ask for a run; gives its id."""

    @abstractmethod
    def batch_trigger(self, wanted: Sequence[Trigger]) -> Steps[str]:
        """Ask for several runs; gives the batch's id."""

    @abstractmethod
    def get(self, run_id: str) -> Steps[Run]:
        """Give a run."""

    @abstractmethod
    def cancel(self, run_id: str) -> Steps[bool]:
        """Cancel a run; gives False when there is none."""

    @abstractmethod
    def page(self, cursor: str | None, tasks: Sequence[str]) -> Steps[tuple[list[Run], str | None]]:
        """Give a page of runs, and the cursor of the next one."""

    @abstractmethod
    def replay(self, run_id: str) -> Steps[str]:
        """Ask for the same once more; gives the new run's id."""

    @abstractmethod
    def reschedule(self, run_id: str, delay: Delay) -> Steps[Run]:
        """Give a delayed run another time."""

    @abstractmethod
    def add_tags(self, run_id: str, tags: str | Sequence[str]) -> Steps[None]:
        """Add tags to a run."""


class TriggerBackend:
    """
    A Trigger-style backend.

    What its methods name is not all that they raise: any may raise `BackendError` where a server refused or did not answer, and with
    `LocalBackend` a `StoreError` where the store did not.

    Args:
        operations: What it does.
        client: Sends its requests, and is closed with it; None where there are none.
    """

    def __init__(self, operations: Operations, client: Client | None = None) -> None:
        self._operations = operations
        self._client = client

    def trigger(
        self,
        task: str,
        payload: Any = None,
        *,
        key: str | None = None,
        tags: str | Sequence[str] | None = None,
        delay: Delay | None = None,
        ttl: Duration | None = None,
        metadata: Any = None,
        queue: str | None = None,
        concurrency_key: str | None = None,
        max_attempts: int | None = None,
    ) -> str:
        """
        Ask for a run of a task.

        The message has a PRODUCER span and a `queued` record, and an object as payload carries the context in its reserved
        key `_otelexec`.

        Args:
            task: The task's id.
            payload: What it is called with: text as it is, None for nothing, anything else as JSON.
            key: Names the work, for 30 days: a call with the key of a run that waits, runs, has succeeded or was cancelled gives that run.
                None: the execution's id is the key, so that only a repetition of this very message finds its run.
            tags: One tag, or up to ten, of up to 128 characters each.
            delay: How long the run waits before it may begin, or until when; None: not at all.
            ttl: How long after that it may wait to begin before it expires; None: as the backend has it.
            metadata: Anything that JSON can hold, up to 256 KiB; None for none.
            queue: The queue's name; None: the task's own.
            concurrency_key: Runs of a queue with the same one don't run at the same time; None: no such limit.
            max_attempts: How many attempts it has; None: as the backend has it, three in the local one.

        Returns:
            The run's id.

        Raises:
            InvalidRequest: Something is over a limit; nothing was sent.
            EnqueueError: The backend refused, or did not answer; `.acceptance` says whether it may have the run.
        """
        wanted = Trigger(task, payload, key, tags, delay, ttl, metadata, queue, concurrency_key, max_attempts)
        return drive(self._operations.trigger(wanted), self._client)

    def batch_trigger(self, items: Sequence[Mapping[str, Any]]) -> str:
        """
        Ask for several runs in one call.

        Args:
            items: For each run the arguments of `trigger` by name; `task` is needed. Each is an execution of its own.

        Returns:
            The batch's id; of the first one where the backend's limit made several of them.

        Raises:
            InvalidRequest: An item can't be sent; none was.
            EnqueueError: As for `trigger`, for all of them.
        """
        return drive(self._operations.batch_trigger(_wanted(items)), self._client)

    def get(self, run_id: str) -> Run:
        """
        Give a run as it is now.

        Raises:
            RunNotFound: There is none.
        """
        return drive(self._operations.get(run_id), self._client)

    def cancel(self, run_id: str) -> bool:
        """
        Cancel a run. The wish is durable before the backend is asked; the record is closed once that has agreed.

        Returns:
            False when there is no such run. One that has ended stays as it is.

        Raises:
            BackendError: The backend refused.
        """
        return drive(self._operations.cancel(run_id), self._client)

    def list(self, *, tasks: Sequence[str] = ()) -> Iterator[Run]:
        """
        Give all runs, the newest first; pages are fetched as they are needed.

        Args:
            tasks: Only runs of these; empty: of any.
        """
        cursor: str | None = None
        seen: set[str | None] = {None}  # a server that gives one again would give its pages for ever
        while True:
            runs, cursor = drive(self._operations.page(cursor, tasks), self._client)
            yield from runs
            if cursor in seen:
                return
            seen.add(cursor)

    def replay(self, run_id: str) -> str:
        """
        Ask for the same once more, as a run and an execution of its own.

        Returns:
            The new run's id.

        Raises:
            RunNotFound: There is no such run.
        """
        return drive(self._operations.replay(run_id), self._client)

    def reschedule(self, run_id: str, delay: Delay) -> Run:
        """
        Give a run that is delayed another time.

        Args:
            run_id: The run.
            delay: How long from now, or until when.

        Raises:
            RunNotFound: There is no such run.
            BackendError: It is not delayed any more.
        """
        return drive(self._operations.reschedule(run_id, delay), self._client)

    def add_tags(self, run_id: str, tags: str | Sequence[str]) -> None:
        """
        Add tags to a run; all of them or none.

        Raises:
            RunNotFound: There is no such run.
            InvalidRequest: One is too long, or there would be more than ten.
        """
        drive(self._operations.add_tags(run_id, tags), self._client)

    def close(self) -> None:
        """Close connections."""
        if self._client is not None:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncTriggerBackend:
    """
    The same as `TriggerBackend`, with `await`.

    Args:
        operations: What it does.
        client: Sends its requests, and is closed with it; None where there are none.
    """

    def __init__(self, operations: Operations, client: AsyncClient | None = None) -> None:
        self._operations = operations
        self._client = client

    async def trigger(
        self,
        task: str,
        payload: Any = None,
        *,
        key: str | None = None,
        tags: str | Sequence[str] | None = None,
        delay: Delay | None = None,
        ttl: Duration | None = None,
        metadata: Any = None,
        queue: str | None = None,
        concurrency_key: str | None = None,
        max_attempts: int | None = None,
    ) -> str:
        """Ask for a run of a task; as `TriggerBackend.trigger`."""
        wanted = Trigger(task, payload, key, tags, delay, ttl, metadata, queue, concurrency_key, max_attempts)
        return await drive_async(self._operations.trigger(wanted), self._client)

    async def batch_trigger(self, items: Sequence[Mapping[str, Any]]) -> str:
        """Ask for several runs in one call; as `TriggerBackend.batch_trigger`."""
        return await drive_async(self._operations.batch_trigger(_wanted(items)), self._client)

    async def get(self, run_id: str) -> Run:
        """Give a run as it is now; as `TriggerBackend.get`."""
        return await drive_async(self._operations.get(run_id), self._client)

    async def cancel(self, run_id: str) -> bool:
        """Cancel a run; as `TriggerBackend.cancel`."""
        return await drive_async(self._operations.cancel(run_id), self._client)

    async def list(self, *, tasks: Sequence[str] = ()) -> AsyncIterator[Run]:
        """Give all runs, the newest first; as `TriggerBackend.list`."""
        cursor: str | None = None
        seen: set[str | None] = {None}
        while True:
            runs, cursor = await drive_async(self._operations.page(cursor, tasks), self._client)
            for run in runs:
                yield run
            if cursor in seen:
                return
            seen.add(cursor)

    async def replay(self, run_id: str) -> str:
        """Ask for the same once more; as `TriggerBackend.replay`."""
        return await drive_async(self._operations.replay(run_id), self._client)

    async def reschedule(self, run_id: str, delay: Delay) -> Run:
        """Give a run that is delayed another time; as `TriggerBackend.reschedule`."""
        return await drive_async(self._operations.reschedule(run_id, delay), self._client)

    async def add_tags(self, run_id: str, tags: str | Sequence[str]) -> None:
        """Add tags to a run; as `TriggerBackend.add_tags`."""
        await drive_async(self._operations.add_tags(run_id, tags), self._client)

    async def close(self) -> None:
        """Close connections."""
        if self._client is not None:
            await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
