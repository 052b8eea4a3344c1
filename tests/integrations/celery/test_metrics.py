"""What workers measure, as the SDK's meter provider in their processes exports it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from tests.integrations.celery.conftest import Fresh
from tests.integrations.celery.tasks import METRICS
from tests.measuring import DURATION, LATENCY, RECONCILED, points

WAIT_SECONDS = 20.0


@pytest.mark.parametrize(
    ("pool", "arguments"),
    [("prefork", ()), ("prefork", ("--max-tasks-per-child=1",)), ("threads", ()), ("solo", ())],
    ids=["prefork", "recycled", "threads", "solo"],
)
def test_every_attempt_is_measured_once(fresh: Fresh, pool: str, arguments: Sequence[str]) -> None:
    """Also in a child that ends long before the provider's next export."""
    stage = fresh()
    worker = stage.worker("measured", pool, 2, arguments=arguments, environment={METRICS: str(stage.folder)})
    results = [stage.task("add").delay(1, 2) for _ in range(3)]
    results += [stage.task("fail").delay(), stage.task("flaky").delay(1), stage.task("add").apply_async((1, 2), countdown=1)]
    for result in results:
        stage.ended(result.id)  # not by its result: Celery may store RETRY after the next attempt's SUCCESS
    assert worker.stop() == 0
    waits, works = Counter[str](), Counter[tuple[str, str, str | None]]()
    for point in points(stage.folder, LATENCY):
        attributes = point["attributes"]
        waits[attributes["otelexec.execution.name"]] += point["count"]
        assert 0 <= point["min"] <= point["max"] < WAIT_SECONDS
        assert (attributes["messaging.system"], attributes["messaging.destination.name"]) == ("celery", stage.folder.name)
    for point in points(stage.folder, DURATION):
        attributes = point["attributes"]
        assert (attributes["messaging.system"], attributes["messaging.operation.name"]) == ("celery", "process")
        works[attributes["otelexec.execution.name"], attributes["otelexec.outcome"], attributes.get("error.type")] += point["count"]
    assert waits == {"add": 4, "fail": 1, "flaky": 2}
    assert works == {
        ("add", "succeeded", None): 4,
        ("fail", "failed", "ValueError"): 1,
        ("flaky", "failed", "ConnectionError"): 1,
        ("flaky", "succeeded", None): 1,
    }


def test_what_was_killed_is_counted_once_by_its_parent(fresh: Fresh) -> None:
    """Children that are forked after a death inherit what the main process has measured, and don't export it again."""
    stage = fresh()
    worker = stage.worker("measured", "prefork", 1, environment={METRICS: str(stage.folder)})
    for name, *arguments in (("die", stage.mark()), ("die", stage.mark()), ("killed.early",), ("add", 1, 2)):
        stage.ended(stage.task(name).delay(*arguments).id)
    assert worker.stop() == 0
    counted = [(point["attributes"], point["value"]) for point in points(stage.folder, RECONCILED)]
    ending = {"otelexec.outcome": "lost", "error.type": "killed"}
    assert sorted(counted, key=str) == [
        ({"otelexec.execution.name": "die", **ending}, 2),
        ({"otelexec.execution.name": "killed.early", **ending}, 1),
    ]
