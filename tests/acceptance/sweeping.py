"""Runs the kill machinery in processes of their own, which have no threads and fork, and reads their reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.servers import ROOT


def report(module: str, folder: Path, *arguments: str, seconds: float) -> dict[str, Any]:
    """Run one machine and give its report; its log is beside its stores."""
    [answer] = reports(module, [(folder, arguments)], seconds=seconds)
    return answer


def reports(module: str, runs: Sequence[tuple[Path, Sequence[str]]], *, seconds: float) -> list[dict[str, Any]]:
    """Run a machine several times at once, each in a folder of its own, and give the reports."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    processes = []
    for folder, arguments in runs:
        folder.mkdir(parents=True)
        with (folder / "log").open("w") as log:
            command = [sys.executable, "-m", f"tests.acceptance.{module}", str(folder), *arguments]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=ROOT))
    answers = []
    try:
        for process, (folder, _) in zip(processes, runs, strict=True):
            stdout, _ = process.communicate(timeout=seconds)
            assert process.returncode == 0, (folder / "log").read_text(encoding="utf-8")[-4000:]
            answers.append(json.loads(stdout))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return answers


def together(answers: Sequence[dict[str, Any]], *counts: str) -> dict[str, int]:
    """Add up counts of several reports; fails with the first disagreements, if there are any."""
    failures = [failure for answer in answers for failure in answer["failures"]]
    assert not failures, f"{len(failures)} disagreements:\n" + "\n".join(failures[:20])
    return {count: sum(answer[count] for answer in answers) for count in counts}
