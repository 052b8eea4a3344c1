from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from otelexec.ids import mint_id, random_word
from otelexec.spans import SecureIdGenerator

MANY = 1_000


def draw() -> list[int]:
    return [random_word() for _ in range(MANY)]


def test_threads_never_draw_the_same_word() -> None:
    with ThreadPoolExecutor(32) as pool:
        drawn = [word for words in pool.map(lambda _: draw(), range(32)) for word in words]
    assert len(set(drawn)) == 32 * MANY
    assert max(drawn) < 2**64


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_never_repeats_what_its_parent_draws() -> None:
    """Words are fetched in advance, and a fork copies those that are left."""
    for fetched in (1, 2, 100):
        for _ in range(fetched):
            random_word()
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            generator = SecureIdGenerator()
            drawn = [*(random_word() for _ in range(20)), generator.generate_span_id(), generator.generate_trace_id()]
            os.write(writing, " ".join(f"{word:x}" for word in drawn).encode() + b" " + mint_id().encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            theirs = set(pipe.read().split())
        assert os.waitpid(pid, 0)[1] == 0
        generator = SecureIdGenerator()
        ours = [*(random_word() for _ in range(20)), generator.generate_span_id(), generator.generate_trace_id()]
        assert len(theirs) == 23
        assert theirs.isdisjoint({f"{word:x}" for word in ours})
