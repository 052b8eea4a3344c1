"""Whether a process lives: looked at where that is possible, by its lease where it is not."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from otelexec import identity
from otelexec.store.rows import ProcessRow

LEASE_SECONDS = 10.0
IN_TIME, TOO_LATE = 5_000_000_000, 15_000_000_000


def process(pid: int | None = None) -> ProcessRow:
    row = identity.this_process("p", lease_seconds=LEASE_SECONDS, resource=b"", scope=b"")
    return row if pid is None else replace(row, pid=pid)


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def states(row: ProcessRow) -> tuple[str, str]:
    return identity.liveness(row, IN_TIME), identity.liveness(row, TOO_LATE)


def test_a_process_that_is_seen_lives_whatever_its_lease_says() -> None:
    assert states(process()) == ("alive", "alive")
    assert identity.is_alive(os.getpid())


def test_a_process_that_is_gone_is_dead_at_once() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    row = replace(process(child.pid), pid_start=_start_of(child.pid))
    assert states(row) == ("alive", "alive")
    child.communicate()
    assert states(row) == ("dead", "dead")
    assert not identity.is_alive(child.pid)


def test_a_pid_that_another_process_has_by_now_is_dead() -> None:
    row = process()
    assert states(replace(row, pid_start=row.pid_start - 1)) == ("dead", "dead")


def test_without_a_descriptor_left_the_lease_decides() -> None:
    """Whoever reconciles then must not close the attempts of processes that it can't look at."""
    row = process()
    parented = replace(row, parent_pid=os.getpid(), parent_start=row.pid_start)
    with no_descriptor_left():
        assert states(row) == ("alive", "lapsed")
        assert identity.is_alive(os.getpid())
        assert identity.has_living_parent(parented)


def test_a_process_that_could_not_look_at_itself_goes_by_its_lease_for_others() -> None:
    with no_descriptor_left():
        row = process()
    assert states(row) == ("alive", "lapsed")


def test_a_process_that_proc_hides_goes_by_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with /proc mounted with hidepid, or under systemd's ProtectProc: there is no such file, and yet such a process."""
    row = process()

    def hidden(path: str) -> str:
        raise FileNotFoundError(path)

    def somebody_elses(pid: int, number: int) -> None:
        raise PermissionError(pid, number)

    monkeypatch.setattr(identity, "_read", hidden)
    assert states(row) == ("alive", "lapsed")
    monkeypatch.setattr(os, "kill", somebody_elses)
    assert states(row) == ("alive", "lapsed")


def _start_of(pid: int) -> int:
    found = identity._look(pid)
    assert found is not None
    return found[1]
