"""What a user gets: the wheel, built and installed away from the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def packages(project: dict[str, Any]) -> list[Path]:
    return [ROOT / package for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_installing_it_claims_no_other_top_level_names(project: dict[str, Any], packages: list[Path], installed: Path) -> None:
    version = project["project"]["version"]
    names = {entry.name for entry in installed.iterdir()} - {"bin"}
    assert names == {package.name for package in packages} | {f"otelexec-{version}.dist-info"}


def test_the_wheel_holds_every_file_of_the_packages_and_the_typing_marker(packages: list[Path], wheel: Path) -> None:
    expected = {
        file.relative_to(package.parent).as_posix()
        for package in packages
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert shipped == expected
    assert {f"{package.name}/py.typed" for package in packages} <= shipped


def test_the_wheel_holds_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_the_installed_package_is_imported_from_where_it_was_installed(installed: Path, tmp_path: Path) -> None:
    # -P and another working folder: neither the script's folder nor the checkout may stand in for what was installed.
    origin = run(sys.executable, "-P", "-c", "import otelexec; print(otelexec.__file__)", cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(origin.strip()) == installed / "otelexec" / "__init__.py"


def test_importing_the_package_makes_no_warning(installed: Path, tmp_path: Path) -> None:
    run(sys.executable, "-P", "-W", "error", "-c", "import otelexec", cwd=tmp_path, PYTHONPATH=str(installed))


def test_the_command_is_installed_and_starts(installed: Path, tmp_path: Path) -> None:
    assert "demo" in run(sys.executable, "-P", installed / "bin" / "otelexec", "--help", cwd=tmp_path, PYTHONPATH=str(installed))


def test_every_entry_point_can_be_loaded(installed: Path, tmp_path: Path) -> None:
    script = """
from importlib.metadata import PathDistribution
from pathlib import Path
(info,) = Path({target!r}).glob("*.dist-info")
for point in PathDistribution(info).entry_points:
    print(point.group, point.name, callable(point.load()))
"""
    printed = run(sys.executable, "-P", "-c", script.format(target=str(installed)), cwd=tmp_path, PYTHONPATH=str(installed))
    assert set(printed.splitlines()) == {
        "console_scripts otelexec True",
        "opentelemetry_id_generator otelexec True",
        "opentelemetry_instrumentor otelexec_celery True",
        "opentelemetry_instrumentor otelexec_rq True",
        "otelexec.commands trigger True",
    }


def test_the_source_archive_holds_what_is_named_and_no_environment(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ROOT)
    (archive,) = tmp_path.glob("*.tar.gz")
    names = run("tar", "--list", "--file", archive).split()
    assert {"pyproject.toml", "Makefile", "LICENSE", "otelexec", "tests"} <= {name.split("/")[1] for name in names}
    assert not [name for name in names if re.search(r"/\.venv|site-packages|__pycache__|\.whl$", name)]


def test_the_oldest_versions_tested_are_the_lower_bounds(project: dict[str, Any]) -> None:
    oldest = dict(line.split("==") for line in (ROOT / "constraints-min.txt").read_text().splitlines() if line and not line.startswith("#"))
    bounds = dict(dependency.split(">=") for dependency in project["project"]["dependencies"])
    assert bounds == {name: oldest[name] for name in bounds}
