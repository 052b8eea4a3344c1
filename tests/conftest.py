"""An environment of its own for every test: nothing of the machine comes in, nothing is written outside `tmp_path`."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.util._once import Once

from otelexec import runtime
from otelexec.running import _warned
from tests.patience import LENGTH
from tests.records import Records

if TYPE_CHECKING:
    from tests.postgres_servers import Server


# How long it takes to make an example says how busy the machine is.
hypothesis.settings.register_profile("otelexec", suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("otelexec")


def pytest_configure() -> None:
    # A shell starts what it runs in the background with these ignored, and so would be every process that the tests interrupt.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("longest") is not None and LENGTH < 2:
            item.add_marker(pytest.mark.skip(reason="takes up to an hour; set OTELEXEC_TEST_LONG=2"))
        elif item.get_closest_marker("long") is not None and LENGTH < 1:
            item.add_marker(pytest.mark.skip(reason="takes minutes; set OTELEXEC_TEST_LONG=1"))


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """
    Give the test a store, a home and a runtime of its own.

    The relay and the reconciler of this process are off: the outbox keeps what was written, and no span reaches a
    collector that happens to listen on this machine. A test that wants them sets the variable.
    """
    for name in os.environ:
        if name.startswith(("OTEL_", "OTELEXEC_")) and name != "OTELEXEC_TEST_LONG":
            monkeypatch.delenv(name)
    monkeypatch.setenv("OTELEXEC_STORE", f"sqlite:///{tmp_path / 'store.db'}")
    monkeypatch.setenv("OTELEXEC_RELAY", "false")
    monkeypatch.setenv("OTELEXEC_RECONCILE", "false")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    factory = logging.getLogRecordFactory()
    _forget()
    yield
    left, _ = otel_context.get_current(), otel_context.attach(otel_context.Context())
    _forget()
    logging.setLogRecordFactory(factory)
    assert left == {}, "the test left its context behind"


def _forget() -> None:
    """End the runtime and make the process as it was before the first import: no settings, no global provider."""
    runtime.shutdown()
    runtime._template = None
    current: Any = multiprocessing.current_process()
    current._config.pop("otelexec", None)
    _warned.clear()
    # As opentelemetry-test-utils does it: there is no public way to take a global provider back.
    trace._TRACER_PROVIDER_SET_ONCE = Once()
    trace._TRACER_PROVIDER = None


@pytest.fixture
def records(tmp_path: Path, isolated: None) -> Iterator[Records]:
    """Give what the store of this test holds; at the end, every record and its span must agree."""
    reader = Records(tmp_path / "store.db")
    yield reader
    reader.check_agreement()
    reader.close()


@pytest.fixture(scope="session")
def postgres_folder() -> Iterator[Path]:
    """Give a folder for PostgreSQL servers."""
    from tests.postgres_servers import folder_of_servers

    with folder_of_servers() as folder:
        yield folder


@pytest.fixture(scope="session")
def postgres(postgres_folder: Path) -> Iterator[Server]:
    """Give a PostgreSQL server that many tests use: each makes a database of its own, and none kills it."""
    from tests.postgres_servers import running_server

    with running_server(postgres_folder) as server:
        yield server
