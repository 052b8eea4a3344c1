"""Celery's own unit tests, bare and with the adapter active: none that passes bare may fail."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from otelexec.store.sqlite import SqliteStore
from tests.integrations.own_suite import SET_UP_SECONDS, environment, passed, sources

ROOT = Path(__file__).resolve().parents[3]
# What they need beside Celery, by its requirements/test.txt; cloud storage and other brokers are left out.
NEEDED = ("pytest", "pytest-subtests", "pytest-timeout", "pytest-click", "freezegun", "cryptography", "pydantic")
FOLDERS = ("t/unit/app", "t/unit/worker", "t/unit/tasks")
AT_LEAST = 2_500
"""So many pass bare in every supported version (5.7.0: 3,144); fewer means that something else is wrong."""
RUN_SECONDS = 1200


@pytest.mark.long
@pytest.mark.timeout(SET_UP_SECONDS + RUN_SECONDS)
def test_none_that_passes_bare_fails_with_the_adapter(tmp_path: Path) -> None:
    version = importlib.metadata.version("celery")
    python = environment(tmp_path / "venv", f"celery[redis]=={version}", *NEEDED)
    source = sources(tmp_path, "celery", version, python)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "OTELEXEC_", "PYTEST_"))}
    instrumented = own | {
        "OTELEXEC_STORE": f"sqlite:///{tmp_path / 'own.db'}",
        "OTELEXEC_RELAY": "false",
        "OTELEXEC_RECONCILE": "false",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "integrations"))),
    }
    # Both at once: they share nothing, and take minutes.
    runs = {
        "bare": start(python, source, own, tmp_path / "bare"),
        "instrumented": start(python, source, instrumented, tmp_path / "instrumented", "-p", "tests.integrations.celery.own_suite_plugin"),
    }
    for run in runs.values():
        run.wait(RUN_SECONDS)
    bare, with_ours = passed(tmp_path / "bare"), passed(tmp_path / "instrumented")
    assert len(bare) > AT_LEAST
    assert sorted(bare - with_ours) == []
    store = SqliteStore(tmp_path / "own.db", create=False)
    assert len(list(store.executions())) > 1, "the adapter was not active"
    store.close()


def start(python: Path, source: Path, env: Mapping[str, str], result: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [str(python), "-m", "pytest", *FOLDERS, "-p", "celery.contrib.pytest", *arguments]
    options = ["-q", "--timeout", "120", "-p", "no:cacheprovider", f"--junitxml={result}.xml"]
    with result.with_suffix(".log").open("wb") as log:
        return subprocess.Popen([*command, *options], cwd=source, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
