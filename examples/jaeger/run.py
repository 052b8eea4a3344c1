#!/usr/bin/env python3
"""
Run a real Jaeger v2 on loopback, without Docker.

Release tags of Jaeger v2 can't be had by `go install`, so the first run builds the command from its Go module (Go is needed,
four minutes on two cores and 3 GB in Go's own caches) and keeps the binary in the user's cache folder; later runs start at once.
The ports are those of `config.yaml`, each from an environment variable: `JAEGER_UI_PORT`, `JAEGER_OTLP_HTTP_PORT` and so on.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "config.yaml"
MODULE = "github.com/jaegertracing/jaeger"
COMMAND = f"{MODULE}/cmd/jaeger"
PROGRESS_SECONDS = 20
SHOWN_LINES_OF_A_FAILED_BUILD = 15


def main() -> None:
    """Find or build Jaeger, then become it."""
    parser = argparse.ArgumentParser(description="Run a real Jaeger v2 on loopback, without Docker.")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--build-only", action="store_true", help="build the binary if it is missing, and stop")
    only.add_argument("--print-binary", action="store_true", help="print where the binary is; exit 1 if it is not built yet")
    arguments = parser.parse_args()

    version = jaeger_version()
    binary = cache_folder() / f"jaeger-{version}" / "jaeger"
    if arguments.print_binary:
        print(binary)
        sys.exit(0 if binary.exists() else 1)
    if not binary.exists():
        build(binary, version)
    if arguments.build_only:
        say(f"Jaeger {version}: {binary}")
    else:
        run(binary)


def jaeger_version() -> str:
    """Give the version that `go.mod` requires, which is the one place that names it."""
    match = re.search(rf"^require {re.escape(MODULE)} (\S+)$", (HERE / "go.mod").read_text(), re.MULTILINE)
    if match is None:
        sys.exit(f"{HERE / 'go.mod'} has no line 'require {MODULE} VERSION'.")
    return match[1]


def cache_folder() -> Path:
    """Give the user's cache folder for otelexec; relative values of the variable don't count (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "otelexec"


def build(binary: Path, version: str) -> None:
    """
    Build Jaeger beside its final place and move it there, so that a half-written binary is never found.

    Args:
        binary: Where the finished binary goes.
        version: The module's version, for the messages.

    Raises:
        SystemExit: Go is missing, or it could not download or build; the message says which.
    """
    go = shutil.which("go")
    if go is None:
        sys.exit("Building Jaeger needs Go 1.25 or newer, and there is no 'go' on PATH. With Docker: examples/compose.yaml.")
    binary.parent.mkdir(parents=True, exist_ok=True)
    with (binary.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if binary.exists():
            return
        with tempfile.TemporaryDirectory(dir=binary.parent, prefix="build-") as folder:
            here = Path(folder)
            for name in ("go.mod", "jaeger.go"):
                shutil.copy(HERE / name, here)
            say(f"Downloading Jaeger {version} ...")
            module = json.loads(run_go([go, "mod", "download", "-json", MODULE], here))
            # Jaeger's own sums: the public checksum database does not answer for every one of its dependencies.
            (here / "go.sum").write_bytes((Path(module["Dir"]) / "go.sum").read_bytes())
            say("Building it: once per machine, about four minutes on two cores ...")
            run_go([go, "build", "-mod=mod", "-o", "jaeger", COMMAND], here)
            (here / "jaeger").replace(binary)


def run_go(command: list[str], folder: Path) -> str:
    """
    Run a Go command, saying now and then that it is still at it.

    Returns:
        What it printed.

    Raises:
        SystemExit: It failed; the message ends with the last lines of its errors.
    """
    # A go.work above the folder would take the build over.
    environment = os.environ | {"GOWORK": "off"}
    started = time.monotonic()
    logs = folder / "stdout", folder / "stderr"
    with logs[0].open("w") as output, logs[1].open("w") as errors:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=errors)
        try:
            while (status := poll(process)) is None:
                say(f"  {time.monotonic() - started:.0f} s: {last_lines(logs[1], 1) or 'compiling'}")
        finally:
            process.kill()
    if status != 0:
        shown = "\n".join(last_lines(log, SHOWN_LINES_OF_A_FAILED_BUILD) for log in logs).strip()
        sys.exit(f"'{' '.join(command[:3])}' failed with status {status}:\n{shown}")
    return logs[0].read_text()


def poll(process: subprocess.Popen[bytes]) -> int | None:
    """Give the exit status as soon as there is one, None if there is none after `PROGRESS_SECONDS`."""
    try:
        return process.wait(timeout=PROGRESS_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def last_lines(file: Path, count: int) -> str:
    """Give the last lines of a text file."""
    return "\n".join(file.read_text(errors="replace").splitlines()[-count:])


def run(binary: Path) -> None:
    """Become Jaeger, after saying where it listens; Ctrl-C and signals then reach it directly."""
    ports = listening_ports()
    for variable, port in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                sys.exit(f"Port {port} on 127.0.0.1 can't be had ({error.strerror}). Set {variable} to another one, or end what listens.")
    say(f"Jaeger is starting: http://127.0.0.1:{ports['JAEGER_UI_PORT']} (Ctrl-C ends it, and its traces are gone with it)")
    say(f"OTLP: http://127.0.0.1:{ports['JAEGER_OTLP_HTTP_PORT']} (HTTP), 127.0.0.1:{ports['JAEGER_OTLP_GRPC_PORT']} (gRPC)")
    say("This build has the whole API (/api/v3/...) but a placeholder page instead of the web UI.")
    say("For the UI use examples/compose.yaml, or a released binary or image of Jaeger.")
    os.execv(binary, [str(binary), "--config", str(CONFIG)])


def listening_ports() -> dict[str, int]:
    """
    Give the variables that `config.yaml` takes its ports from, with their values of today.

    Raises:
        SystemExit: One of them is not a number.
    """
    ports: dict[str, int] = {}
    for match in re.finditer(r"\$\{env:(\w+):-(\d+)\}", CONFIG.read_text()):
        variable, default = match.groups()
        value = os.environ.get(variable, default)
        if not value.isdecimal():
            sys.exit(f"{variable} must be a port number, not {value!r}.")
        ports[variable] = int(value)
    return ports


def say(line: str) -> None:
    """Print a line for the user, at once; standard output stays free for `--print-binary`."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
