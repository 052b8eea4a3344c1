"""What `otelexec.testing` gives to tests of code that uses otelexec."""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import otelexec
from otelexec.decoded import DecodedSpan
from otelexec.testing import IncrementalIdGenerator, OtlpReceiver, SteppingClock, span_tree
from tests.records import Records


def run_once(store: Path) -> tuple[list[DecodedSpan], object]:
    with IncrementalIdGenerator(), SteppingClock(start_unix_ns=1_000_000_000_000_000_000):
        otelexec.configure(store=f"sqlite:///{store}", service_name="billing")
        with otelexec.correlate(source="webhook", webhook_id="wh_1"), otelexec.execution("invoice.run"):
            with trace.get_tracer("app").start_as_current_span("charge"):
                pass
            with trace.get_tracer("app").start_as_current_span("mail"):
                pass
        reader = Records(store)
        found = reader.spans(), reader.one()
        reader.close()
        otelexec.shutdown()
    return found


def test_two_runs_give_the_same_ids_times_and_spans(tmp_path: Path) -> None:
    (first, record), (second, again) = run_once(tmp_path / "one.db"), run_once(tmp_path / "two.db")
    assert record == again
    assert [(span.span_id, span.trace_id, span.start_unix_ns, span.end_unix_ns) for span in first] == [
        (span.span_id, span.trace_id, span.start_unix_ns, span.end_unix_ns) for span in second
    ]
    assert {span.trace_id for span in first} == {"0" * 31 + "1"}
    assert sorted(span.span_id for span in first) == [f"{number:016x}" for number in (1, 2, 3)]
    assert span_tree(first) == [("invoice.run", [("charge", []), ("mail", [])])]
    assert span_tree(first, attributes=["otelexec.outcome"]) == [
        ("invoice.run", {"otelexec.outcome": "succeeded"}, [("charge", {}, []), ("mail", {}, [])])
    ]


def test_after_the_block_ids_and_clock_are_the_real_ones_again() -> None:
    real = time.time_ns
    with IncrementalIdGenerator() as generator, SteppingClock(start_unix_ns=5, step_ns=10):
        assert (time.time_ns(), time.time_ns()) == (5, 15)
        assert (generator.generate_trace_id(), generator.generate_trace_id(), generator.generate_span_id()) == (1, 2, 1)
    assert time.time_ns is real
    assert otelexec.Correlation.direct().execution_id != otelexec.Correlation.direct().execution_id


def test_only_the_thread_that_entered_the_clock_makes_it_step() -> None:
    with SteppingClock(start_unix_ns=5, step_ns=10) as clock:
        thread = threading.Thread(target=time.time_ns)
        thread.start()
        thread.join()
        assert clock.now_unix_ns == 5


def test_a_tree_is_made_of_the_sdks_own_spans_too() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(id_generator=IncrementalIdGenerator())
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("app")
    with tracer.start_as_current_span("outer"):
        tracer.start_span("inner", attributes={"n": 1}).end()
    tracer.start_span("alone").end()
    spans = exporter.get_finished_spans()
    assert span_tree(spans, attributes=["n"]) == [("outer", {}, [("inner", {"n": 1}, [])]), ("alone", {}, [])]
    with pytest.raises(ValueError, match="two spans have the id"):
        span_tree([*spans, spans[0]])
    provider.shutdown()


def test_where_a_test_freezes_the_monotonic_clock_a_locked_store_is_given_up_and_spans_are_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As freezegun does; a wait that goes by that clock has no end."""
    store = tmp_path / "store.db"
    job = otelexec.execution("job")(lambda: 7)
    with OtlpReceiver() as receiver:
        otelexec.configure(
            store=f"sqlite:///{store}",
            otlp_endpoint=receiver.endpoint,
            relay=True,
            open_timeout_seconds=0.1,
            finalize_timeout_seconds=0.1,
        )
        assert job() == 7
        with closing(sqlite3.connect(store, isolation_level=None)) as other:
            frozen = time.monotonic()
            monkeypatch.setattr(time, "monotonic", lambda: frozen)
            other.execute("BEGIN IMMEDIATE")
            assert job() == 7
            other.execute("ROLLBACK")
        assert len(receiver.wait_for(2)) == 2
        with pytest.raises(TimeoutError):
            receiver.wait_for(3, timeout=0.05)
        otelexec.shutdown()
