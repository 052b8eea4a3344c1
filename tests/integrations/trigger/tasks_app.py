"""The tasks of the tests' workers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from otelexec_trigger import task

import otelexec


def count(mark: str) -> int:
    """Count one run of a task, and give which it is."""
    path = Path(mark)
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return len(path.read_text().splitlines())


@task("echo")
def echo(payload: Any) -> Any:
    return payload


@task("kind")
def kind(payload: Any) -> str:
    return type(payload).__name__


@task("who")
def who(payload: Any) -> dict[str, Any]:
    run = otelexec.current_execution()
    assert isinstance(run, otelexec.Execution)
    return {"id": run.id, "request": run.correlation.request_id, "attempt": run.attempt, "fields": dict(run.correlation.fields)}


@task("fail")
def fail(payload: Any) -> None:
    raise LookupError("no such thing")


@task("flaky")
def flaky(mark: str) -> str:
    if count(mark) == 1:
        raise ValueError("the first time")
    return "the second time"


@task("slow server")
def slow_server(mark: str) -> str:
    if count(mark) == 1:
        raise TimeoutError("of somebody else's server")
    return "the second time"


@task("reads")
def reads(_: Any) -> str:
    return subprocess.run(["cat"], capture_output=True, text=True, timeout=20, check=True).stdout


@task("sleep")
def sleep(payload: dict[str, Any]) -> str:
    count(payload["mark"])
    time.sleep(payload["seconds"])
    return "slept"


@task("nap")
async def nap(payload: dict[str, Any]) -> str:
    count(payload["mark"])
    await asyncio.sleep(payload["seconds"])
    return "napped"


@task("lingers")
async def lingers(payload: dict[str, Any]) -> None:
    """Wait for a thread that nothing can stop."""
    count(payload["mark"])
    await asyncio.to_thread(time.sleep, payload["seconds"])


@task("leaves a thread")
def leaves_a_thread(seconds: float) -> None:
    threading.Thread(target=time.sleep, args=(seconds,)).start()


@task("waits for a cancelled one")
async def waits_for_a_cancelled_one(_: object) -> None:
    inner = asyncio.create_task(asyncio.sleep(60))
    await asyncio.sleep(0)
    inner.cancel()
    await inner


@task("interrupts")
def interrupts(_: object) -> None:
    raise KeyboardInterrupt


@task("is closed")
def is_closed(_: object) -> None:
    raise GeneratorExit


@task("exits on a signal")
def exits_on_a_signal(_: object) -> None:
    before = signal.signal(signal.SIGUSR1, lambda _, frame: sys.exit(0))
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(60)
    finally:
        signal.signal(signal.SIGUSR1, before)


@task("gives up")
def gives_up(payload: dict[str, Any]) -> None:
    """Wait until it is cancelled, and then end in another way than by returning."""
    count(payload["mark"])
    run = otelexec.current_execution()
    deadline = time.monotonic() + 60
    while not run.cancel_requested and time.monotonic() < deadline:
        time.sleep(0.02)
    if payload["exits"]:
        raise SystemExit(0)
    raise RuntimeError("as somebody asked")


@task("heeds")
def heeds(mark: str) -> str:
    count(mark)
    run = otelexec.current_execution()
    deadline = time.monotonic() + 60
    while not run.cancel_requested and time.monotonic() < deadline:
        time.sleep(0.02)
    return "heeded"


@task("die")
def die(mark: str) -> str:
    if count(mark) == 1:
        os.kill(os.getpid(), 9)
    return "alive"


class Later:
    """A callable object whose call is a coroutine."""

    async def __call__(self, payload: Any) -> Any:
        await asyncio.sleep(0)
        return payload


task("later")(Later())


@task("passed on")
def passed_on(payload: Any) -> Any:
    """Give a coroutine, as a wrapper around a coroutine function does."""
    return Later()(payload)


@task("pid")
def pid(_: object) -> int:
    return os.getpid()


@task("exits")
def exits(payload: int) -> None:
    raise SystemExit(payload)


@task("leave")
def leave(payload: int) -> None:
    os._exit(payload)


@otelexec.execution("the.core", core=True)
def core(number: int) -> int:
    return number * 2


@task("cored")
def cored(payload: int) -> dict[str, int]:
    return {"twice": core(payload)}


@task("cored, and more")
def cored_and_more(payload: dict[str, str]) -> str:
    """Go on after the core until it is let go."""
    core(1)
    count(payload["mark"])
    deadline = time.monotonic() + 60
    while not Path(payload["go"]).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return "more"


@task("alone")
def alone(payload: dict[str, str]) -> bool:
    """Tell whether no other one of its kind ran at the same time."""
    count(payload["mark"])
    held = Path(payload["held"])
    try:
        held.touch(exist_ok=False)
    except FileExistsError:
        return False
    time.sleep(0.2)
    held.unlink()
    return True
