"""Which process this is, and whether another one lives: host, boot id, pid namespace, pid and its start time."""

from __future__ import annotations

import os
import socket
import uuid
from functools import cache
from pathlib import Path
from typing import Literal

from otelexec.store.rows import ProcessRow

_DEAD_STATES = frozenset("ZXx")

_MAX_BYTES = 4096
"""More than any of the one-line files of /proc that are read here."""


_described: set[str] = set()
"""Process ids of this process, one for each time that it was configured; an `os.execv` forgets them."""


@cache  # only what was read: a process without a descriptor left asks again
def _read_boot_id() -> str:
    return _read("/proc/sys/kernel/random/boot_id").strip()


def _boot_id() -> str:
    try:
        return _read_boot_id()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _read(path: str) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, _MAX_BYTES).decode("ascii", "replace")  # a worker that forks for each job pays for a file object at each
    finally:
        os.close(descriptor)


def _look(pid: int) -> tuple[str, int] | None:
    """
    Look at a process of this namespace.

    Returns:
        The state letter and the start time in clock ticks since boot (proc(5), /proc/pid/stat), `("", 0)` when there is none;
        None where it can't be looked at: no descriptor is left, or /proc hides the processes of others (its option hidepid).
    """
    try:
        # The command name in parentheses may hold anything, spaces and parentheses too.
        _, _, rest = _read(f"/proc/{pid}/stat").rpartition(")")
        fields = rest.split()
        return fields[0], int(fields[19])  # field 22 of the file
    except (FileNotFoundError, ProcessLookupError):
        return ("", 0) if _is_gone(pid) else None
    except (OSError, IndexError, ValueError):
        return None


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is somebody else's
        return False
    return False


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
    found = _look(pid)
    _described.add(process_id)
    return ProcessRow(
        process_id=process_id,
        host=socket.gethostname(),
        boot_id=_boot_id() if found else "",  # without a start time others must go by the lease
        pid_namespace=_pid_namespace(),
        pid=pid,
        pid_start=found[1] if found else 0,
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
    found = _look(process.pid) if is_here(process) else None
    if found is not None:
        # A program that is replaced by another one (`os.execv`, as some reloaders do) keeps pid and start time.
        is_replaced = process.pid == os.getpid() and process.process_id not in _described
        return "alive" if _is_same(found, process.pid_start) and not is_replaced else "dead"
    # Also after a reboot: another machine may carry the same name, so a boot that differs proves nothing.
    lease_ns = int(process.lease_seconds * 1e9)
    return "alive" if now_unix_ns - process.heartbeat_unix_ns <= lease_ns else "lapsed"


def parent_of_this_process() -> tuple[int, int]:
    """Give the parent's pid and its start time in clock ticks since boot; 0 for the latter where it can't be seen."""
    pid = os.getppid()
    found = _look(pid)
    return pid, found[1] if found else 0


def is_alive(pid: int) -> bool:
    """Tell whether a pid of this namespace is a process that runs, or can't be seen; one that nobody has waited for yet does not run."""
    found = _look(pid)
    return found is None or (bool(found[0]) and found[0] not in _DEAD_STATES)


def has_living_parent(process: ProcessRow) -> bool:
    """Tell whether a process of this host has a parent that reports its death, and that lives or can't be seen."""
    if not process.parent_pid or not is_here(process):
        return False
    found = _look(process.parent_pid)
    return found is None or _is_same(found, process.parent_start)


def _is_same(found: tuple[str, int], start: int) -> bool:
    return found[1] == start and found[0] not in _DEAD_STATES


def is_here(process: ProcessRow) -> bool:
    """Tell whether its pid means something here: the same boot of the same kernel, the same pid namespace."""
    return bool(process.boot_id) and process.boot_id == _boot_id() and process.pid_namespace == _pid_namespace()
