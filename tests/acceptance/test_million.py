"""Memory stays flat however many executions a process has run: what is kept of one is gone when it has ended."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

import otelexec
from otelexec import runtime
from otelexec.store.upkeep import ClaimOutbox, SettleOutbox
from otelexec.testing.rows import pruned

MAX_GROWTH_BYTES = 8 * 1024 * 1024


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@otelexec.execution("job")
def job(number: int) -> int:
    with trace.get_tracer("app").start_as_current_span("step"):
        otelexec.current_execution().set_output(number)
    if number % 50 == 0:
        raise ValueError(number)
    return number


@otelexec.execution("stream")
def stream() -> object:
    yield 1
    yield 2


@otelexec.execution("coroutine")
async def coroutine() -> None:
    await asyncio.sleep(0)


def work(count: int) -> None:
    """Run a mixture: mostly plain calls, some that fail, some generators that are dropped, some coroutines."""
    loop = asyncio.new_event_loop()
    for number in range(count):
        with otelexec.correlate(source="schedule", schedule_id="s"), contextlib.suppress(ValueError):
            job(number)
        if number % 100 == 0:
            next(stream())  # type: ignore[call-overload]
            loop.run_until_complete(coroutine())
    loop.close()


def prune() -> None:
    """Do what the relay and `prune` do, so that the file does not grow either."""
    made = runtime.get()
    store = made.store
    assert store is not None
    while True:
        (rows,) = made.journal.commit_all([ClaimOutbox("test", 60, max_rows=5_000)])
        assert isinstance(rows, list)
        if not rows:
            break
        made.journal.commit_all([SettleOutbox("test", delivered=[row.id for row in rows])])
    assert pruned(store, 2**62)


def grown(rounds: int, each: int) -> int:
    """Give by how many bytes this process grows over `rounds`, counted after two to warm up."""
    with_store = runtime.get().store is not None
    before = 0
    for number in range(rounds + 2):
        if number == 2:
            before = resident_bytes()
        work(each)
        if with_store:
            prune()
    assert runtime.get().executions == {}
    return resident_bytes() - before


def test_memory_is_flat_without_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour 21, in short."""
    monkeypatch.setenv("OTELEXEC_STORE", "none")
    otelexec.configure(tracer_provider=TracerProvider(shutdown_on_exit=False))  # sampled, and sent nowhere
    assert grown(4, 2_000) < MAX_GROWTH_BYTES


def test_memory_is_flat_with_a_store() -> None:
    """Behaviour 21, in short: records and spans go through the store and are pruned."""
    assert grown(4, 400) < MAX_GROWTH_BYTES


@pytest.mark.longest
@pytest.mark.timeout(3600)
def test_memory_is_flat_over_a_million_executions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Must-hold row 7 and behaviour 21: the in-memory parts of a million executions."""
    monkeypatch.setenv("OTELEXEC_STORE", "none")
    otelexec.configure(tracer_provider=TracerProvider(shutdown_on_exit=False))  # sampled, and sent nowhere
    assert grown(98, 10_000) < MAX_GROWTH_BYTES


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_memory_is_flat_over_forty_thousand_executions_in_a_store() -> None:
    assert grown(18, 2_000) < MAX_GROWTH_BYTES
