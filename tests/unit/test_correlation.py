"""The correlation, the scope that hands out its ids, and what of it is ambient."""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import baggage
from opentelemetry import context as otel_context
from opentelemetry.baggage import _BAGGAGE_KEY
from pydantic import BaseModel

from otelexec import runtime, settings
from otelexec.context import EXECUTION_KEY, current_scope
from otelexec.correlation import (
    AnyCorrelation,
    Correlation,
    ScheduleCorrelation,
    Scope,
    WebhookCorrelation,
    WorkflowCorrelation,
    correlate,
    enclosing,
    with_ambient,
)
from otelexec.errors import CorrelationError
from otelexec.ids import mint_id, normalize_id


@pytest.fixture(autouse=True, scope="module")
def _settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        values = settings.load()
        patch.setattr(runtime, "settings", lambda: values)
        yield


class Running:
    """An execution as far as correlation looks at it."""

    def __init__(self) -> None:
        self.correlation = Correlation.direct()

    @property
    def id(self) -> str:
        return self.correlation.execution_id

    def mark_retry_sent(self) -> None:
        raise AssertionError

    def mark_retry_refused(self) -> None:
        raise AssertionError


def inside(execution: Running) -> Any:
    return otel_context.attach(otel_context.set_value(EXECUTION_KEY, execution))


class TestIds:
    def test_a_minted_id_is_a_uuid_of_version_7_with_the_time_in_it(self) -> None:
        """RFC 9562, section 5.7: milliseconds since 1970 first, version 7, variant 10."""
        before = time.time_ns() // 1_000_000
        parsed = UUID(mint_id())
        assert parsed.version == 7
        assert parsed.variant == "specified in RFC 4122"
        assert before <= parsed.int >> 80 <= time.time_ns() // 1_000_000

    def test_ids_minted_one_after_the_other_sort_in_that_order(self) -> None:
        """The fraction of the millisecond is in the id, so text order is time order down to a quarter of a microsecond."""
        ids = []
        for _ in range(500):
            ids.append(mint_id())
            until = time.time_ns() + 1_000
            while time.time_ns() < until:
                pass
        assert ids == sorted(ids)

    def test_seeding_random_never_repeats_an_id(self) -> None:
        """A user's `random.seed()` has no say in ids."""
        ids = set()
        for _ in range(1_000):
            random.seed(0)
            ids.add(mint_id())
        assert len(ids) == 1_000

    def test_threads_mint_no_id_twice(self) -> None:
        """Eight threads that mint at once get different ids."""
        minted: list[list[str]] = [[] for _ in range(8)]
        threads = [threading.Thread(target=lambda own=own: own.extend(mint_id() for _ in range(5_000))) for own in minted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({one for own in minted for one in own}) == 40_000

    @given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=128))
    def test_printable_ascii_of_up_to_128_characters_is_an_id_as_it_is(self, value: str) -> None:
        """Ids are opaque: whatever fits is kept."""
        assert normalize_id(value) == (value, None)

    @given(st.one_of(st.text(min_size=129), st.text(min_size=1).filter(lambda text: not (text.isascii() and text.isprintable()))))
    def test_other_text_is_hashed_and_the_original_returned(self, value: str) -> None:
        """The same text always gives the same id of 64 hex digits."""
        made, original = normalize_id(value)
        assert (made, original) == normalize_id(value)
        assert len(made) == 64
        assert original is not None
        original.encode()
        assert len(original) <= 256

    def test_empty_text_gets_a_minted_id_each_time(self) -> None:
        """A hash of nothing would make one execution of everything that has no name."""
        assert normalize_id("")[0] != normalize_id("")[0]


class TestModel:
    def test_each_source_has_its_own_fields_only(self) -> None:
        """Seed behaviour 38: a webhook's members name no schedule and no workflow."""
        with correlate(source="webhook", webhook_id="wh", path="/p", provider="stripe", trigger_type="call") as webhook:
            assert isinstance(webhook, WebhookCorrelation)
            assert dict(webhook.fields) == {"webhook_id": "wh", "path": "/p", "provider": "stripe", "trigger_type": "call"}
        with correlate(source="schedule", schedule_id="s", scheduled_for=datetime(2026, 1, 2, tzinfo=UTC)) as schedule:
            assert isinstance(schedule, ScheduleCorrelation)
            assert dict(schedule.fields) == {"schedule_id": "s", "scheduled_for": "2026-01-02T00:00:00+00:00"}
        with correlate(source="workflow", workflow_id=7) as workflow:
            assert isinstance(workflow, WorkflowCorrelation)
            assert dict(workflow.fields) == {"workflow_id": "7"}
        with correlate(source="my own") as other:
            assert type(other) is Correlation
            assert dict(other.fields) == {}

    def test_members_lead_with_the_ids(self) -> None:
        """Whoever cuts a header at its end cuts the ids last."""
        correlation = WebhookCorrelation.model_validate(
            {"execution_id": "e", "request_id": "r", "parent_execution_id": "p", "extra": "x", "webhook_id": "w"}
        )
        assert list(correlation.members().items()) == [
            ("otelexec.execution_id", "e"),
            ("otelexec.request_id", "r"),
            ("otelexec.source", "webhook"),
            ("otelexec.parent_execution_id", "p"),
            ("otelexec.webhook_id", "w"),
            ("otelexec.extra", "x"),
        ]
        assert correlation.members() is correlation.members()

    @given(
        source=st.sampled_from(["workflow", "schedule", "webhook", "direct", "elsewhere"]),
        members=st.dictionaries(st.text(min_size=1, max_size=20), st.text(max_size=50), max_size=8),
    )
    def test_unknown_fields_come_back_as_they_were(self, source: str, members: dict[str, str]) -> None:
        """Seed behaviour 40: fields that this version doesn't know pass through it unchanged."""
        first = Correlation.from_members({"otelexec.source": source, **{f"otelexec.{name}": value for name, value in members.items()}})
        again = Correlation.from_members(first.members())
        assert again == first
        assert again.members() == first.members()
        assert type(again) is type(first)

    @given(st.dictionaries(st.text().map("otelexec.".__add__), st.text(st.characters(codec=None))))
    def test_any_members_make_a_correlation_that_can_be_written(self, members: dict[str, str]) -> None:
        """Seed behaviour 41: reading never raises, and what was read has valid ids and encodable text."""
        read = Correlation.from_members(members)
        for value in (read.execution_id, read.request_id):
            assert 1 <= len(value) <= 128
            assert value.isascii()
            assert value.isprintable()
        assert 1 <= len(read.source) <= 128
        for name, value in read.members().items():
            name.encode()
            value.encode()

    def test_names_that_only_spans_use_are_not_taken_from_a_carrier(self) -> None:
        """A message can't say how its own execution ends."""
        assert dict(Correlation.from_members({"otelexec.outcome": "succeeded", "otelexec.attempt": "9", "otelexec.x": "1"}).fields) == {
            "x": "1"
        }

    def test_an_id_that_had_to_be_hashed_keeps_its_original_as_a_field(self) -> None:
        """The hash is what travels; the original is there to be searched for."""
        with correlate(source="x", execution_id="Bestellung №7", request_id="é") as correlation:
            assert len(correlation.execution_id) == 64
            assert correlation.fields["original_execution_id"] == "Bestellung №7"
            assert correlation.fields["original_request_id"] == "é"
            assert "original_execution_id" not in correlation.child(None).fields
            assert correlation.child(None).fields["original_request_id"] == "é"

    def test_a_child_is_the_same_request_under_a_new_id(self) -> None:
        """Everything but execution id and parent stays."""
        parent = WebhookCorrelation(webhook_id="w")
        child = parent.child("p")
        assert child.execution_id != parent.execution_id
        assert child.parent_execution_id == "p"
        assert child.request_id == parent.request_id
        assert child.fields == parent.fields
        assert isinstance(child, WebhookCorrelation)
        assert child == WebhookCorrelation.model_validate(child.model_dump())

    def test_copies_never_show_cached_members_of_the_original(self) -> None:
        """`model_copy`, pickling and dumping see fields only."""
        first = Correlation(source="x")
        assert first.members()
        assert first.model_copy(update={"execution_id": "new"}).members()["otelexec.execution_id"] == "new"
        restored = pickle.loads(pickle.dumps(first))
        assert restored == first
        assert restored.members() == first.members()
        assert set(first.model_dump()) == {"execution_id", "request_id", "source", "parent_execution_id", "trigger_type"}

    def test_the_union_picks_the_model_by_source(self) -> None:
        """A user's own pydantic model can hold any correlation."""

        class Job(BaseModel):
            correlation: AnyCorrelation

        assert isinstance(Job.model_validate({"correlation": {"source": "webhook", "path": "/x"}}).correlation, WebhookCorrelation)
        assert type(Job.model_validate({"correlation": {"source": "cron", "n": 3}}).correlation) is Correlation

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"source": ""}, "source must be 1 to 128 characters"),
            ({"source": "x" * 129}, "source must be 1 to 128 characters"),
            ({"source": None}, "source must be"),
            ({"source": "webhook", "workflow_id": "w"}, "source='workflow': use attributes="),
            ({"source": "x", "colour": "red"}, "has no field 'colour': use attributes="),
            ({"source": "x", "attributes": {"execution_id": "e"}}, "'execution_id' is reserved"),
            ({"source": "x", "attributes": {"outcome": "lost"}}, "'outcome' is reserved"),
            ({"source": "x", "attributes": {"signature": "s"}}, "'signature' is reserved"),
            ({"source": "webhook", "attributes": {"path": "/"}}, "give it as path=..."),
            ({"source": "x", "attributes": {"a": []}}, "a must be text, a number, a date or a UUID, not list"),
            ({"source": "x", "attributes": {1: "a"}}, "attribute names must be text, not int"),
            ({"source": "x", "attributes": ["a"]}, "attributes must be a mapping"),
            ({"source": "x", "execution_id": ""}, "execution_id is empty"),
            ({"source": "x", "request_id": [1]}, "request_id must be text"),
            ({"source": "webhook", "path": b"/"}, "path must be text"),
        ],
    )
    def test_what_cannot_be_carried_is_refused_in_one_line(self, arguments: dict[str, Any], message: str) -> None:
        """The error says which name is wrong and what to do, and nothing is left attached."""
        with pytest.raises(CorrelationError) as caught, correlate(**arguments):
            pass
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert current_scope() is None

    def test_none_is_not_given_and_values_become_text(self) -> None:
        """Attributes that are None are left out; numbers, flags, dates and UUIDs have one spelling."""
        uuid = UUID(int=5)
        with correlate(
            source="x", attributes={"a": None, "n": 1.5, "yes": True, "day": datetime(2026, 1, 2, tzinfo=UTC).date(), "id": uuid}
        ) as made:
            assert dict(made.fields) == {"n": "1.5", "yes": "true", "day": "2026-01-02", "id": str(uuid)}


class TestScope:
    def test_ids_are_there_before_anything_else_happens(self) -> None:
        """Seed behaviour 34: the ids are fixed when the scope opens, not when something is run or sent."""
        with correlate(source="webhook") as correlation:
            scope = current_scope()
            assert scope is not None
            assert scope.correlation is correlation
            assert correlation.execution_id
            assert scope.trusted
            assert scope.links == ()
        assert current_scope() is None

    def test_the_scopes_own_id_is_taken_once(self) -> None:
        """Each further execution or message is one of its own in the same request."""
        scope = Scope(WebhookCorrelation(webhook_id="w", parent_execution_id="p"))
        first, second, third = scope.take(), scope.take(), scope.take()
        assert first is scope.correlation
        assert len({first.execution_id, second.execution_id, third.execution_id}) == 3
        assert {one.request_id for one in (first, second, third)} == {first.request_id}
        assert second.fields == first.fields
        assert second.parent_execution_id == "p"

    def test_of_many_threads_one_takes_the_scopes_own_id(self) -> None:
        """Taking is atomic."""
        for _ in range(50):
            scope = Scope(Correlation.direct())
            barrier = threading.Barrier(8)
            taken: list[str] = []

            def take(scope: Scope = scope, barrier: threading.Barrier = barrier, taken: list[str] = taken) -> None:
                barrier.wait()
                taken.append(scope.take().execution_id)

            threads = [threading.Thread(target=take) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(set(taken)) == 8
            assert taken.count(scope.correlation.execution_id) == 1

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_forked_children_never_share_the_scopes_id(self) -> None:
        """One id must not become several executions because a pool was forked inside the scope."""
        scope = Scope(Correlation.direct())
        read, write = os.pipe()
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                os.write(write, scope.take().execution_id.encode() + b"\n")
                os._exit(0)
            os.waitpid(pid, 0)
        os.close(write)
        with os.fdopen(read) as lines:
            children = lines.read().split()
        assert len({*children, scope.take().execution_id}) == 3
        assert scope.correlation.execution_id not in children

    def test_a_nested_scope_keeps_the_request(self) -> None:
        """The request id is inherited unless one is given."""
        with correlate(source="a", request_id="r1"):
            with correlate(source="b") as inner:
                assert inner.request_id == "r1"
                assert enclosing() is inner
            with correlate(source="c", request_id="r2") as other:
                assert other.request_id == "r2"

    def test_a_scope_in_an_execution_is_a_child_of_it(self) -> None:
        """Request and parent come from the execution, also when an outer scope is there."""
        execution = Running()
        with correlate(source="outer"):
            token = inside(execution)
            try:
                assert enclosing() is execution.correlation
                with correlate(source="inner") as inner:
                    scope = current_scope()
                    assert scope is not None
                    assert scope.execution is execution
                    assert inner.parent_execution_id == execution.id
                    assert inner.request_id == execution.correlation.request_id
                    assert baggage.get_baggage("otelexec.parent_execution_id") == execution.id
            finally:
                otel_context.detach(token)

    async def test_tasks_in_one_scope_share_it_and_leave_nothing_behind(self) -> None:
        """Seed behaviour 44: of 1,000 tasks each sees its own scope only, and the loop's context stays clean."""

        async def job(number: int) -> bool:
            with correlate(source="loop", attributes={"n": number}) as own:
                await asyncio.sleep(0)
                scope = current_scope()
                return scope is not None and scope.correlation is own and own.fields["n"] == str(number)

        assert all(await asyncio.gather(*(job(number) for number in range(1_000))))
        assert current_scope() is None
        assert baggage.get_all() == {}


class TestAmbient:
    def test_the_key_of_the_sdk_is_the_one_that_holds_its_baggage(self) -> None:
        """Guards the private name that `with_ambient` relies on."""
        context = baggage.set_baggage("k", "v", context=otel_context.Context())
        assert context[_BAGGAGE_KEY] == {"k": "v"}

    def test_request_source_and_parent_are_ambient_and_the_execution_id_is_not(self) -> None:
        """Else every HTTP callee would become an attempt at its caller's execution."""
        correlation = WebhookCorrelation(webhook_id="w")
        context = with_ambient(otel_context.Context(), correlation, "parent")
        assert baggage.get_all(context) == {
            "otelexec.request_id": correlation.request_id,
            "otelexec.source": "webhook",
            "otelexec.parent_execution_id": "parent",
        }
        assert "otelexec.parent_execution_id" not in baggage.get_all(with_ambient(context, correlation))

    def test_older_members_of_ours_go_and_those_of_others_stay(self) -> None:
        """Nothing of an earlier execution is left, and foreign baggage passes; the given context is not changed."""
        before = otel_context.Context()
        for name, value in {"tenant": "a", "otelexec.execution_id": "stale", "otelexec.webhook_id": "stale"}.items():
            before = baggage.set_baggage(name, value, context=before)
        before = otel_context.set_value("other", 1, before)
        after = with_ambient(before, Correlation(source="x"), None)
        assert set(baggage.get_all(after)) == {"tenant", "otelexec.request_id", "otelexec.source"}
        assert after["other"] == 1
        assert set(baggage.get_all(before)) == {"tenant", "otelexec.execution_id", "otelexec.webhook_id"}
        assert list(baggage.get_all(after))[-1] == "tenant"

    def test_the_allow_list_adds_fields(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The setting `ambient` names fields without the prefix."""
        values = settings.load(ambient="webhook_id, tenant")
        monkeypatch.setattr(runtime, "settings", lambda: values)
        with correlate(source="webhook", webhook_id="w", path="/", attributes={"tenant": "t"}):
            assert {name for name in baggage.get_all() if name.startswith("otelexec.")} == {
                "otelexec.request_id",
                "otelexec.source",
                "otelexec.webhook_id",
                "otelexec.tenant",
            }
