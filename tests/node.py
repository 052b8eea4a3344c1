"""Node and packages of it for tests, in a cache folder outside the tree."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

INSTALL_SECONDS = 240


def unavailable(reason: str) -> NoReturn:
    """Skip on a laptop; where CI runs, Node belongs to the machine."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI is set")
    pytest.skip(reason)


@dataclass(frozen=True)
class Node:
    """Runs scripts that may `require` the packages."""

    binary: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Give the environment of a script."""
        return os.environ | {"NODE_PATH": str(self.folder / "node_modules")}

    def run(
        self, *arguments: str, given: bytes | None = None, seconds: float = 60, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a script to its end."""
        return subprocess.run(
            [self.binary, *arguments],
            input=given,
            capture_output=True,
            timeout=seconds,
            check=False,
            env=self.environment | dict(environment or {}),
        )

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Start a script, with pipes, and leave it running."""
        return subprocess.Popen(
            [self.binary, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment, **options
        )


def node_with(packages: Mapping[str, str]) -> Node:
    """
    Give a Node with packages; they are installed once per machine.

    To be called before the test has a home of its own: in a fixture of the module or the session.

    Args:
        packages: Version by name.
    """
    binary, npm = shutil.which("node"), shutil.which("npm")
    if binary is None or npm is None:
        unavailable("node and npm are not installed")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "otelexec-tests" / "node"
    wanted = [f"{name}@{version}" for name, version in packages.items()]
    folder = cache / hashlib.sha256(" ".join(wanted).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes that run side by side install once
        if not (folder / ".done").exists():
            command = [npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--no-save", "--prefer-offline", *wanted]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
            except subprocess.TimeoutExpired:
                unavailable(f"npm did not answer within {INSTALL_SECONDS} s")
            if done.returncode:
                unavailable(f"npm could not install {', '.join(wanted)}: {done.stderr.strip()[-300:]}")
            (folder / ".done").touch()
    return Node(binary, folder)
