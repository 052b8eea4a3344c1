"""Brokers for the session, a stage for a module or a test, and Celery instrumented while a test runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.celery.stage import Broker, Stage
from tests.integrations.stage import each_open
from tests.patience import PATIENCE
from tests.queue_servers import running_rabbitmq, running_valkey

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(PATIENCE * 180))
            # Celery's result backends leave their sockets to the garbage collector.
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore:.*unclosed <socket:pytest.PytestUnraisableExceptionWarning"))


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with running_valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield Broker(f"{server.connection_url}/0", f"{server.connection_url}/1")


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory, valkey: Broker) -> Iterator[Broker]:
    with running_rabbitmq(tmp_path_factory.mktemp("rabbitmq")) as url:
        yield Broker(url, valkey.result_backend)


NewStage = Callable[..., Stage]
Fresh = Callable[..., Stage]
"""Makes a stage of the test's own, which this process writes to: its broker (None is Valkey), and settings of Celery's."""


@pytest.fixture(scope="module")
def new_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewStage]:
    """Make stages, each with an empty queue of its own, and end what runs on them with the module."""
    with ExitStack() as stack:

        def make(broker: Broker, **settings: Any) -> Stage:
            folder: Path = tmp_path_factory.mktemp("stage")
            queue = {"task_default_queue": folder.name}
            stage = Stage(folder, broker.settings | queue | settings)
            stack.callback(stage.close)
            return stage

        yield make


@pytest.fixture
def instrumented(isolated: None) -> Iterator[None]:
    """Have Celery instrumented in this process."""
    from otelexec_celery import CeleryInstrumentor

    CeleryInstrumentor().instrument()
    yield
    CeleryInstrumentor().uninstrument()


@pytest.fixture
def on(instrumented: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Stage], Stage]:
    """Let this process write to a stage's store."""

    def enter(stage: Stage) -> Stage:
        monkeypatch.setenv("OTELEXEC_STORE", f"sqlite:///{stage.path}")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "publisher")
        return stage

    return enter


@pytest.fixture
def fresh(new_stage: NewStage, valkey: Broker, on: Callable[[Stage], Stage]) -> Fresh:
    return lambda broker=None, **settings: on(new_stage(broker or valkey, **settings))


@pytest.fixture(scope="session")
def common_stage(tmp_path_factory: pytest.TempPathFactory, valkey: Broker) -> Iterator[Stage]:
    """Give the stage whose one prefork worker serves every test that has no need of its own; at the end all must agree."""
    stage = Stage(tmp_path_factory.mktemp("common"), valkey.settings | {"task_default_queue": "common"})
    worker = stage.worker("common", "prefork", 4)
    try:
        yield stage
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
