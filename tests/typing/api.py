"""What type checkers make of the public names. Never executed: mypy and pyright read it."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from typing import Self, assert_type

import otelexec


@otelexec.execution
def bare(invoice_id: int, *, dry: bool = False) -> str:
    return str((invoice_id, dry))


@otelexec.execution("job", core=True, timeout=30)
def named(invoice_id: int, *, dry: bool = False) -> str:
    return str((invoice_id, dry))


@otelexec.execution
async def coroutine(invoice_id: int) -> bytes:
    return bytes(invoice_id)


@otelexec.execution("items")
def generator(count: int) -> Generator[int, str, float]:
    yield count
    return 1.0


@otelexec.execution
def iterator() -> Iterator[int]:
    yield 1


@otelexec.execution("stream", timeout=1.5)
async def stream(count: int) -> AsyncGenerator[int, str]:
    yield count


@otelexec.execution
async def async_iterator() -> AsyncIterator[int]:
    yield 1


class Engine:
    @otelexec.execution
    def bare(self, invoice_id: int) -> str:
        return str(invoice_id)

    @otelexec.execution("named")
    async def named(self, invoice_id: int) -> str:
        return str(invoice_id)

    @classmethod
    @otelexec.execution("of")
    def of(cls, invoice_id: int) -> Engine:
        return cls()

    @otelexec.execution("over a classmethod")
    @classmethod
    def over(cls) -> Self:
        return cls()

    @otelexec.execution
    @functools.singledispatchmethod
    def chosen(self, value: object) -> str:
        return str(value)

    @otelexec.execution("chosen by name")
    @functools.singledispatchmethod
    def named_choice(self, value: object) -> str:
        return str(value)

    @staticmethod
    @otelexec.execution
    def static(invoice_id: int) -> int:
        return invoice_id


async def checks() -> None:
    assert_type(bare(7, dry=True), str)
    assert_type(named(7), str)
    assert_type(await coroutine(7), bytes)
    assert_type(generator(1), Generator[int, str, float])
    assert_type(iterator(), Iterator[int])
    assert_type(stream(1), AsyncGenerator[int, str])
    assert_type(async_iterator(), AsyncIterator[int])
    assert_type(Engine().bare(7), str)
    assert_type(await Engine().named(7), str)
    assert_type(Engine.of(7), Engine)
    assert_type(Engine.over(), Engine)
    assert_type(Engine().chosen(7), str)
    assert_type(Engine().named_choice(7), str)
    assert_type(Engine.static(7), int)

    bare("7")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    named(7, wet=True)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    otelexec.execution("x", no_such_option=1)  # type: ignore[call-overload] # pyright: ignore[reportCallIssue, reportArgumentType]

    otelexec.configure(service_name="billing", lease_seconds=10, ambient=["tenant"], spool="spool", signing_key=None)
    otelexec.configure(lease_secnds=10)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    otelexec.configure(lease_seconds="10 s")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]

    with otelexec.execution("batch") as run:
        assert_type(run, otelexec.Execution)
        assert_type(run.id, str)
        assert_type(run.deadline, float | None)
    async with otelexec.execution("batch", timeout=3) as run:
        assert_type(run, otelexec.Execution)
    with otelexec.correlate(source="webhook", webhook_id="w") as correlation:
        assert_type(correlation, otelexec.Correlation)
    payload = otelexec.inject({"invoice_id": 7})
    with otelexec.extract(payload):
        pass
    with otelexec.publish("job") as message:
        assert_type(message.id, str)
    assert_type(otelexec.reject("rate_limited"), str)
    assert_type(otelexec.request_cancel("e", terminate=True), str | None)
    assert_type(otelexec.was_finalized(ValueError()), bool)
    current = otelexec.current_execution()
    assert_type(current.id, str | None)
    if current:
        assert_type(current, otelexec.Execution)
        assert_type(current.id, str)
        current.progress("block 3", done=3, total=9)
    else:
        assert_type(current, otelexec.NoExecution)
    otelexec.wrap_executor("engine.core:Engine.run", name="invoice.run", core=True).unwrap()
