"""The public names: sorted, complete, and documented."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import otelexec


def test_all_is_sorted_without_repeats_and_every_name_is_there() -> None:
    assert otelexec.__all__ == sorted(set(otelexec.__all__))
    for name in otelexec.__all__:
        assert hasattr(otelexec, name), name


def test_all_is_complete() -> None:
    """What `__init__` imports is public; submodules are there because they were imported, and are not."""
    tree = ast.parse(Path(otelexec.__file__).read_text(encoding="utf-8"))
    imported = {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported - {"annotations"} == set(otelexec.__all__)


def test_no_module_has_the_name_of_something_public() -> None:
    """One that is imported later than the package, as with lazy imports (Python 3.15), is put in place of that."""
    modules = {path.stem for path in Path(otelexec.__file__).parent.iterdir()}
    assert modules & set(otelexec.__all__) == set()


def test_star_import_gives_exactly_that() -> None:
    names: dict[str, Any] = {}
    exec("from otelexec import *", names)
    assert set(names) - {"__builtins__"} == set(otelexec.__all__)


@pytest.mark.parametrize("name", otelexec.__all__)
def test_a_public_name_has_a_docstring_and_a_function_names_its_arguments(name: str) -> None:
    thing = getattr(otelexec, name)
    assert not isinstance(thing, ModuleType)
    documentation = inspect.getdoc(thing)
    assert documentation
    if inspect.isfunction(thing):
        parameters = [parameter for parameter in inspect.signature(thing).parameters.values() if parameter.name not in {"self", "cls"}]
        if parameters:
            assert "Args:" in documentation, name
        for parameter in parameters:
            stars = "**" if parameter.kind is inspect.Parameter.VAR_KEYWORD else ""
            assert f"{stars}{parameter.name}:" in documentation, parameter.name


@pytest.mark.parametrize("cls", [getattr(otelexec, name) for name in otelexec.__all__ if inspect.isclass(getattr(otelexec, name))])
def test_public_methods_are_documented(cls: type) -> None:
    for name, member in vars(cls).items():
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            assert inspect.getdoc(member), f"{cls.__name__}.{name}"


def test_every_error_of_the_package_is_in_one_tree_and_never_blank() -> None:
    from otelexec import errors

    found = [cls for cls in vars(errors).values() if inspect.isclass(cls) and cls.__module__ == errors.__name__]
    assert all(issubclass(cls, errors.OtelexecError) for cls in found)
    assert all(str(cls()) for cls in found)
