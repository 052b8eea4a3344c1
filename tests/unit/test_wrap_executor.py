"""Executors that can't be edited, also before they are imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import otelexec
from tests.records import Records

SOURCE = """
class Engine:
    def run(self, n):
        return n + 1

    @classmethod
    def of(cls, n):
        return cls, n

    @staticmethod
    def static(n):
        return n


class Turbo(Engine):
    pass


def plain(n):
    return n * 2


async def later(n):
    return n * 3
"""


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    name = f"engine_{abs(hash(request.node.name)) % 10**8}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def load(name: str) -> Callable[[], ModuleType]:
    return lambda: importlib.import_module(name)


def test_one_that_is_imported_already_is_wrapped_and_put_back(records: Records, name: str, load: Callable[[], ModuleType]) -> None:
    module = load()
    before = vars(module.Engine)["run"]
    handle = otelexec.wrap_executor(f"{name}:Engine.run", name="invoice.run")
    assert handle.wrapped
    assert module.Engine().run(1) == 2
    handle.unwrap()
    assert vars(module.Engine)["run"] is before
    assert module.Engine().run(1) == 2
    handle.unwrap()
    assert [record.name for record in records.all()] == ["invoice.run"]


def test_one_that_is_imported_later_is_wrapped_then(records: Records, name: str, load: Callable[[], ModuleType]) -> None:
    handle = otelexec.wrap_executor(f"{name}:plain", name="job", core=True)
    assert not handle.wrapped
    assert load().plain(2) == 4
    assert handle.wrapped
    assert records.one().name == "job"


def test_unwrapped_before_the_import_nothing_happens(records: Records, name: str, load: Callable[[], ModuleType]) -> None:
    otelexec.wrap_executor(f"{name}:plain").unwrap()
    assert load().plain(2) == 4
    assert records.all() == []


async def test_every_kind_keeps_working(records: Records, name: str, load: Callable[[], ModuleType]) -> None:
    module = load()
    handles = [otelexec.wrap_executor(f"{name}:{path}") for path in ("Engine.of", "Engine.static", "later")]
    assert module.Turbo.of(1) == (module.Turbo, 1)
    assert (module.Engine.static(3), module.Engine().static(3)) == (3, 3)
    assert await module.later(1) == 3
    assert [record.name for record in records.all()] == [f"{name}.{path}" for path in ("Engine.of", *["Engine.static"] * 2, "later")]
    for handle in handles:
        handle.unwrap()
    assert isinstance(vars(module.Engine)["of"], classmethod)
    assert isinstance(vars(module.Engine)["static"], staticmethod)


def test_an_inherited_method_is_wrapped_on_the_subclass_alone(records: Records, name: str, load: Callable[[], ModuleType]) -> None:
    module = load()
    handle = otelexec.wrap_executor(f"{name}:Turbo.run", name="turbo")
    module.Engine().run(1)
    assert records.all() == []
    module.Turbo().run(1)
    assert records.one().name == "turbo"
    handle.unwrap()
    assert "run" not in vars(module.Turbo)


def test_another_s_wrapper_around_ours_stays(name: str, load: Callable[[], ModuleType]) -> None:
    module = load()
    handle = otelexec.wrap_executor(f"{name}:plain")
    ours = module.plain
    setattr(module, "plain", lambda n: ours(n) + 1)  # noqa: B010 (as somebody else's patch does it)
    handle.unwrap()
    assert module.plain(2) == 5


def test_unwrapped_below_another_wrapper_it_records_nothing_any_more(records: Records, name: str, load: Callable[[], ModuleType]) -> None:
    module = load()
    first, second = (otelexec.wrap_executor(f"{name}:Engine.run", name=each) for each in ("first", "second"))
    first.unwrap()
    assert module.Engine().run(1) == 2
    second.unwrap()
    assert module.Engine().run(1) == 2
    assert [record.name for record in records.all()] == ["second"]


def test_a_name_that_a_module_imported_later_has_not_is_logged_and_the_import_goes_on(
    name: str, load: Callable[[], ModuleType], caplog: pytest.LogCaptureFixture
) -> None:
    handle = otelexec.wrap_executor(f"{name}:Engine.walk")
    assert load().plain(2) == 4
    assert not handle.wrapped
    assert f"{name} has no Engine.walk" in caplog.text


@pytest.mark.parametrize("target", ["", "json", ":dumps", "json:", "json:no_such_name", "json:dumps.no.such"])
def test_a_target_that_is_none_is_a_clear_error(target: str) -> None:
    with pytest.raises(otelexec.SettingsError, match="wrap_executor"):
        otelexec.wrap_executor(target)


def test_a_timeout_that_is_none_is_refused_here_too(name: str) -> None:
    with pytest.raises(otelexec.SettingsError, match="timeout"):
        otelexec.wrap_executor(f"{name}:plain", timeout=0)
