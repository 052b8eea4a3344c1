"""Getting it in and out: the entry point, what is missing, versions that do not fit, and an RQ that is as it was."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
NAMES = (
    *("rq.callbacks", "rq.cron", "rq.job", "rq.queue", "rq.registry", "rq.repeat", "rq.scheduler"),
    *("rq.worker", "rq.worker.base", "rq.worker.worker_classes", "rq.worker_pool"),
)


def modules() -> list[ModuleType]:
    found = []
    for name in NAMES:
        try:
            found.append(importlib.import_module(name))
        except ImportError:
            continue  # not in this version
    return found


def state_of_rq() -> dict[str, int]:
    """Give every function of RQ's modules and of its classes, by identity."""
    held: dict[str, int] = {}
    for module in modules():
        for name, value in vars(module).items():
            held[f"{module.__name__}.{name}"] = id(value)
            if isinstance(value, type) and value.__module__.startswith("rq."):
                held |= {f"{value.__module__}.{value.__qualname__}.{key}": id(each) for key, each in vars(value).items() if key[:2] != "__"}
    return held


def test_uninstrument_leaves_rq_as_it_was() -> None:
    from otelexec_rq import RQInstrumentor

    before = state_of_rq()
    for _ in range(2):
        RQInstrumentor().instrument()
        assert state_of_rq() != before
        RQInstrumentor().uninstrument()
        assert state_of_rq() == before


def test_instrumenting_twice_is_once() -> None:
    from otelexec_rq import RQInstrumentor

    before = state_of_rq()
    RQInstrumentor().instrument()
    during = state_of_rq()
    RQInstrumentor().instrument()
    assert state_of_rq() == during
    RQInstrumentor().uninstrument()
    assert state_of_rq() == before


def test_a_version_that_does_not_fit_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import otelexec_rq

    before = state_of_rq()
    monkeypatch.setattr(otelexec_rq, "VERSION", "4.0.0")
    instrumentor: Any = otelexec_rq.RQInstrumentor()
    with caplog.at_level(logging.ERROR):
        instrumentor.instrument(skip_dep_check=True)
    assert state_of_rq() == before
    assert "otelexec.rq.unsupported: RQ 4.0.0" in caplog.text
    instrumentor.uninstrument()


def test_the_entry_point_is_there() -> None:
    (found,) = [point for point in importlib.metadata.entry_points(group="opentelemetry_instrumentor") if point.name == "otelexec_rq"]
    assert found.load().__name__ == "RQInstrumentor"
    assert "rq" in importlib.metadata.metadata("otelexec").get_all("Provides-Extra", [])


def test_without_rq_the_error_says_what_to_install() -> None:
    hides = "import sys; sys.meta_path.insert(0, type('Hides', (), {'find_spec': staticmethod(find)}))\nimport otelexec_rq"
    find = """
def find(name, path=None, target=None):
    if name == 'rq':
        raise ModuleNotFoundError("No module named 'rq'", name='rq')
"""
    done = subprocess.run([sys.executable, "-c", find + hides], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "pip install 'otelexec[rq]'" in done.stderr
