"""Which process this is, and whether another one lives: host, boot id, pid namespace, pid and its start time."""

from __future__ import annotations

import os
import socket
import uuid
from functools import cache
from pathlib import Path
from typing import Literal

from otelexec.store.writes import ProcessRow

_DEAD_STATES = frozenset("ZXx")

_MAX_BYTES = 4096
"""More than any of the one-line files of /proc that are read here."""


@cache
def _boot_id() -> str:
    return _read("/proc/sys/kernel/random/boot_id").strip()


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _read(path: str) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return ""
    try:
        return os.read(descriptor, _MAX_BYTES).decode("ascii", "replace")  # a work horse asks, whose every job pays for a file object
    except OSError:  # the process has ended since
        return ""
    finally:
        os.close(descriptor)


def _state_and_start(pid: int) -> tuple[str, int]:
    """Give the state letter and the start time in clock ticks since boot (proc(5), /proc/pid/stat); empty when gone."""
    # The command name in parentheses may hold anything, spaces and parentheses too.
    _, _, rest = _read(f"/proc/{pid}/stat").rpartition(")")
    fields = rest.split()
    return (fields[0], int(fields[19])) if len(fields) > 19 else ("", 0)  # noqa: PLR2004 (field 22 of the file)


def this_process(process_id: str, *, lease_seconds: float, resource: bytes, scope: bytes, parent: tuple[int, int] = (0, 0)) -> ProcessRow:
    """
    Describe this process for the store.

    Args:
        process_id: Its minted id.
        lease_seconds: How long it may count as alive where nobody can look at it.
        resource: Its encoded OTLP resource.
        scope: Its encoded OTLP scope.
        parent: Pid and start time of the parent that reports its death; zeros when none does.
    """
    pid = os.getpid()
    return ProcessRow(
        process_id=process_id,
        host=socket.gethostname(),
        boot_id=_boot_id(),
        pid_namespace=_pid_namespace(),
        pid=pid,
        pid_start=_state_and_start(pid)[1],
        lease_seconds=lease_seconds,
        resource=resource,
        scope=scope,
        parent_pid=parent[0],
        parent_start=parent[1],
    )


def mint_process_id() -> str:
    """Mint the id of a process."""
    return uuid.uuid4().hex


def liveness(process: ProcessRow, now_unix_ns: int) -> Literal["alive", "dead", "lapsed"]:
    """
    Tell whether a process lives.

    Args:
        process: Its row.
        now_unix_ns: The store's clock.

    Returns:
        `dead` when it was looked at and is gone; `lapsed` when it can't be looked at from here and its lease is over.
    """
    if is_here(process):
        state, start = _state_and_start(process.pid)
        return "alive" if start == process.pid_start and state not in _DEAD_STATES else "dead"
    # Also after a reboot: another machine may carry the same name, so a boot that differs proves nothing.
    lease_ns = int(process.lease_seconds * 1e9)
    return "alive" if now_unix_ns - process.heartbeat_unix_ns <= lease_ns else "lapsed"


def parent_of_this_process() -> tuple[int, int]:
    """Give the parent's pid and its start time in clock ticks since boot; 0 for the latter where it can't be seen."""
    pid = os.getppid()
    return pid, _state_and_start(pid)[1]


def is_alive(pid: int) -> bool:
    """Tell whether a pid of this namespace is a process that runs; one that nobody has waited for yet does not."""
    state, _ = _state_and_start(pid)
    return bool(state) and state not in _DEAD_STATES


def has_living_parent(process: ProcessRow) -> bool:
    """Tell whether a process of this host has a parent that reports its death, and that lives."""
    if not process.parent_pid or not is_here(process):
        return False
    state, start = _state_and_start(process.parent_pid)
    return start == process.parent_start and state not in _DEAD_STATES


def is_here(process: ProcessRow) -> bool:
    """Tell whether its pid means something here: the same boot of the same kernel, the same pid namespace."""
    return bool(process.boot_id) and process.boot_id == _boot_id() and process.pid_namespace == _pid_namespace()
