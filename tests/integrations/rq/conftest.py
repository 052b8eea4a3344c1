"""A Valkey for the session, a stage for all tests or for one, and RQ instrumented while a test runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integrations.rq.stage import Stage
from tests.integrations.stage import each_open
from tests.patience import PATIENCE
from tests.queue_servers import running_valkey

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(PATIENCE * 180))


@pytest.fixture(scope="session")
def rq_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_valkey(tmp_path_factory.mktemp("rq-valkey")) as server:
        yield server.connection_url


@pytest.fixture
def instrumented(isolated: None) -> Iterator[None]:
    """Have RQ instrumented in this process."""
    from otelexec_rq import RQInstrumentor

    RQInstrumentor().instrument()
    yield
    RQInstrumentor().uninstrument()


Fresh = Callable[[], Stage]
"""Makes a stage of the test's own, which this process writes to."""


@pytest.fixture
def on(instrumented: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Stage], Stage]:
    """Let this process write to a stage's store."""

    def enter(stage: Stage) -> Stage:
        monkeypatch.setenv("OTELEXEC_STORE", f"sqlite:///{stage.path}")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "publisher")
        return stage

    return enter


@pytest.fixture
def fresh(tmp_path_factory: pytest.TempPathFactory, rq_url: str, on: Callable[[Stage], Stage]) -> Iterator[Fresh]:
    with ExitStack() as stack:

        def make() -> Stage:
            stage = Stage(tmp_path_factory.mktemp("rq"), rq_url)
            stack.callback(stage.close)
            return on(stage)

        yield make


@pytest.fixture(scope="session")
def common_stage(tmp_path_factory: pytest.TempPathFactory, rq_url: str) -> Iterator[Stage]:
    """Give the stage whose two workers serve every test that has no need of its own; at the end all must agree."""
    stage = Stage(tmp_path_factory.mktemp("rq-common"), rq_url)
    workers = [stage.start(name, scheduler=True) for name in ("one", "two")]
    workers[-1].wait_until_ready(2)
    try:
        yield stage
        for worker in workers:
            assert worker.stop() == 0
            worker.check_log()
        stage.reconcile()
        stage.check_agreement()
        assert not list(each_open(stage))
    finally:
        stage.close()


@pytest.fixture
def common(common_stage: Stage, on: Callable[[Stage], Stage]) -> Stage:
    """Give that stage, with this process writing to its store."""
    return on(common_stage)
