"""
Hosts of their own on this machine: network, host name, pids, boot id and clock, joined by a bridge with real TCP.

Each runs `python -m tests.acceptance.hosts` as its first process, which forks workers for the test that holds the other
end of its socket. Only root may make them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Final

from tests.servers import ROOT, missing

CLOCK_OFFSET: Final = "OTELEXEC_TEST_CLOCK_OFFSET_SECONDS"
"""How far the wall clock of a host's processes is ahead of this machine's; negative when behind."""

_READY_SECONDS: Final = 60.0

_numbers = count()

_BOOT: Final = """
ip link set lo up
hostname "$1"
mount --bind "$2" /proc/sys/kernel/random/boot_id
exec "$3" -m tests.acceptance.hosts "$4"
"""


def can_be_made() -> bool:
    """Tell whether this user and this machine can make them."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "hostname", "mount"))):
        return False
    name = f"otx{uuid.uuid4().hex[:6]}"
    if subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode:
        return False
    subprocess.run(["ip", "netns", "del", name], check=True)
    return subprocess.run(["unshare", "--uts", "--pid", "--mount", "--fork", "true"], check=False, capture_output=True).returncode == 0


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


class Network:
    """
    A bridge, and the hosts at it.

    Args:
        bridge: Its name.
        address: This machine's address there.
    """

    def __init__(self, bridge: str, address: str) -> None:
        self.bridge = bridge
        self.address = address

    @classmethod
    def new(cls) -> Network:
        """Give one with a name and an address that no other test uses at this time."""
        pid = os.getpid()
        return cls(f"otb{pid % 100_000}x{next(_numbers)}", f"10.{200 + pid % 50}.{pid // 50 % 250}.1")

    def make(self) -> None:
        """Make the bridge."""
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")

    def remove(self) -> None:
        """Remove the bridge, and what is left of hosts whose process was killed before it could remove them."""
        prefix = self.names(0)[0].removesuffix("0")
        listed = subprocess.run(["ip", "netns"], check=True, capture_output=True, text=True).stdout
        for name in (line.split()[0] for line in listed.splitlines() if line.startswith(prefix)):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], check=False, capture_output=True)

    def names(self, number: int) -> tuple[str, str, str]:
        """Give a host's network namespace, its link on this side, and its address."""
        name = self.bridge.removeprefix("otb")
        return f"otn{name}n{number}", f"otv{name}n{number}", f"{self.address.rpartition('.')[0]}.{number + 10}"


@contextmanager
def running_network() -> Iterator[Network]:
    """Have a network until the block ends; skips or fails the test where none can be made."""
    if not can_be_made():
        missing("hosts need root, iproute2 and util-linux")
    network = Network.new()
    network.make()
    try:
        yield network
    finally:
        network.remove()


class Host:
    """
    One host.

    Args:
        network: Where it is.
        number: Its number there.
        folder: For its boot id, its spool and its log.
        name: Its host name.
        environment: Of its processes.
        clock_offset: Seconds that its clock is ahead.
    """

    def __init__(
        self, network: Network, number: int, folder: Path, *, name: str, environment: Mapping[str, str], clock_offset: float = 0.0
    ) -> None:
        self.network = network
        self.name = name
        self.spool = folder / f"{name}-{number}.spool"
        self.log = folder / f"{name}-{number}.log"
        self.boots = 0
        self._boot_id = folder / f"{name}-{number}.boot"
        self._namespace, self._link, self._address = network.names(number)
        self._environment = {**environment, "OTELEXEC_SPOOL": str(self.spool), CLOCK_OFFSET: str(clock_offset), "HOSTNAME": name}
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def make(self) -> None:
        """Make its network and start it."""
        inner = f"{self._link}i"
        _ip("netns", "add", self._namespace)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", inner)
        _ip("link", "set", inner, "netns", self._namespace)
        _ip("link", "set", self._link, "master", self.network.bridge, "up")
        _ip("-n", self._namespace, "addr", "add", f"{self._address}/24", "dev", inner)
        _ip("-n", self._namespace, "link", "set", inner, "up")
        self.boot()

    def boot(self) -> None:
        """Start it with a new boot id."""
        self.boots += 1
        self._boot_id.write_text(f"{uuid.uuid4()}\n")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *("ip", "netns", "exec", self._namespace),
                    *("unshare", "--uts", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"),
                    *("sh", "-ec", _BOOT, "sh", self.name, str(self._boot_id), sys.executable, str(theirs.fileno())),
                ],
                env={**os.environ, **self._environment},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )
        ours.settimeout(_READY_SECONDS)
        self._socket = ours
        try:
            assert ours.recv(4096) == b"ready"
        except (AssertionError, TimeoutError):
            raise AssertionError(self.log.read_text(errors="replace")[-3000:]) from None
        ours.settimeout(120)

    def kill(self) -> None:
        """Let it die with all its processes at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def cut_off(self) -> None:
        """Take its link down: every packet from and to it is lost, and nobody is told."""
        _ip("link", "set", self._link, "down")

    def join_again(self) -> None:
        """Take its link up."""
        _ip("link", "set", self._link, "up")

    def remove(self) -> None:
        """Kill it and remove its network."""
        self.kill()
        subprocess.run(["ip", "netns", "del", self._namespace], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self._link], check=False, capture_output=True)

    def _ask(self, do: str, descriptors: tuple[int, ...] = (), **arguments: Any) -> int:
        assert self._socket is not None
        socket.send_fds(self._socket, [json.dumps({"do": do, **arguments}).encode()], descriptors)
        answer: int = json.loads(self._socket.recv(65536))
        return answer

    # What a queue needs of a host; see `redelivery.Here`.

    def start(self, jobs: int, answers: int, ledger: Path) -> int:
        """Fork a worker that reads jobs from one pipe and answers in another; gives its pid on this host."""
        return self._ask("start", (jobs, answers), ledger=str(ledger))

    def stop(self, pid: int) -> None:
        """Stop a worker where it is."""
        self._ask("stop", pid=pid)

    def end(self, pid: int) -> None:
        """Kill a stopped worker."""
        self._ask("end", pid=pid)

    def wait(self, pid: int) -> int:
        """Wait for a worker's end and give its status."""
        return self._ask("wait", pid=pid)

    def command(self, *arguments: str) -> int:
        """Run a command of `otelexec` on this host and give its wait status."""
        return self._ask("command", arguments=arguments)


@contextmanager
def running_hosts(
    network: Network, folder: Path, clock_offsets: Mapping[str, float], environment: Mapping[str, str]
) -> Iterator[list[Host]]:
    """
    Run hosts until the block ends.

    Args:
        network: Where they are.
        folder: For what they keep.
        clock_offsets: How far each one's clock is ahead, by its host name.
        environment: Of their processes, beside this one's.
    """
    with ExitStack() as stack:
        hosts = []
        for number, (name, offset) in enumerate(clock_offsets.items()):
            host = Host(network, number, folder, name=name, environment=environment, clock_offset=offset)
            stack.callback(host.remove)
            host.make()
            hosts.append(host)
        yield hosts


def _set_the_clock() -> None:
    """Move the wall clock of this process and of those that it forks, before anything has taken a reference to it."""
    offset = float(os.environ.get(CLOCK_OFFSET, "0"))
    seconds, nanoseconds = time.time, time.time_ns
    time.time = lambda: seconds() + offset
    time.time_ns = lambda: nanoseconds() + int(offset * 1e9)


def _serve(connection: socket.socket) -> None:
    """Do what the test asks for, one thing after the other, until it is gone."""
    from tests.acceptance.killing import forked
    from tests.acceptance.redelivery import serve

    connection.send(b"ready")
    while True:
        data, descriptors, _, _ = socket.recv_fds(connection, 65536, 2)
        if not data:
            return
        match json.loads(data):
            case {"do": "start", "ledger": ledger}:
                answer = os.fork()
                if answer == 0:
                    connection.close()
                    jobs, answers = descriptors
                    serve(jobs, answers, Path(ledger), socket.gethostname())
                for descriptor in descriptors:
                    os.close(descriptor)
            case {"do": "stop", "pid": pid}:
                os.kill(pid, signal.SIGSTOP)
                answer = os.waitpid(pid, os.WUNTRACED)[1]
            case {"do": "end", "pid": pid}:
                os.kill(pid, signal.SIGKILL)
                answer = os.waitpid(pid, 0)[1]
            case {"do": "wait", "pid": pid}:
                answer = os.waitpid(pid, 0)[1]
            case {"do": "command", "arguments": arguments}:
                answer = forked(lambda: _run(arguments), seconds=100)
            case _:
                answer = -1
        connection.send(json.dumps(answer).encode())


def _run(arguments: list[str]) -> None:
    from otelexec import cli

    assert cli.main(arguments) == 0, arguments


if __name__ == "__main__":
    _set_the_clock()
    _serve(socket.socket(fileno=int(sys.argv[1])))
