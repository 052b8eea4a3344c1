"""What the lifecycle and the finalization want done: effects, and how a thread performs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from otelexec.errors import StoreError
from otelexec.store.writes import Write

if TYPE_CHECKING:
    from otelexec.runtime import Runtime


@dataclass(slots=True)
class Commit:
    """Commit a write; the driver sends back its result, or the StoreError that kept it out."""

    write: Write
    durable: bool
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Block:
    """Call a function that may block for a moment; the driver sends back what it returns."""

    function: Callable[[], Any]


Effect = Commit | Sleep | Block


def perform(runtime: Runtime, effect: Effect) -> Any:
    """Perform an effect in this thread."""
    if isinstance(effect, Commit):
        try:
            return runtime.journal.group.commit(effect.write, durable=effect.durable, timeout_seconds=effect.timeout_seconds)
        except StoreError as error:
            return error
    if isinstance(effect, Sleep):
        return time.sleep(effect.seconds)
    return effect.function()


def perform_without_waiting(runtime: Runtime, effect: Effect) -> Any:
    """
    Perform an effect where nothing may wait: for a coroutine or generator that is being dropped.

    The garbage collector may do that in the very thread that holds the lead. So the commit is done here if the lead is
    free, and else left for the next one.
    """
    if isinstance(effect, Commit):
        return runtime.journal.leave(effect.write, durable=effect.durable)
    if isinstance(effect, Block):
        return effect.function()
    return None


def run(runtime: Runtime, steps: Generator[Effect, Any, Any], *, how: Callable[[Runtime, Effect], Any] = perform) -> Any:
    """Run effects without a call to the end, in this thread, and give what the generator returns."""
    answer: Any = None
    while True:
        try:
            effect = steps.send(answer)
        except StopIteration as stop:
            return stop.value
        answer = how(runtime, effect)
