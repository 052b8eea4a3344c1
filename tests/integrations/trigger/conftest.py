"""Stages for the local engine: one that all tests share, and fresh ones; this process writes to the same store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import otelexec
from tests.integrations.stage import each_open
from tests.integrations.trigger.scripted import Served, scripted
from tests.integrations.trigger.stage import KEY, Stage
from tests.patience import PATIENCE

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(PATIENCE * 180))


@pytest.fixture
def on(isolated: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Stage], Stage]]:
    """Let this process write to a stage's store."""

    def enter(stage: Stage) -> Stage:
        monkeypatch.setenv("OTELEXEC_STORE", f"sqlite:///{stage.path}")
        monkeypatch.setenv("OTELEXEC_RELAY", "false")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "caller")
        monkeypatch.setenv("TRIGGER_SECRET_KEY", KEY)
        return stage

    yield enter
    otelexec.shutdown()


Fresh = Callable[..., Stage]


@pytest.fixture
def fresh(tmp_path_factory: pytest.TempPathFactory, on: Callable[[Stage], Stage]) -> Iterator[Fresh]:
    """Make stages of the test's own; settings are further variables of their processes."""
    with ExitStack() as stack:

        def make(**settings: Any) -> Stage:
            stage = Stage(tmp_path_factory.mktemp("trigger"), settings)
            stack.callback(stage.close)
            return on(stage)

        yield make


@pytest.fixture(scope="session")
def common_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stage, str]]:
    """Give the stage whose server and worker serve every test that has no need of its own; at the end all must agree."""
    stage = Stage(tmp_path_factory.mktemp("trigger-common"))
    try:
        server, url = stage.serve()
        worker = stage.worker(3)
        yield stage, url
        assert [worker.stop(), server.stop()] == [0, 0]
        for process in (worker, server):
            process.check_log()
        stage.reconcile()
        stage.check_agreement()
        assert not list(each_open(stage))
    finally:
        stage.close()


@pytest.fixture
def common(common_stage: tuple[Stage, str], on: Callable[[Stage], Stage]) -> Stage:
    """Give that stage, with this process writing to its store."""
    return on(common_stage[0])


@pytest.fixture
def url(common_stage: tuple[Stage, str]) -> str:
    """Give the URL of the common server."""
    return common_stage[1]


@pytest.fixture
def served() -> Iterator[Served]:
    """Give a server that answers as the test says."""
    with scripted() as state:
        yield state
