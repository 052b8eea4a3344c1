"""One backend in several processes: whose connections its requests go over."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator

import pytest
from otelexec_trigger import BackendError, EnqueueError, TriggerDevBackend

from tests.integrations.trigger.scripted import Served

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

OK = {"id": "run_1", "isCached": False}


def in_child(work: Callable[[], object]) -> int:
    """Fork, run `work` in the child, and give its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        signal.alarm(20)  # a child that hangs is a failure
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


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
