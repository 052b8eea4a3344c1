"""The registration of tasks: one function has an id."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from otelexec_trigger import task
from otelexec_trigger.tasks import TASKS

from otelexec.errors import SettingsError


@pytest.fixture(autouse=True)
def tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = dict(TASKS)
    TASKS.clear()
    yield
    TASKS.clear()
    TASKS.update(before)


def named_alike(number: int) -> Callable[[Any], Any]:
    if number:

        def run(_: Any) -> int:
            return number

    else:

        def run(_: Any) -> int:
            return 0

    return run


def test_two_functions_of_one_name_do_not_share_an_id() -> None:
    task("one")(lambda _: 1)
    task("two")(named_alike(1))
    task("three")(partial(named_alike(1)))
    for taken, other in (("one", lambda _: 2), ("two", named_alike(0)), ("three", partial(named_alike(0)))):
        with pytest.raises(SettingsError, match=f"the task '{taken}' is .*test_tasks.py:.* already"):
            task(taken)(other)
    assert TASKS["one"](None) == 1


def test_a_function_may_be_registered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "jobs_that_are_imported_again.py"
    source.write_text("from otelexec_trigger import task\n\n@task('again')\ndef again(_):\n    return 1\n")
    module = importlib.import_module(source.stem)
    importlib.reload(module)
    del sys.modules[source.stem]
    source.write_text(source.read_text().replace("\n\n@", "\n\n\n\n@").replace("return 1", "return 22"))
    importlib.invalidate_caches()
    importlib.import_module(source.stem)
    assert TASKS["again"](None) == 22
    made = named_alike(1)
    assert task("made")(task("made")(made)) is made
    task("made")(named_alike(1))
    del sys.modules[source.stem]


def test_a_decorator_without_an_id_says_what_it_takes() -> None:
    bare: Any = task
    for nothing in ("", None, named_alike(1)):
        with pytest.raises(SettingsError, match="takes the task's id"):
            bare(nothing)
