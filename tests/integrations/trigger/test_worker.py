"""What a worker does besides: it delivers its children's spans, and says what failed."""

from __future__ import annotations

from otelexec_trigger import LocalBackend

from otelexec.testing import OtlpReceiver
from tests.integrations.trigger.conftest import Fresh
from tests.integrations.trigger.test_deaths import ended
from tests.records import until


def test_an_idle_worker_delivers_the_spans_of_its_children(fresh: Fresh) -> None:
    with OtlpReceiver() as receiver:
        stage = fresh(OTELEXEC_RELAY="true", OTELEXEC_OTLP_ENDPOINT=receiver.endpoint)
        worker = stage.worker(1)
        assert ended(LocalBackend().trigger("echo", 7)).state == "succeeded"
        until(lambda: "echo" in {span.name for span in receiver.spans}, 15)
        assert worker.stop() == 0


def test_the_error_of_a_task_stands_in_the_workers_log_with_its_traceback(fresh: Fresh) -> None:
    stage = fresh()
    worker = stage.worker(1)
    run_id = LocalBackend().trigger("fail", None, max_attempts=2)
    assert ended(run_id).state == "failed"
    until(lambda: "ERROR: otelexec.trigger.raised" in worker.text(), 10)
    text = worker.text()
    assert f"WARNING: otelexec.trigger.raised: {run_id} of fail" in text
    assert text.count('raise LookupError("no such thing")') == 2
    assert worker.stop() == 0
    worker.check_log()
