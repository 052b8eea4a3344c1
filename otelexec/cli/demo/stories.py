"""What the demos ask for, and how each of it should end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from otelexec.store.records import ExecutionRecord

QUEUE: Final = "queue.db"
"""The file of the own queue, in the folder of the demo."""
SCHEDULED: Final = "cache.clean"
SCHEDULE: Final = "every-second"
SCHEDULE_SECONDS: Final = 1.0
SCHEDULE_TIMES: Final = 2
RATE_LIMITED: Final = "newsletter.send"
SEGMENTS: Final = 4
"""Of a video; in the middle of it the demo kills whoever encodes it."""


@dataclass(frozen=True, slots=True)
class Story:
    """
    What the demo asks for, and how that should end.

    Attributes:
        job: The executor.
        provider: Who sends the webhook; None for what is not asked for by one.
        attempts: How the attempts should end.
        payload: What the webhook says.
    """

    job: str
    provider: str | None
    attempts: tuple[str, ...] = ("succeeded",)
    payload: dict[str, Any] = field(default_factory=dict)


_BOTH: Final = (
    Story("video.encode", "studio", ("lost", "succeeded")),
    Story("export.build", "crm", ("cancelled",), {"rows": 200}),
    Story("order.import", "shop", payload={"order": 7, "items": ["tea", "pot"]}),
    Story("card.charge", "bank", ("failed",), {"card": "4242"}),
    Story("report.render", "crm", ("failed", "succeeded")),
    Story("feed.sync", "press", ("timed_out",)),
    Story(RATE_LIMITED, "crm"),
    Story(RATE_LIMITED, "crm", ("rejected",)),
    # A schedule asks for these, and another execution for that.
    *(Story(SCHEDULED, None) for _ in range(SCHEDULE_TIMES)),
    Story("receipt.send", None),
)
STORIES: Final = (*_BOTH, Story("contract.sign", "legal", ("paused", "succeeded"), {"party": "ACME"}))
CELERY_STORIES: Final = (*_BOTH, Story("stock.forecast", "shop", ("rejected",)))
"""No worker knows the last one."""
RQ_STORIES: Final = _BOTH
TRIGGER_STORIES: Final = _BOTH


def unexpected(records: Sequence[ExecutionRecord], stories: Sequence[Story]) -> list[str]:
    """Give a line for each story that ended in another way than it should."""
    expected = Counter((story.job, story.attempts) for story in stories)
    jobs = {story.job for story in stories}
    ended = Counter((record.name, tuple(attempt.state for attempt in record.attempts)) for record in records if record.name in jobs)
    missing, surprising = expected - ended, ended - expected
    # A real schedule may strike once more before it is ended.
    surprising.pop((SCHEDULED, ("succeeded",)), None)
    return [f"{name} should have ended as {', then '.join(states)}, and did not" for name, states in missing] + [
        f"{name} ended as {', then '.join(states) or 'nothing'}, which nobody expected" for name, states in surprising
    ]
