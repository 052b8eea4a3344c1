"""The real npm packages: our client against their schemas, their SDK against our server, their Python starter against our scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from otelexec_trigger import EnqueueError, LocalBackend, TriggerDevBackend, wire

import otelexec
from otelexec import semconv
from tests.integrations.trigger.stage import KEY, Stage
from tests.node import Node, node_with
from tests.records import Records

HERE = Path(__file__).parent / "node"
PACKAGES = {
    "@trigger.dev/core": "4.8.3",
    "@trigger.dev/sdk": "4.8.3",
    "@trigger.dev/python": "4.5.10",
    "@opentelemetry/sdk-trace-node": "2.0.1",
}

pytestmark = pytest.mark.timeout(400)  # the first time, npm fetches the packages


@pytest.fixture(scope="module")
def node() -> Node:
    return node_with(PACKAGES)


@pytest.fixture
def validator(node: Node) -> Iterator[str]:
    process = node.start(str(HERE / "validator.js"))
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait(20)
        process.stdout.close()


def seen_by(validator: str) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = httpx.get(f"{validator}/seen").json()
    return seen


def test_the_clients_requests_are_what_the_real_schemas_know(validator: str, common: Stage) -> None:
    with TriggerDevBackend(validator) as backend, otelexec.correlate(source="webhook", webhook_id="w-1", path="/p", attributes={"a": "ä"}):
        for payload in ({"order": 1, "ü": [1.5, None, True]}, "text", [1], None):
            run_id = backend.trigger(
                "my task/with a slash",
                payload,
                key="order-42",
                tags=["user_1"],
                delay="1m",
                ttl=600,
                metadata={"a": 1},
                queue="q1",
                concurrency_key="ck",
                max_attempts=3,
            )
            assert run_id == "run_validated"
        backend.trigger("plain", {"a": 1})
        backend.trigger("late", delay=datetime(2030, 1, 1, tzinfo=UTC), metadata=[1], tags="one")
        assert (
            backend.batch_trigger([{"task": "one", "payload": {"n": 1}, "key": "k"}, {"task": "two", "tags": ["t"]}]) == "batch_validated"
        )
        backend.add_tags("run_1", ["a", "b"])
        backend.reschedule("run_1", "2h")
    seen = seen_by(validator)
    assert [request["problems"] for request in seen] == [[]] * len(seen)
    assert len(seen) == 10
    first = seen[0]
    assert first["path"] == "/api/v1/tasks/my%20task%2Fwith%20a%20slash/trigger"
    assert first["headers"]["authorization"] == f"Bearer {KEY}"
    assert first["headers"]["x-trigger-api-version"] == wire.API_VERSION
    assert first["headers"]["x-trigger-source"] == "sdk"
    options = first["sent"]["options"]
    assert options["idempotencyKey"] == "3bf8b157c4238eefe5ae4a66eca81c6b887d4dcedb58dd674271859f4dc2edfd"  # as the SDK hashes "order-42"
    assert options["ttl"] == "600s"
    assert options["tags"][0] == "user_1"
    assert any(tag.startswith("otelexec.execution_id:") for tag in options["tags"])
    assert json.loads(options["metadata"])["otelexec"]["webhook_id"] == "w-1"
    carried = json.loads(first["sent"]["payload"])[semconv.PAYLOAD_KEY]
    assert carried["traceparent"].split("-")[1] == first["headers"]["traceparent"].split("-")[1]
    assert "otelexec.request_id=" in carried["baggage"]
    assert len({request["headers"]["x-trigger-request-idempotency-key"] for request in seen}) == len(seen)
    keyless = seen[4]
    (tag,) = (tag for tag in keyless["sent"]["options"]["tags"] if tag.startswith("otelexec.execution_id:"))
    assert keyless["sent"]["options"]["idempotencyKey"] == wire.idempotency_hash(tag.partition(":")[2])


def test_the_validator_finds_what_is_wrong(validator: str) -> None:
    """So that the test above can fail."""
    for body in ({"options": {"idempotency_key": "x"}}, {"options": {"maxAttempts": 1.5}}, {"payload": 1, "option": {}}):
        assert httpx.post(f"{validator}/api/v1/tasks/x/trigger", json=body).status_code == 400
    with TriggerDevBackend(f"{validator}/nowhere", KEY) as backend, pytest.raises(EnqueueError) as caught:
        backend.trigger("x", {})
    assert (caught.value.acceptance, caught.value.retryable, caught.value.status) == ("rejected", False, 404)


def test_the_real_sdk_drives_the_server(node: Node, common: Stage, url: str) -> None:
    done = node.run(str(HERE / "sdk.js"), json.dumps({"url": url, "key": KEY}), seconds=120)
    assert done.returncode == 0, done.stderr.decode()
    seen = json.loads(done.stdout)
    assert seen["polled"]["output"] == {"hello": "wörld", "when": "1970-01-01T00:00:00.000Z"}
    assert (seen["retrieved"]["status"], seen["retrieved"]["tags"], seen["retrieved"]["metadata"]) == (
        "COMPLETED",
        ["user_1", "org:2"],
        {"a": 1},
    )
    assert (seen["text"], seen["nothing"], seen["large"]) == ("as it is", "NoneType", 200_000)
    assert seen["cached"] == [True, False, True]
    assert sorted(seen["batch"]) == [1, 2, 3]
    assert seen["batchRetrieved"]["runCount"] == 3
    assert seen["delayed"]["status"] == "DELAYED"
    assert seen["rescheduled"]["delayedUntil"] > seen["delayed"]["delayedUntil"]
    assert seen["cancelled"]["status"] == "CANCELED"
    assert seen["cancelled"]["finishedAt"]
    assert seen["replayed"] == ["COMPLETED", True]
    assert (seen["failed"]["status"], seen["failed"]["error"]["name"], seen["failed"]["error"]["message"]) == (
        "FAILED",
        "LookupError",
        "no such thing",
    )
    assert seen["refused"][1] == 422
    assert seen["missing"][1] == 404
    assert len(seen["pages"]) > 4


def test_the_servers_answers_are_what_the_real_schemas_know(node: Node, common: Stage, url: str) -> None:
    client = httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=20)
    backend = LocalBackend()
    run_id = backend.trigger("echo", {"a": 1}, delay="1h", ttl="1h", tags="t", metadata={"m": 1})
    created = client.post("/api/v3/batches", json={"runCount": 1}).json()
    items = client.post(
        f"/api/v3/batches/{created['id']}/items",
        content=json.dumps({"index": 0, "task": "echo", "payload": "1"}),
        headers={"content-type": "application/x-ndjson"},
    ).json()
    answers = [
        ("TriggerTaskResponse", client.post("/api/v1/tasks/echo/trigger", json={"payload": 1}).json()),
        ("RetrieveRunResponse", client.get(f"/api/v3/runs/{run_id}").json()),
        ("ListRunResponse", client.get("/api/v1/runs").json()),
        ("CreateBatchResponse", created),
        ("StreamBatchItemsResponse", items),
        ("RetrieveBatchV2Response", client.get(f"/api/v2/batches/{created['id']}").json()),
        ("ReplayRunResponse", client.post(f"/api/v1/runs/{run_id}/replay").json()),
        ("RetrieveRunResponse", client.post(f"/api/v1/runs/{run_id}/reschedule", json={"delay": "2h"}).json()),
        ("CanceledRunResponse", client.post(f"/api/v2/runs/{run_id}/cancel").json()),
        ("RetrieveRunResponse", client.get(f"/api/v3/runs/{run_id}").json()),
        ("UpdateMetadataResponseBody", client.put(f"/api/v1/runs/{run_id}/metadata", json={"metadata": {"x": 1}}).json()),
    ]
    client.close()
    done = node.run(str(HERE / "replies.js"), given=json.dumps(answers).encode())
    assert json.loads(done.stdout) == []


def test_the_real_python_package_starts_our_script(node: Node, tmp_path: Path, isolated: None) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import otelexec\n"
        "from otelexec_trigger import run\n"
        "run(lambda payload: [payload, otelexec.current_execution().attempt], name='from node')\n"
    )
    environment = {"OTELEXEC_STORE": f"sqlite:///{tmp_path / 'node.db'}", "OTELEXEC_RELAY": "false", "PYTHON_BIN_PATH": sys.executable}
    asked = {"script": str(script), "payload": {"x": "ü"}, "attempt": 2}
    done = node.run(str(HERE / "python.js"), json.dumps(asked), environment=environment)
    assert done.returncode == 0, done.stderr.decode()
    told = json.loads(done.stdout)
    assert told["exitCode"] == 0
    assert json.loads(told["stdout"].splitlines()[-1]) == [{"x": "ü"}, 2]
    records = Records(tmp_path / "node.db")
    (record,), (span,) = records.all(), records.spans()
    records.close()
    assert (record.execution_id, record.state) == ("run_from_node", "succeeded")
    assert span.parent_span_id, "the platform's span is not the parent"
    assert span.attributes["messaging.destination.name"] == "python-task"
