"""RQ's own tests, bare and with the adapter active: none that passes bare may fail, but for those that compare the whole of a meta."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from otelexec.store.sqlite import SqliteStore
from tests.integrations.own_suite import SET_UP_SECONDS, environment, passed, sources
from tests.queue_servers import running_valkey

ROOT = Path(__file__).resolve().parents[3]
NEEDED = ("pytest", "pytest-timeout", "psutil", "sentry-sdk")
PORT = 6379
"""Where they look for a server, and nowhere else."""
AT_LEAST = 600
"""So many pass bare in every supported version (3.0.0: 782); fewer means that something else is wrong."""
RUN_SECONDS = 900
COMPARE_THE_WHOLE_META: frozenset[str] = frozenset(
    {
        "tests.test_decorator.TestDecorator.test_decorator_accepts_meta_as_argument",
        "tests.test_job.TestJob.test_custom_meta_is_rewriten_by_save_meta",
        "tests.test_job.TestJob.test_persistence_of_typical_jobs",
        "tests.test_queue.TestUniqueJob.test_enqueue_unique_stores_job_data_correctly",
        "tests.test_scripts.TestSaveUniqueJob.test_enqueue_job_unique_stores_job_data_correctly",
    }
)


@pytest.mark.longest
@pytest.mark.timeout(SET_UP_SECONDS + 2 * RUN_SECONDS)
def test_none_that_passes_bare_fails_with_the_adapter(tmp_path: Path) -> None:
    version = importlib.metadata.version("rq")
    python = environment(tmp_path / "venv", f"rq=={version}", *NEEDED)
    source = sources(tmp_path, "rq", version, python)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "OTELEXEC_", "PYTEST_"))}
    own["PATH"] = f"{python.parent}{os.pathsep}{own['PATH']}"
    # Their package of tests is called as ours is, and their workers look for it.
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "otelexec").symlink_to(ROOT / "otelexec")
    instrumented = own | {
        "OTELEXEC_STORE": f"sqlite:///{tmp_path / 'own.db'}",
        "OTELEXEC_RELAY": "false",
        "OTELEXEC_RECONCILE": "false",
        "PYTHONPATH": os.pathsep.join((str(alone), str(ROOT / "integrations"), str(Path(__file__).parent))),
    }
    with running_valkey(tmp_path, PORT):
        run(python, source, own, tmp_path / "bare")
        run(python, source, instrumented, tmp_path / "instrumented", "-p", "own_suite_plugin")
    bare, with_ours = passed(tmp_path / "bare"), passed(tmp_path / "instrumented")
    assert len(bare) > AT_LEAST
    assert sorted(bare - with_ours - COMPARE_THE_WHOLE_META) == []
    store = SqliteStore(tmp_path / "own.db", create=False)
    assert len(list(store.executions())) > 1, "the adapter was not active"
    store.close()


def run(python: Path, source: Path, env: Mapping[str, str], result: Path, *arguments: str) -> None:
    command = [
        str(python),
        "-m",
        "pytest",
        "tests",
        *arguments,
        "-q",
        "--timeout",
        "120",
        "-p",
        "no:cacheprovider",
        f"--junitxml={result}.xml",
    ]
    with result.with_suffix(".log").open("wb") as log:
        # A session of its own: some of these tests kill their whole process group.
        started = subprocess.Popen(command, cwd=source, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        started.wait(RUN_SECONDS)
