"""With a signing key: what is signed is believed, also on a retry; what isn't runs as a request of its own, and a warning says so."""

from __future__ import annotations

import pytest

import otelexec
from tests.integrations.celery.conftest import Fresh

KEY = {"OTELEXEC_SIGNING_KEY": "a key of this test's"}
RESULT_SECONDS = 30.0


def test_signed_messages_are_believed_and_others_are_not(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*next(iter(KEY.items())))
    stage = fresh()
    worker = stage.worker("signed", "solo", 1, environment=KEY)
    with otelexec.correlate(source="test") as correlation:
        result = stage.task("flaky").delay(1)
    told = result.get(timeout=RESULT_SECONDS)
    assert {each["execution_id"] for each in told} == {correlation.execution_id}
    assert {each["request_id"] for each in told} == {correlation.request_id}
    stage.ended(result.id, "failed", "succeeded")

    forged_id = "00000000-0000-4000-8000-00000000002b"
    with stage.app.connection_for_write() as connection, connection.Producer() as producer:
        headers = {"task": "fail", "id": forged_id, "lang": "py", "root_id": forged_id, "parent_id": None}
        forged = {"baggage": "otelexec.execution_id=forged,otelexec.request_id=forged", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
        queue = stage.settings["task_default_queue"]
        producer.publish([["unsigned"], {}, {}], routing_key=queue, headers=headers | forged, serializer="json")
    seen = stage.ended(forged_id, "failed")
    assert "forged" not in {seen.record.execution_id, seen.record.request_id}
    assert seen.record.execution_id != forged_id
    assert seen.attempt.trace_id != "a" * 32
    assert worker.stop() == 0
    assert "untrusted" in worker.text() or "unsigned" in worker.text()
    stage.check_agreement()
