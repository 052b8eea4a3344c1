"""The provider of execution spans, beside whatever provider the user has; child spans and loose ones."""

# ruff: noqa: SIM117 (scope and execution are two things)

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider, sampling
from opentelemetry.sdk.trace import Span as SdkSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Decision, ParentBased, Sampler, SamplingResult

import otelexec
from otelexec import runtime
from otelexec.receiver import OtlpReceiver
from otelexec.spans import SecureIdGenerator
from tests.records import Records, until


class Stamping(SpanProcessor):
    """Sets an attribute on start, as tenant-stamping processors do, and remembers what it saw end."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended: list[str] = []

    def on_start(self, span: SdkSpan, parent_context: otel_context.Context | None = None) -> None:
        self.started.append(span.name)
        span.set_attribute("tenant", "acme")

    def on_end(self, span: ReadableSpan) -> None:
        self.ended.append(span.name)


class Tagging(Sampler):
    def should_sample(self, *args: object, **kwargs: object) -> SamplingResult:
        return SamplingResult(Decision.RECORD_AND_SAMPLE, {"sampled.by": "tagging"})

    def get_description(self) -> str:
        return "tagging"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def processor() -> Stamping:
    return Stamping()


@pytest.fixture
def theirs(exporter: InMemorySpanExporter, processor: Stamping) -> Iterator[TracerProvider]:
    provider = TracerProvider(resource=Resource({"service.name": "theirs", "team": "a"}), sampler=Tagging(), shutdown_on_exit=False)
    provider.add_span_processor(processor)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider
    provider.shutdown()


@pytest.mark.parametrize("how", ["global", "given"])
def test_a_user_s_provider_lends_resource_sampler_and_processors_and_never_sees_ours_end(
    records: Records, theirs: TracerProvider, exporter: InMemorySpanExporter, processor: Stamping, how: str
) -> None:
    if how == "global":
        trace.set_tracer_provider(theirs)
    else:
        otelexec.configure(tracer_provider=theirs)
    with otelexec.execution("job") as run, theirs.get_tracer("app").start_as_current_span("query"):
        pass
    with otelexec.publish("next", destination="invoices"):
        pass
    sent = records.span_named("send invoices").attributes
    assert (sent["sampled.by"], sent["otelexec.source"], sent["messaging.destination.name"]) == ("tagging", "direct", "invoices")
    span = records.span_named("job")
    assert span.attributes["otelexec.execution_id"] == run.id
    assert (span.resource["service.name"], span.resource["team"]) == ("theirs", "a")
    assert span.resource["host.name"] == socket.gethostname()
    assert (span.attributes["sampled.by"], span.attributes["tenant"]) == ("tagging", "acme")
    assert processor.started == ["job", "query", "send invoices"]
    assert processor.ended == ["query"]
    (theirs_span,) = exporter.get_finished_spans()
    assert theirs_span.parent is not None
    assert theirs_span.parent.span_id == run._execution.span.get_span_context().span_id
    assert {span.name for span in records.spans()} == {"job", "send invoices"}
    if how == "global":
        assert trace.get_tracer_provider() is theirs


def test_a_user_s_provider_lends_trace_ids_and_limits(records: Records) -> None:
    """A backend like AWS X-Ray reads the time out of a trace id; and whoever limits spans in code means all of them."""

    class Dated(RandomIdGenerator):
        def generate_trace_id(self) -> int:
            return 0x65F1A2B3 << 96 | super().generate_trace_id() & (1 << 96) - 1

    limits = SpanLimits(max_span_attribute_length=100, max_events=1)
    otelexec.configure(tracer_provider=TracerProvider(id_generator=Dated(), span_limits=limits, shutdown_on_exit=False))
    with otelexec.execution("job"):
        for _ in range(2):
            trace.get_current_span().add_event("row", {"sql": "x" * 200})
        trace.get_current_span().set_attribute("sql", "x" * 200)
    span = records.span_named("job")
    assert span.trace_id.startswith("65f1a2b3")
    assert (len(span.attributes["sql"]), len(span.events)) == (100, 1)


def test_a_processor_that_raises_on_start_alters_nothing(
    records: Records, theirs: TracerProvider, caplog: pytest.LogCaptureFixture
) -> None:
    class Raising(SpanProcessor):
        def on_start(self, span: SdkSpan, parent_context: otel_context.Context | None = None) -> None:
            raise RuntimeError("theirs")

    theirs.add_span_processor(Raising())
    otelexec.configure(tracer_provider=theirs)
    assert otelexec.execution("job")(lambda: 1)() == 1
    assert records.one().state == "succeeded"
    assert "otelexec.spans.on_start" in caplog.text


@pytest.mark.parametrize("store", ["own", "none"])
def test_a_processor_that_raises_on_end_alters_nothing(
    records: Records, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    """Whoever finds a global provider adds a processor to it; the SDK lets come out of `end()` what that raises."""

    class Raising(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            raise RuntimeError("theirs")

    if store == "none":
        monkeypatch.setenv("OTELEXEC_STORE", "none")
    provider = runtime.get().provider
    provider.add_span_processor(Raising())
    assert otelexec.execution("job")(lambda: 1)() == 1
    with pytest.raises(ValueError, match="mine"), otelexec.execution("failing"):
        raise ValueError("mine")
    with otelexec.publish("next"):
        pass
    assert caplog.text.count("otelexec.spans.on_end") == 3
    if store == "own":
        assert [records.named(name).state for name in ("job", "failing", "next")] == ["succeeded", "failed", "queued"]
        assert {span.name for span in records.spans()} >= {"job", "failing"}


def test_without_a_provider_ours_becomes_the_global_one_and_collects_children(records: Records) -> None:
    otelexec.configure(service_name="billing")
    tracer = trace.get_tracer("app")
    with otelexec.execution("job"), tracer.start_as_current_span("query", kind=trace.SpanKind.CLIENT) as query:
        query.set_attribute("rows", 3)
        with tracer.start_as_current_span("parse"):
            pass
    spans = {span.name: span for span in records.spans()}
    assert set(spans) == {"job", "query", "parse"}
    assert spans["query"].parent_span_id == spans["job"].span_id
    assert spans["parse"].parent_span_id == spans["query"].span_id
    assert (spans["query"].kind, spans["query"].attributes["rows"], spans["query"].scope) == ("client", 3, "app")
    assert {span.resource["service.name"] for span in spans.values()} == {"billing"}
    assert len({span.trace_id for span in spans.values()}) == 1
    rows = records.query("SELECT COUNT(*), SUM(count) FROM outbox")
    assert rows == [(1, 3)]


def test_the_resource_comes_from_the_environment_and_the_user_s_host_name_wins(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "from-env")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment=blue,host.name=named")
    with otelexec.execution("job"):
        pass
    resource = records.span_named("job").resource
    assert (resource["service.name"], resource["deployment"], resource["host.name"]) == ("from-env", "blue", "named")
    assert resource["service.instance.id"]


def test_children_over_the_limit_are_flushed_not_dropped(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTELEXEC_MAX_COLLECTED_SPANS", "10")
    tracer = trace.get_tracer("app")
    with otelexec.execution("job") as run:
        for number in range(95):
            with tracer.start_as_current_span(f"s{number}"):
                pass
        until(lambda: len(records.query("SELECT 1 FROM outbox")) >= 1)
        until(lambda: len(run._execution.children) < 10)
    assert len(records.spans()) == 96


def test_a_span_without_an_execution_goes_out_by_itself_within_a_second_or_so(records: Records) -> None:
    otelexec.configure()
    with trace.get_tracer("app").start_as_current_span("loose"):
        pass
    until(lambda: records.query_or_none("SELECT 1 FROM outbox"), 5)
    assert records.span_named("loose").parent_span_id is None
    assert records.all() == []


def test_a_span_that_ends_after_its_execution_goes_out_too(records: Records) -> None:
    tracer = trace.get_tracer("app")
    with otelexec.execution("job"):
        late = tracer.start_span("late")
        for _ in range(3):
            tracer.start_span("in time").end()
    late.end()
    until(lambda: "late" in {span.name for span in records.spans()})
    assert records.span_named("late").parent_span_id == records.attempt().span_id


def test_spans_that_end_in_other_threads_while_the_execution_closes_are_all_there(records: Records) -> None:
    tracer = trace.get_tracer("app")
    rounds, each, width = 30, 20, 4

    def end(context: otel_context.Context, go: threading.Barrier) -> None:
        spans = [tracer.start_span("child", context) for _ in range(each)]
        go.wait(10)
        for span in spans:
            span.end()

    for _ in range(rounds):
        go = threading.Barrier(width + 1)
        with otelexec.execution("job"):
            threads = [threading.Thread(target=end, args=(otel_context.get_current(), go)) for _ in range(width)]
            for thread in threads:
                thread.start()
            go.wait(10)
        for thread in threads:
            thread.join(10)
    # The background thread may have some in hand.
    until(lambda: [span.name for span in records.spans()].count("child") == rounds * each * width)


@pytest.mark.parametrize("how", ["carrier", "sampler"])
def test_an_unsampled_execution_is_recorded_with_null_ids_and_without_a_span(
    records: Records, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    carrier: dict[str, object] = {"_otelexec": {"traceparent": f"00-{1:032x}-{1:016x}-00"}} if how == "carrier" else {}
    if how == "sampler":
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    with otelexec.extract(carrier):
        with otelexec.execution("task") as run, trace.get_tracer("app").start_as_current_span("query"):
            with otelexec.execution("core", core=True):
                run.progress("x")
                otelexec.inject({})
        with pytest.raises(ValueError, match="x"), otelexec.execution("failed"):
            raise ValueError("x")
    assert records.spans() == []
    for record in records.all():
        (attempt,) = record.attempts
        assert (attempt.trace_id, attempt.span_id, attempt.outer_span_id) == (None, None, None)
    assert [record.state for record in records.all()] == ["succeeded", "failed"]
    assert records.named("core").attempts[0].outer_outcome == "succeeded"


def test_what_a_sampler_has_recorded_for_processors_alone_does_not_leave(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    class RecordOnly(Sampler):
        def should_sample(self, *args: object, **kwargs: object) -> SamplingResult:
            return SamplingResult(Decision.RECORD_ONLY)

        def get_description(self) -> str:
            return "record only"

    monkeypatch.setattr(sampling, "_get_from_env_or_default", RecordOnly)
    with otelexec.execution("task") as run, trace.get_tracer("app").start_as_current_span("query"):
        assert trace.get_current_span().is_recording()
        with otelexec.execution("core", core=True):
            run.progress("x")
            with otelexec.publish("next"):
                otelexec.inject({})
    with pytest.raises(ValueError, match="x"), otelexec.execution("failed"):
        raise ValueError("x")
    runtime.get().flush()
    assert records.spans() == []
    attempts = [attempt for record in records.all() for attempt in record.attempts]
    assert [(attempt.state, attempt.span_id) for attempt in attempts] == [("succeeded", None), ("failed", None)]


def test_a_parent_based_sampler_of_theirs_decides_for_ours(records: Records) -> None:
    otelexec.configure(tracer_provider=TracerProvider(sampler=ParentBased(ALWAYS_OFF), shutdown_on_exit=False))
    with otelexec.execution("job"):
        pass
    assert records.attempt().span_id is None


def test_the_scope_names_the_version(records: Records) -> None:
    with otelexec.execution("job"):
        pass
    ((request,),) = records.query("SELECT request FROM outbox")
    scope = ExportTraceServiceRequest.FromString(cast("bytes", request)).resource_spans[0].scope_spans[0].scope
    assert (scope.name, scope.version) == ("otelexec", otelexec.__version__)


def test_ids_do_not_come_from_the_random_module() -> None:
    """Must-hold row 7: a task that seeds it repeats no id."""
    import random

    generator = SecureIdGenerator()
    seen = set()
    for _ in range(3):
        random.seed(0)
        seen.add((generator.generate_trace_id(), generator.generate_span_id()))
    assert len({trace_id for trace_id, _ in seen}) == len({span_id for _, span_id in seen}) == 3


def test_a_body_may_end_or_rename_its_span_and_the_record_still_agrees(records: Records) -> None:
    with otelexec.execution("job"):
        trace.get_current_span().update_name("renamed")
        trace.get_current_span().set_attribute("otelexec.outcome", "mine")
        trace.get_current_span().set_status(trace.StatusCode.OK)
    (span,) = records.spans()
    assert (span.name, span.attributes["otelexec.outcome"], span.status) == ("renamed", "succeeded", "unset")
    with otelexec.execution("ended"):
        trace.get_current_span().end()
    attempt = records.named("ended").attempts[0]
    assert records.span(attempt.span_id).end_unix_ns == attempt.ended_unix_ns


def test_however_many_attributes_the_code_sets_the_span_keeps_its_ids(records: Records) -> None:
    """The SDK's limit, 128 by default, drops the oldest ones, which are ours."""
    with otelexec.correlate(source="webhook", webhook_id="w") as correlation, otelexec.execution("job"):
        trace.get_current_span().set_attributes({f"mine.{number}": number for number in range(200)})
    (span,) = records.spans()
    assert {name: span.attributes[name] for name in correlation.members()} == correlation.members()
    assert (span.attributes["mine.199"], span.attributes["otelexec.outcome"]) == (199, "succeeded")
    records.check_agreement()


def test_a_limit_on_the_length_of_attributes_cuts_no_id(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "10")
    with otelexec.execution("job"):
        pass
    records.check_agreement()
    assert records.spans()[0].attributes["otelexec.request_id"] == records.one().request_id
    with otelexec.publish("sent", destination="q") as message:
        pass
    assert records.span_named("send q").attributes["otelexec.execution_id"] == message.id
    with otelexec.execution("lost") as run:
        start = records.query("SELECT span_start FROM attempt WHERE state = 'running'")[0][0]
    assert isinstance(start, bytes)
    assert run.id.encode() in start  # for whoever ends it in place of this process


def test_a_sampler_that_fails_costs_the_span_and_not_the_work(records: Records, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Tagging):
        def should_sample(self, *args: object, **kwargs: object) -> SamplingResult:
            raise ValueError("sampler")

    otelexec.configure(tracer_provider=TracerProvider(sampler=Failing(), shutdown_on_exit=False))
    with otelexec.publish("sent", destination="q"):
        payload = otelexec.inject({})
    with otelexec.extract(payload):
        assert otelexec.execution("job")(lambda: "done")() == "done"
    assert (records.one().state, records.attempt().span_id, records.spans()) == ("succeeded", None, [])
    assert caplog.text.count("otelexec.span.failed") == 2


def test_record_and_span_start_and_end_at_the_same_nanosecond_and_never_backwards(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end is the wall-clock start plus the monotonic duration: a clock that is set back changes nothing."""
    import time

    with otelexec.execution("job"):
        monkeypatch.setattr(time, "time_ns", lambda: 1)
    monkeypatch.undo()
    attempt = next(iter(Records(records.path).one().attempts))
    assert attempt.ended_unix_ns is not None
    assert attempt.ended_unix_ns > attempt.started_unix_ns


def test_without_a_store_spans_go_the_usual_way_and_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, theirs: TracerProvider, exporter: InMemorySpanExporter, records: Records
) -> None:
    monkeypatch.setenv("OTELEXEC_STORE", "none")
    trace.set_tracer_provider(theirs)
    with contextlib.suppress(ValueError), otelexec.execution("job") as run:
        assert otelexec.current_execution() is run
        run.progress("x")
        run.set_output(1)
        raise ValueError("x")
    (span,) = exporter.get_finished_spans()
    assert span.attributes is not None
    assert (span.attributes["otelexec.outcome"], span.attributes["error.type"]) == ("failed", "ValueError")
    assert span.status.status_code is trace.StatusCode.ERROR
    assert not records.path.exists()


def test_without_a_store_the_span_around_a_core_carries_no_outcome_of_its_own(
    monkeypatch: pytest.MonkeyPatch, theirs: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    monkeypatch.setenv("OTELEXEC_STORE", "none")
    trace.set_tracer_provider(theirs)
    with contextlib.suppress(LookupError), otelexec.execution("task"):
        with otelexec.execution("job", core=True):
            pass
        raise LookupError
    attributes = {span.name: dict(span.attributes or {}) for span in exporter.get_finished_spans()}
    assert attributes["job"]["otelexec.outcome"] == "succeeded"
    assert attributes["task"]["otelexec.outer_outcome"] == "failed"
    assert "otelexec.outcome" not in attributes["task"]


@pytest.mark.parametrize(("name", "value"), [("PROTOCOL", "http/json"), ("ENDPOINT", "collector"), ("HEADERS", "token")])
def test_without_a_store_an_endpoint_that_can_not_be_used_keeps_no_work_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, value: str
) -> None:
    monkeypatch.setenv("OTELEXEC_STORE", "none")
    monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", value)
    job = otelexec.execution("job")(lambda: 7)
    assert [job(), job()] == [7, 7]
    [line] = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert f"OTEL_EXPORTER_OTLP_{name}" in line


def test_without_a_store_no_ended_span_is_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTELEXEC_STORE", "none")
    with OtlpReceiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        otelexec.configure()
        collector = runtime.get().collector
        tracer = runtime.get().provider.get_tracer("app")
        with otelexec.execution("job"):
            for _ in range(100):
                tracer.start_span("x").end()
        assert not collector.has_loose
        otelexec.shutdown()
        assert len(receiver.wait_for(101)) == 101


def test_without_a_store_no_exporter_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in tests without a collector, where each shutdown would wait for one."""
    monkeypatch.setenv("OTELEXEC_STORE", "none")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    with OtlpReceiver() as receiver:
        otelexec.configure(otlp_endpoint=receiver.endpoint)
        with otelexec.execution("job"):
            pass
        otelexec.shutdown()  # sends what there is to send
        assert receiver.requests == []


def test_the_log_says_which_store_it_is(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Relative paths are made absolute at configure() and named in one INFO line."""
    caplog.set_level(logging.INFO, logger="otelexec")
    monkeypatch.chdir(tmp_path)
    otelexec.configure(store="sqlite:///here.db")
    messages = [record.getMessage() for record in caplog.records if "otelexec.configured" in record.getMessage()]
    assert len(messages) == 1
    assert messages[0].endswith("/here.db")
    assert json.dumps(messages[0]).count("sqlite") <= 1
