"""Chains, groups and chords through a real worker: who asked for what, and what links to what."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import celery
import pytest
from celery.exceptions import ChordError

import otelexec
from otelexec import semconv
from otelexec.store.records import ExecutionRecord
from tests.integrations.celery.conftest import Fresh
from tests.integrations.celery.stage import Stage
from tests.integrations.stage import Seen
from tests.records import until

RESULT_SECONDS = 25.0
chain: Any = celery.chain
chord: Any = celery.chord
group: Any = celery.group


def parents_of(result: Any) -> list[Any]:
    """Give the results of a chain, the first task's first."""
    found = []
    while result is not None:
        found.append(result)
        result = result.parent
    return found[::-1]


def links_of(seen: Seen, number: int = 1) -> set[tuple[str, str]]:
    return {(link.trace_id, link.span_id) for link in seen.consumer(number).links}


def last_span(seen: Seen) -> tuple[str | None, str | None]:
    return seen.attempts[-1].trace_id, seen.attempts[-1].span_id


def test_a_chain_is_one_trace_each_task_asked_for_by_the_one_before(common: Stage) -> None:
    add = common.task("add")
    with otelexec.correlate(source="test") as correlation:
        result = chain(add.s(1, 2), add.s(3), add.s(4)).apply_async()
    assert result.get(timeout=RESULT_SECONDS) == 10
    links = [common.ended(each.id, "succeeded") for each in parents_of(result)]
    assert [seen.record.request_id for seen in links] == [correlation.request_id] * 3
    assert links[0].record.execution_id == correlation.execution_id
    for before, after in pairwise(links):
        assert after.record.parent_execution_id == before.record.execution_id
        assert after.producers[0].trace_id == before.attempt.trace_id
        assert after.producers[0].parent_span_id == before.attempt.span_id


def test_chain_headers_do_not_come_from_the_signature(common: Stage) -> None:
    who = common.task("who")
    result = chain(who.si(), who.si()).apply_async(headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"})
    told = result.get(timeout=RESULT_SECONDS)
    assert told["trace_id"] != "a" * 32


def test_a_failed_link_ends_the_chain_and_its_errback_is_correlated(common: Stage) -> None:
    fail, add, note = common.task("fail"), common.task("add"), common.task("note.one")
    errback_id = f"errback-{time.time_ns()}"
    with otelexec.correlate(source="test") as correlation:
        result = chain(fail.si("first"), add.si(1, 2)).apply_async(link_error=note.s().set(task_id=errback_id))
    first = parents_of(result)[0]
    seen = common.ended(first.id, "failed")
    errback = common.ended(errback_id, "succeeded")
    assert {seen.record.request_id, errback.record.request_id} == {correlation.request_id}
    assert errback.record.parent_execution_id == seen.record.execution_id
    assert errback.attempt.trace_id == seen.attempt.trace_id


def test_a_group_of_starmap_and_chunks_gives_its_results(common: Stage) -> None:
    add = common.task("add")
    result = group(add.starmap([(1, 2), (3, 4)]), add.s(5, 6)).apply_async()
    assert result.get(timeout=RESULT_SECONDS) == [[3, 7], 11]
    chunks = add.chunks([(number, number) for number in range(4)], 2).apply_async()
    assert chunks.get(timeout=RESULT_SECONDS) == [[0, 2], [4, 6]]
    for each in (*result.results, *chunks.results):
        common.ended(each.id, "succeeded")


def test_a_task_that_replaces_itself_and_its_replacement_are_two_executions(common: Stage) -> None:
    """Both have one task id in Celery, one after the other."""
    with otelexec.correlate(source="test") as correlation:
        result = common.task("replaces").delay()
    assert result.get(timeout=RESULT_SECONDS) == 5

    def both() -> list[ExecutionRecord]:
        found = [record for record in common.records() if record.request_id == correlation.request_id]
        return found if len(found) == 2 and all(record.state == "succeeded" for record in found) else []

    first, second = until(both, RESULT_SECONDS)
    assert [(record.name, record.attempts[0].classification) for record in (first, second)] == [("replaces", "ignored"), ("add", None)]
    assert second.parent_execution_id == first.execution_id
    assert not second.attempts[0].duplicate
    told = [span for span in common.spans() if span.attributes.get(semconv.MESSAGING_MESSAGE_ID) == result.id]
    assert sorted(span.kind for span in told) == ["consumer", "consumer", "producer", "producer"]


def header(stage: Stage, size: int, **options: Any) -> Sequence[Any]:
    return [stage.task("part").s(number, **options) for number in range(size)]


def check_chord(stage: Stage, result: Any, size: int, request_id: str, retried: Sequence[int]) -> None:
    body = stage.ended(result.id, "succeeded")
    parts = [
        stage.ended(each.id, *(("failed", "succeeded") if number in retried else ("succeeded",)))
        for number, each in enumerate(result.parent.results)
    ]
    assert len(parts) == size
    assert {seen.record.request_id for seen in (body, *parts)} == {request_id}
    assert {last_span(seen) for seen in parts} <= links_of(body)


def test_a_chord_of_fifty_links_every_header_from_its_body(common: Stage) -> None:
    retried = (3, 7, 40)
    with otelexec.correlate(source="test") as correlation:
        result = chord(header(common, 50, retries=retried), common.task("total").s()).apply_async()
    assert result.get(timeout=RESULT_SECONDS) == sum(range(50))
    check_chord(common, result, 50, correlation.request_id, retried)


BODIES: Mapping[str, Callable[[Any, Any, Any], Any]] = {
    "a chain": lambda first, _, last: chain(first, last),
    "a group": lambda first, second, _: group(first, second),
    "a chain that begins with a group": lambda first, second, last: chain(group(first, second), last),
}


def check_body(stage: Stage, form: str) -> None:
    """Check that whatever a chord sends first when its headers are done links to all of them."""
    own = f"{form}-{time.time_ns()}"
    parts = [part.set(task_id=f"{own}-part-{number}") for number, part in enumerate(header(stage, 3))]
    first, second, last = (stage.task("note").s().set(task_id=f"{own}-{name}") for name in ("first", "second", "last"))
    chord(parts, BODIES[form](first, second, last)).apply_async()
    headers = {last_span(stage.ended(f"{own}-part-{number}", "succeeded")) for number in range(3)}
    for name in ("first",) if form == "a chain" else ("first", "second"):
        assert headers <= links_of(stage.ended(f"{own}-{name}", "succeeded"))


@pytest.mark.parametrize("form", BODIES)
def test_the_beginning_of_a_body_links_to_every_header(common: Stage, form: str) -> None:
    check_body(common, form)


def test_a_chord_with_a_failed_header_has_no_body_and_a_correlated_errback(common: Stage) -> None:
    errback_id = f"chord-errback-{time.time_ns()}"
    body = common.task("total").s().on_error(common.task("note.one").s().set(task_id=errback_id))
    with otelexec.correlate(source="test") as correlation:
        result = chord(header(common, 10, fails=(4,), retries=(1,)), body).apply_async()
    with pytest.raises((ChordError, ValueError)):  # which one is told depends on what is looked at first
        result.get(timeout=RESULT_SECONDS)
    assert common.look(result.id) is None
    failed = common.ended(result.parent.results[4].id, "failed")
    errback = common.ended(errback_id, "succeeded")
    assert {failed.record.request_id, errback.record.request_id} == {correlation.request_id}


def test_a_chord_that_is_unlocked_by_polling(fresh: Fresh, tmp_path: Path) -> None:
    stage = fresh(result_backend=tmp_path.as_uri(), result_chord_retry_interval=0.2)
    worker = stage.worker("polling", "prefork", 4)
    with otelexec.correlate(source="test") as correlation:
        result = chord(header(stage, 50, retries=(2, 30)), stage.task("total").s()).apply_async()
    assert result.get(timeout=RESULT_SECONDS) == sum(range(50))
    check_chord(stage, result, 50, correlation.request_id, (2, 30))
    check_body(stage, "a chain")
    assert worker.stop() == 0
    worker.check_log()
    stage.check_agreement()
