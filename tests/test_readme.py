"""The README says what the code does: its table of settings, and the names in its examples."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import otelexec
from otelexec.settings import Settings

README = Path(__file__).parent.parent / "README.md"


def settings_table() -> str:
    """Give the table of settings as the README should have it."""
    lines = ["| variable | default | what it is |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "" if default in (None, "", frozenset()) else f"`{str(default).lower() if isinstance(default, bool) else default}`"
        unit = " s" if name.endswith("_seconds") and shown else ""
        lines.append(f"| `OTELEXEC_{name.upper()}` | {shown}{unit} | {field.description} |")
    return "\n".join(lines)


def test_the_table_of_settings_is_that_of_the_code() -> None:
    text = README.read_text(encoding="utf-8")
    _, _, rest = text.partition("<!-- settings:")
    _, _, rest = rest.partition("-->\n")
    table, _, _ = rest.partition("\n<!-- /settings -->")
    assert table == settings_table()


def test_every_setting_names_its_unit_or_has_none() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        if "float" in str(field.annotation):
            assert name.endswith("_seconds"), name


def code_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", code_blocks())
def test_examples_use_names_that_exist(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "otelexec":
            assert hasattr(otelexec, node.attr), node.attr
