"""A control group with little memory: who takes more in it is killed by the kernel, as in a container."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

from tests.records import until

LIMIT_BYTES: Final = 64 * 2**20

_ROOT: Final = Path("/sys/fs/cgroup")


@contextmanager
def memory_limit() -> Iterator[Path]:
    """
    Make a control group of `LIMIT_BYTES`; skips the test where this user or this machine can't, and beside other tests.

    Yields:
        Its `cgroup.procs`: a process joins with its pid, and only what it takes from then on counts.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("the kills of tests beside it would be called `oom` as well; run it by itself: pytest -m memory")
    unified = (_ROOT / "cgroup.controllers").exists()
    group = (_ROOT if unified else _ROOT / "memory") / f"otelexec-test-{uuid.uuid4().hex[:8]}"
    limits = ("memory.max", "memory.swap.max") if unified else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
    try:
        group.mkdir()
        for limit in limits:
            # In this order, and the second is not there where swap is not counted.
            if limit == limits[0] or (group / limit).exists():
                (group / limit).write_text(str(LIMIT_BYTES), encoding="ascii")
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    try:
        yield group / "cgroup.procs"
    finally:
        until(lambda: _is_removed(group))


def _is_removed(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:  # EBUSY while its last process ends
        return False
    return True


def run_out_of(procs: Path) -> None:
    """Join a control group and take more memory than it has."""
    procs.write_text(str(os.getpid()), encoding="ascii")
    taken: list[bytes] = []
    while len(taken) < 4 * LIMIT_BYTES // 2**20:
        taken.append(b"x" * 2**20)
    raise AssertionError("the kernel let it live")
