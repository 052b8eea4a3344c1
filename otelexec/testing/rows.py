"""Writes with few arguments, for tests of stores; encoded spans are any bytes to a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from otelexec.store.base import Store
from otelexec.store.pruning import deletions
from otelexec.store.records import ExecutionRecord
from otelexec.store.rows import CANCELLED, LOST, SUCCEEDED, ExecutionRow, Frozen, Outcome, ProcessRow, SpanRow
from otelexec.store.upkeep import ClaimOutbox, OutboxRow, Prune, Pruned, ReleaseClaims
from otelexec.store.writes import (
    NO_SPANS,
    AddSpans,
    CloseAttempt,
    Closed,
    CloseLost,
    CloseOuter,
    Heartbeat,
    OpenAttempt,
    Opened,
    RecordObserved,
    Write,
)

OpenStore = Callable[[], Store]
"""Gives one more Store on the same database."""

SECOND = 1_000_000_000


def execution(execution_id: str = "e", name: str = "job", *, parent: str | None = None) -> ExecutionRow:
    """Give an execution."""
    return ExecutionRow(execution_id, name, "request", "direct", '{"tenant":"a"}', parent)


def process(process_id: str = "p") -> ProcessRow:
    """Give a process."""
    return ProcessRow(process_id, "host", "boot", "pid:[1]", 42, 4242, 30.0, b"resource", b"scope")


def span(name: str) -> SpanRow:
    """Give a span with an id made of its name."""
    return SpanRow("0" * 31 + "1", name.encode().hex().rjust(16, "0")[-16:], b"start of " + name.encode())


def opening(
    token: str = "t",
    execution_id: str = "e",
    *,
    started: int = 1,
    process_id: str = "p",
    outer_token: str | None = None,
    takes_over: bool = False,
) -> OpenAttempt:
    """Give the open of an attempt, with a span."""
    return OpenAttempt(
        token,
        execution(execution_id),
        process_id,
        started,
        span=span(token),
        outer_token=outer_token,
        outer=None if outer_token is None else span("o" + outer_token),
        outer_started_unix_ns=None if outer_token is None else started,
        takes_over=takes_over,
    )


def frozen(
    state: str, request: bytes, *, ended: int = 10, retrying: bool = False, sticky: bool = False, snapshot: str | None = None
) -> Frozen:
    """Give an outcome with the span that says the same."""
    error = None if state == SUCCEEDED else f"why {state}"
    return Frozen(Outcome(state, ended, error_type=error, retrying=retrying, sticky=sticky, snapshot=snapshot), request)


def closing(
    opened: OpenAttempt,
    state: str = SUCCEEDED,
    *,
    nonce: str | None = None,
    ended: int = 10,
    retrying: bool = False,
    sticky: bool = False,
    snapshot: str | None = None,
    spans: AddSpans = NO_SPANS,
    observed: RecordObserved | None = None,
    if_asked: bool = False,
) -> CloseAttempt:
    """
    Give the close of an attempt; its span is the bytes `STATE TOKEN`.

    `if_asked` makes it `cancelled` where the store holds a request.
    """
    cancelled = frozen(CANCELLED, f"{CANCELLED} {opened.token}".encode(), ended=ended, sticky=True)
    request = f"{state} {opened.token}".encode()
    return CloseAttempt(
        opened,
        None,
        frozen(state, request, ended=ended, retrying=retrying, sticky=sticky, snapshot=snapshot),
        nonce or f"nonce {opened.token} {state}",
        if_cancelled=cancelled if if_asked else None,
        spans=spans,
        observed=observed,
    )


def losing(opened: OpenAttempt, *, ended: int = 10) -> CloseLost:
    """Give what a reconciler writes about it."""
    outcome = Outcome(LOST, ended, "reconciler", "killed", "killed", "died", reconciled_unix_ns=ended + 1)
    return CloseLost(opened.execution.execution_id, opened.token, Frozen(outcome, f"lost {opened.token}".encode()))


def observing(opened: OpenAttempt, state: str = SUCCEEDED, *, ended: int = 12) -> RecordObserved:
    """Give what a lost attempt observed itself."""
    return RecordObserved(opened, frozen(state, f"observed {opened.token}".encode(), ended=ended), "00000000000000ff")


def outer_closing(outer_token: str, execution_id: str = "e", state: str = SUCCEEDED, *, retrying: bool = False) -> CloseOuter:
    """Give the end of the executor around a core."""
    return CloseOuter(execution_id, outer_token, frozen(state, f"outer {state} {outer_token}".encode()), retrying=retrying)


def write(store: Store, *writes: Write) -> list[object]:
    """Commit writes in one transaction."""
    return store.commit(writes, durable=False, timeout_seconds=5.0)


def opened(store: Store, attempt: OpenAttempt) -> Opened:
    """Open an attempt and give the answer."""
    (answer,) = write(store, attempt)
    assert isinstance(answer, Opened)
    return answer


def closed(store: Store, close: CloseAttempt) -> Closed:
    """Close an attempt and give the answer."""
    (answer,) = write(store, close)
    assert isinstance(answer, Closed)
    return answer


def beat(store: Store, process_id: str = "p", *, ended: bool = False) -> None:
    """Write a sign of life."""
    write(store, Heartbeat(process(process_id), ended))


def record(store: Store, execution_id: str = "e") -> ExecutionRecord:
    """Give an execution that must be there."""
    found = store.execution(execution_id)
    assert found is not None
    return found


def claim(store: Store, owner: str = "relay", *, max_rows: int = 10_000, max_bytes: int = 2**40, lease: float = 60.0) -> list[OutboxRow]:
    """Claim rows of the outbox."""
    (rows,) = write(store, ClaimOutbox(owner, lease, max_rows, max_bytes))
    assert isinstance(rows, list)
    return rows


def outbox(store: Store) -> list[bytes]:
    """Give what waits in the outbox and nobody has claimed, the oldest first, and leave it there."""
    rows = claim(store, "contract reader")
    write(store, ReleaseClaims(["contract reader"]))
    return [row.request for row in rows]


def pruned(store: Store, before_unix_ns: int) -> int:
    """Delete what is old, and give how many executions that were."""

    def step(prune: Prune) -> Pruned:
        (done,) = write(store, prune)
        assert isinstance(done, Pruned)
        return done

    return sum(count for table, count in deletions(step, before_unix_ns) if table == "execution")


def states(store: Store, execution_id: str = "e") -> tuple[str, Sequence[str]]:
    """Give the state of an execution and those of its attempts."""
    found = record(store, execution_id)
    return found.state, [attempt.state for attempt in found.attempts]
