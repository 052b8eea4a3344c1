"""Celery's own unit tests, bare and with the adapter active: none that passes bare may fail."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import tarfile
import venv
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from otelexec.store.sqlite import SqliteStore

ROOT = Path(__file__).resolve().parents[3]
# What they need beside Celery, by its requirements/test.txt; cloud storage and other brokers are left out.
NEEDED = ("pytest", "pytest-subtests", "pytest-timeout", "pytest-click", "freezegun", "cryptography", "pydantic")
FOLDERS = ("t/unit/app", "t/unit/worker", "t/unit/tasks")
AT_LEAST = 2_500
"""So many pass bare in every supported version (5.7.0: 3,144); fewer means that something else is wrong."""
SET_UP_SECONDS = 300
RUN_SECONDS = 1200


@pytest.mark.long
@pytest.mark.timeout(SET_UP_SECONDS + RUN_SECONDS)
def test_none_that_passes_bare_fails_with_the_adapter(tmp_path: Path) -> None:
    version = importlib.metadata.version("celery")
    python = environment(tmp_path / "venv", version)
    source = sources(tmp_path, version, python)
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


def environment(folder: Path, version: str) -> Path:
    """Make an environment of Celery's own, since its tests need other versions than ours; gives its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    ours = [requirement.partition(";")[0] for requirement in importlib.metadata.requires("otelexec") or [] if "extra ==" not in requirement]
    pip(python, "install", f"celery[redis]=={version}", "opentelemetry-instrumentation", *NEEDED, *ours)
    return python


def sources(folder: Path, version: str, python: Path) -> Path:
    """Unpack the source distribution, which alone has the tests."""
    pip(python, "download", "--no-deps", "--no-binary", "celery", "--dest", str(folder), f"celery=={version}")
    with tarfile.open(folder / f"celery-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"celery-{version}"


def pip(python: Path, *arguments: str) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        timeout=SET_UP_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def start(python: Path, source: Path, env: Mapping[str, str], result: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [str(python), "-m", "pytest", *FOLDERS, "-p", "celery.contrib.pytest", *arguments]
    options = ["-q", "--timeout", "120", "-p", "no:cacheprovider", f"--junitxml={result}.xml"]
    with result.with_suffix(".log").open("wb") as log:
        return subprocess.Popen([*command, *options], cwd=source, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def passed(result: Path) -> set[str]:
    """Give the names of the tests that passed."""
    written = result.with_suffix(".xml")
    assert written.exists(), result.with_suffix(".log").read_text()[-3000:]
    failed = {"failure", "error", "skipped"}
    cases: dict[str, bool] = {}
    for case in ET.parse(written).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        # An error in the teardown is a second entry of the same name.
        cases[name] = cases.get(name, True) and not failed & {child.tag for child in case}
    return {name for name, well in cases.items() if well}
