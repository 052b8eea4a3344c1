"""A library's own tests, in an environment of their own: its source distribution, which alone has them, and what they need."""

from __future__ import annotations

import importlib.metadata
import subprocess
import tarfile
import venv
from pathlib import Path
from xml.etree import ElementTree as ET

SET_UP_SECONDS = 300


def environment(folder: Path, *packages: str) -> Path:
    """Make an environment with packages and what otelexec needs: a library's tests need other versions than ours. Gives its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    ours = [requirement.partition(";")[0] for requirement in importlib.metadata.requires("otelexec") or [] if "extra ==" not in requirement]
    pip(python, "install", "opentelemetry-instrumentation", *packages, *ours)
    return python


def sources(folder: Path, name: str, version: str, python: Path) -> Path:
    """Download and unpack a source distribution; gives its folder."""
    pip(python, "download", "--no-deps", "--no-binary", name, "--dest", str(folder), f"{name}=={version}")
    with tarfile.open(folder / f"{name}-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"{name}-{version}"


def pip(python: Path, *arguments: str) -> None:
    """Run pip."""
    done = subprocess.run(
        [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        timeout=SET_UP_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def passed(result: Path) -> set[str]:
    """Give the names of the tests that passed, from `RESULT.xml` or else what `RESULT.log` says."""
    written = result.with_suffix(".xml")
    assert written.exists(), result.with_suffix(".log").read_text()[-3000:]
    failed = {"failure", "error", "skipped"}
    cases: dict[str, bool] = {}
    for case in ET.parse(written).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        # An error in the teardown is a second entry of the same name.
        cases[name] = cases.get(name, True) and not failed & {child.tag for child in case}
    return {name for name, well in cases.items() if well}
