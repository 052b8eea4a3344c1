"""Reading a record in Python: what `otelexec show` does for people, for programs."""

from __future__ import annotations

from typing import Any

from otelexec import records
from otelexec import runtime as _runtime
from otelexec.errors import CorrelationError
from otelexec.ids import normalize_id


def find_execution(execution_id: str) -> dict[str, Any] | None:
    """
    Give the record of an execution as it stands in the store, in any process on the same store.

    Waits for one reading of the store; from a coroutine, call it in `asyncio.to_thread`.

    Args:
        execution_id: Which.

    Returns:
        What `otelexec list --json` prints: `state`, `name`, `request_id`, `correlation`, `attempts` with their `progress` and
        `output`, and so on; times are nanoseconds since 1970. None when nobody has heard of it yet, when its record still waits
        in a spool, and without a store.

    Raises:
        CorrelationError: This is no execution id.
        StoreError: The store can't be read at the moment.
    """
    given: object = execution_id
    if not isinstance(given, str) or not given:
        raise CorrelationError(f"find_execution() takes an execution id, not {execution_id!r}")
    execution_id, _ = normalize_id(execution_id)
    store = _runtime.get().store
    record = None if store is None else store.execution(execution_id)
    return None if record is None else records.execution_json(record)
