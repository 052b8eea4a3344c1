"""One backend in several processes and event loops: whose connections its requests go over."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from otelexec_trigger import AsyncTriggerDevBackend, BackendError, EnqueueError, TriggerDevBackend

from tests.forks import in_child
from tests.integrations.trigger.scripted import Served

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

OK = {"id": "run_1", "isCached": False}


@pytest.fixture
def backend(served: Served) -> Iterator[TriggerDevBackend]:
    served.answer(200, OK)
    with TriggerDevBackend(served.url, "k", max_attempts=1, timeout_seconds=10) as made:
        yield made


def test_a_forked_child_has_connections_of_its_own_and_leaves_the_parent_s_open(served: Served, backend: TriggerDevBackend) -> None:
    def child() -> None:
        backend.trigger("child")
        backend.trigger("child")
        assert in_child(lambda: backend.trigger("grandchild")) == 0

    backend.trigger("parent")
    assert in_child(child) == 0
    backend.trigger("parent")
    first, child_s, child_s_again, grandchild_s, again = served.ports
    assert first == again
    assert child_s == child_s_again
    assert len({first, child_s, grandchild_s}) == 3


def test_a_child_that_closes_its_backend_closes_nothing_of_the_parent_s(served: Served, backend: TriggerDevBackend) -> None:
    backend.trigger("parent")
    assert in_child(backend.close) == 0
    backend.trigger("parent")
    assert len(set(served.ports)) == 1


def test_a_backend_that_was_closed_says_so_and_sends_nothing(served: Served, backend: TriggerDevBackend) -> None:
    backend.close()
    with pytest.raises(EnqueueError, match="closed") as caught:
        backend.trigger("task")
    assert (caught.value.acceptance, caught.value.retryable) == ("rejected", False)
    for ask in (backend.get, backend.cancel, backend.replay):
        with pytest.raises(BackendError, match="closed"):
            ask("run_1")
    assert not served.requests


@pytest.fixture
def awaited(served: Served) -> AsyncTriggerDevBackend:
    served.answer(200, OK)
    return AsyncTriggerDevBackend(served.url, "k", max_attempts=1, timeout_seconds=10)


async def twice(backend: AsyncTriggerDevBackend) -> None:
    for _ in range(2):
        await backend.trigger("task")


def test_each_event_loop_has_connections_of_its_own_and_closes_them_when_it_ends(served: Served, awaited: AsyncTriggerDevBackend) -> None:
    for number in (1, 2, 3):
        asyncio.run(twice(awaited))
        assert served.ended.acquire(timeout=20), f"the connection of loop {number} stays open"
    first, again, second, second_again, *_ = served.ports
    assert (first, second) == (again, second_again)
    assert len(set(served.ports)) == 3


def test_event_loops_of_several_threads_share_a_backend(served: Served, awaited: AsyncTriggerDevBackend) -> None:
    begun = threading.Barrier(3)

    async def work() -> list[str]:
        first = await awaited.trigger("task")
        begun.wait(20)  # each has an idle connection now
        return [first, *[await awaited.trigger("task") for _ in range(20)]]

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(asyncio.run, work()) for _ in range(3)]:
            assert done.result(60) == ["run_1"] * 21
    assert len(set(served.ports)) == 3


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_loop_that_did_not_end_in_order_had_open_goes_when_the_next_one_comes(
    served: Served, awaited: AsyncTriggerDevBackend
) -> None:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(awaited.trigger("task"))
    loop.close()
    gone = weakref.ref(loop)
    del loop
    asyncio.run(twice(awaited))
    gc.collect()
    assert gone() is None
    assert served.ended.acquire(timeout=20)


def test_a_forked_child_s_loop_has_connections_of_its_own(served: Served, awaited: AsyncTriggerDevBackend) -> None:
    async def parent() -> None:
        await awaited.trigger("parent")
        assert in_child(lambda: asyncio.run(twice(awaited))) == 0
        await awaited.trigger("parent")

    asyncio.run(parent())
    first, child_s, child_s_again, again = served.ports
    assert first == again != child_s == child_s_again


async def test_a_backend_with_await_that_was_closed_says_so(served: Served, awaited: AsyncTriggerDevBackend) -> None:
    await awaited.trigger("task")
    await awaited.close()
    with pytest.raises(EnqueueError, match="closed") as caught:
        await awaited.trigger("task")
    assert caught.value.acceptance == "rejected"
    assert len(served.requests) == 1
    await awaited.close()


def test_closing_closes_the_connections_of_other_loops_that_run(served: Served, awaited: AsyncTriggerDevBackend) -> None:
    used, over = threading.Event(), threading.Event()

    async def work() -> None:
        await awaited.trigger("task")
        used.set()
        await asyncio.to_thread(over.wait, 20)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(asyncio.run, work())
        assert used.wait(20)
        asyncio.run(awaited.close())
        assert served.ended.acquire(timeout=20)
        over.set()
        done.result(20)
