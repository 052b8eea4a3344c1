"""`otelexec trigger serve`, request by request: what it accepts, what it refuses, and that a refusal leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from otelexec_trigger import engine, wire

from otelexec import semconv
from tests.integrations.trigger.stage import KEY, Stage
from tests.records import until

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=20) as made:
        yield made


def trigger(client: httpx.Client, task: str, payload: Any = None, **options: Any) -> str:
    answer = client.post(f"/api/v1/tasks/{task}/trigger", json={"payload": payload, "options": options})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def ended(client: httpx.Client, run_id: str) -> dict[str, Any]:
    until(lambda: client.get(f"/api/v3/runs/{run_id}").json()["isCompleted"], 25)
    told: dict[str, Any] = client.get(f"/api/v3/runs/{run_id}").json()
    return told


@pytest.mark.parametrize("header", [None, "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer", "Bearer \xff"])
def test_without_the_key_there_is_no_answer(common: Stage, url: str, header: str | None) -> None:
    before = len(common.records())
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    for method, path in (("POST", "/api/v1/tasks/echo/trigger"), ("GET", "/api/v1/runs"), ("PUT", "/api/v2/packets/x")):
        answer = httpx.request(method, url + path, headers=headers)  # type: ignore[arg-type]
        assert answer.status_code == 401
    assert len(common.records()) == before


def test_the_span_of_a_run_descends_from_the_call(common: Stage, client: httpx.Client) -> None:
    answer = client.post("/api/v1/tasks/echo/trigger", json={"payload": "1"}, headers={"traceparent": TRACE, "baggage": "tenant=one"})
    run_id = answer.json()["id"]
    assert ended(client, run_id)["output"] == 1
    span = common.ended(run_id, "succeeded").consumer()
    assert (span.trace_id, span.parent_span_id) == (TRACE.split("-")[1], TRACE.split("-")[2])


def test_superjson_and_text_are_decoded(client: httpx.Client) -> None:
    payload = json.dumps({"json": {"when": "1970-01-01T00:00:00.000Z"}, "meta": {"values": {"when": ["Date"]}}})
    assert ended(client, trigger(client, "echo", payload, payloadType=wire.SUPERJSON))["output"] == {"when": "1970-01-01T00:00:00.000Z"}
    assert ended(client, trigger(client, "echo", "[1", payloadType=wire.TEXT))["output"] == "[1"
    told = ended(client, trigger(client, "kind"))
    assert told["output"] == "NoneType"
    assert "payload" not in told


def test_the_idempotency_key_in_the_header_goes_before_the_bodys(client: httpx.Client) -> None:
    body = {"payload": 1, "options": {"idempotencyKey": "body"}}
    first = client.post("/api/v1/tasks/kind/trigger", json=body, headers={"idempotency-key": "header-1"}).json()
    second = client.post("/api/v1/tasks/kind/trigger", json=body, headers={"idempotency-key": "header-2"}).json()
    again = client.post("/api/v1/tasks/kind/trigger", json=body, headers={"idempotency-key": "header-1"}).json()
    assert first["id"] != second["id"]
    assert again == {"id": first["id"], "isCached": True}
    reset = client.post("/api/v1/idempotencyKeys/header-1/reset", json={"taskIdentifier": "kind"})
    assert reset.json() == {"id": "header-1"}
    assert client.post("/api/v1/tasks/kind/trigger", json=body, headers={"idempotency-key": "header-1"}).json()["id"] != first["id"]
    assert client.post("/api/v1/idempotencyKeys/nobody/reset", json={"taskIdentifier": "kind"}).status_code == 404


def test_keys_of_tasks_whose_ids_have_a_slash_are_keys_of_their_own(client: httpx.Client) -> None:
    one = trigger(client, "nobody", delay="1h", idempotencyKey="b/c")
    other = trigger(client, quote("nobody/b", safe=""), delay="1h", idempotencyKey="c")
    assert one != other
    assert trigger(client, "nobody", delay="1h", idempotencyKey="b/c") == one
    assert client.post("/api/v1/idempotencyKeys/c/reset", json={"taskIdentifier": "nobody/b"}).status_code == 200
    assert trigger(client, "nobody", delay="1h", idempotencyKey="b/c") == one


def test_a_call_for_a_run_is_none_for_a_batch_though_the_uuid_is_the_same(client: httpx.Client) -> None:
    call = {"x-trigger-request-idempotency-key": "of-a-batch"}
    batch = client.post("/api/v3/batches", json={"runCount": 1}, headers=call).json()["id"]
    run = client.post("/api/v1/tasks/batch/trigger", json={"options": {"delay": "1h"}}, headers=call).json()["id"]
    assert (batch[:6], run[:4]) == ("batch_", "run_")
    assert client.post("/api/v3/batches", json={"runCount": 1}, headers=call).json()["id"] == batch


def test_each_concurrency_key_of_a_queue_is_a_lane_of_its_own(common: Stage, client: httpx.Client) -> None:
    asked: list[dict[str, Any]] = [
        {"queue": {"name": "lanes/b"}, "concurrencyKey": "c"},
        {"queue": {"name": "lanes"}, "concurrencyKey": "b/c"},
        {"queue": {"name": "lanes/b/c", "concurrencyLimit": 1}},
        {"queue": {"name": "lanes%2Fb"}, "concurrencyKey": "c"},
        {"concurrencyKey": "k"},
        {"queue": {"name": "task"}, "concurrencyKey": "nobody/k"},
        {"queue": {"concurrencyLimit": 1}},
        {"queue": {"name": "task"}, "concurrencyKey": "nobody"},
    ]
    runs = [engine.find(trigger(client, "nobody", delay="1h", **options)) for options in asked]
    lanes = [run.lane for run in runs if run is not None]
    assert len(set(lanes)) == len(asked), lanes
    assert lanes[4] == "task/nobody/k"


def test_a_key_lapses_after_its_time(client: httpx.Client) -> None:
    first = trigger(client, "echo", 1, idempotencyKey="short", idempotencyKeyTTL="1s")
    assert ended(client, first)["isSuccess"]
    until(lambda: trigger(client, "echo", 2, idempotencyKey="short", idempotencyKeyTTL="1s") != first, 10)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/api/v1/tasks/echo/trigger", b"{", 400),
        ("/api/v1/tasks/echo/trigger", b"[]", 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": 3}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"delay": "soon"}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"delay": 5}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"maxAttempts": 0}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"maxAttempts": 1.5}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"maxDuration": -1}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"maxDuration": 1e300}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"maxDuration": 100000000000}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"ttl": 1e300}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"ttl": 100000000000}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"payloadType": "image/png"}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"payload": "nowhere", "options": {"payloadType": "application/store"}}', 400),
        ("/api/v1/tasks/echo/trigger", json.dumps({"options": {"tags": ["x" * 129]}}).encode(), 422),
        ("/api/v1/tasks/echo/trigger", json.dumps({"options": {"tags": [str(n) for n in range(11)]}}).encode(), 422),
        ("/api/v1/tasks/echo/trigger", json.dumps({"options": {"metadata": "x" * 300_000}}).encode(), 413),
        ("/api/v1/tasks/echo/trigger", b'"' + b"x" * (wire.MAX_BODY_BYTES + 1) + b'"', 413),
        ("/api/v1/tasks/echo/trigger", b'{"payload": NaN}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"payload": 1e999}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"payload": "\\ud800"}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"idempotencyKey": "\\ud800"}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"delay": "999999999w"}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"maxAttempts": 99999999999999999999}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"ttl": -1}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"ttl": 1' + b"0" * 400 + b"}}", 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"ttl": "' + b"9" * 400 + b's"}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"delay": "' + b"9" * 5000 + b's"}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"queue": {"name": {}}}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"queue": {"concurrencyLimit": true}}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"queue": {"concurrencyLimit": 0}}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"queue": {"concurrencyLimit": 1.5}}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"priority": -1}}', 400),
        ("/api/v1/tasks/echo/trigger", b'{"options": {"priority": 1' + b"0" * 400 + b"}}", 400),
        ("/api/v1/tasks//trigger", b"{}", 404),
        ("/api/v2/tasks/batch", b'{"items": []}', 400),
        ("/api/v2/tasks/batch", b'{"items": [{"task": "echo"}, {"task": "echo", "options": {"delay": "soon"}}]}', 400),
        ("/api/v2/tasks/batch", b'{"items": [{"task": "echo"}, {"task": "echo", "options": {"idempotencyKey": 1}}]}', 400),
        ("/api/v2/tasks/batch", b'{"items": [{}]}', 400),
        ("/api/v3/batches", b'{"runCount": 0}', 400),
        ("/api/v3/batches", b'{"runCount": 1001}', 400),
        ("/api/v3/batches/batch_none/items", b"{}", 415),
        ("/api/v1/runs/run_none/tags", b"{}", 400),
        ("/api/v1/runs/run_none/cancel", b"", 404),
        ("/api/v2/runs/run_none/cancel", b"", 404),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(common: Stage, client: httpx.Client, path: str, body: bytes, status: int) -> None:
    before = len(common.records())
    answer = client.post(path, content=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]
    assert len(common.records()) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
OPTIONS = st.dictionaries(
    st.sampled_from(
        [
            "delay",
            "ttl",
            "tags",
            "queue",
            "maxAttempts",
            "maxDuration",
            "metadata",
            "concurrencyKey",
            "idempotencyKey",
            "payloadType",
            "priority",
        ]
    ),
    JSON,
    max_size=4,
)


@given(
    payload=JSON,
    options=OPTIONS,
    task=st.text(min_size=1, max_size=10),
    headers=st.dictionaries(
        st.sampled_from(["traceparent", "baggage", "idempotency-key", "x-trigger-request-idempotency-key"]),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30).map(str.strip),
        max_size=3,
    ),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_request_breaks_the_server(
    client: httpx.Client, payload: Any, options: dict[str, Any], task: str, headers: dict[str, str]
) -> None:
    answer = client.post(
        f"/api/v1/tasks/{quote('fuzzed ' + task, safe='')}/trigger", json={"payload": payload, "options": options}, headers=headers
    )
    assert answer.status_code < 500, answer.text
    if answer.status_code == 200:
        run_id = answer.json()["id"]
        told = client.get(f"/api/v3/runs/{run_id}")
        assert told.status_code == 200, told.text
        assert client.post(f"/api/v2/runs/{run_id}/cancel").json() == {"id": run_id}


def test_a_batch_in_two_phases_may_be_sent_again(common: Stage, client: httpx.Client) -> None:
    created = client.post("/api/v3/batches", json={"runCount": 3, "idempotencyKey": "b1"}, headers={"traceparent": TRACE})
    assert created.status_code == 202
    batch = created.json()["id"]
    assert client.post("/api/v3/batches", json={"runCount": 3, "idempotencyKey": "b1"}).json()["isCached"] is True
    headers = {"content-type": "application/x-ndjson"}
    items = [json.dumps({"index": index, "task": "echo", "payload": str(index), "options": {}}) for index in range(3)]
    path = f"/api/v3/batches/{batch}/items"
    half = client.post(path, content="\n".join(items[:2]), headers=headers).json()
    assert (half["itemsAccepted"], half["sealed"], half["enqueuedCount"], half["expectedCount"]) == (2, False, 2, 3)
    assert client.get(f"/api/v2/batches/{batch}").json()["status"] == "PENDING"
    whole = client.post(path, content="\n".join(items) + "\n", headers=headers).json()
    assert (whole["itemsAccepted"], whole["itemsDeduplicated"], whole["sealed"]) == (1, 2, True)
    until(lambda: client.get(f"/api/v2/batches/{batch}").json()["status"] == "COMPLETED", 25)
    told = client.get(f"/api/v2/batches/{batch}").json()
    assert told["processing"] == {"errors": []}
    assert [ended(client, run)["output"] for run in told["runs"]] == [0, 1, 2]
    for run in told["runs"]:
        assert common.ended(run, "succeeded").consumer().trace_id == TRACE.split("-")[1]
    assert client.post(path, content='{"index": 3, "task": "echo"}', headers=headers).status_code == 400


def test_an_item_of_a_batch_whose_key_has_a_run_is_that_run(client: httpx.Client) -> None:
    known = trigger(client, "kind", 1, idempotencyKey="in-a-batch")
    batch = client.post("/api/v3/batches", json={"runCount": 2}).json()["id"]
    items = [{"index": 0, "task": "kind", "options": {"idempotencyKey": "in-a-batch"}}, {"index": 1, "task": "kind", "payload": "2"}]
    for sent in range(2):
        told = client.post(
            f"/api/v3/batches/{batch}/items",
            content="\n".join(map(json.dumps, items)),
            headers={"content-type": "application/x-ndjson"},
        ).json()
        assert told["sealed"] is True, sent
    until(lambda: client.get(f"/api/v2/batches/{batch}").json()["status"] == "COMPLETED", 25)
    runs = client.get(f"/api/v2/batches/{batch}").json()["runs"]
    assert runs[0] == known
    assert len(set(runs)) == 2


def test_a_batch_of_before_is_accepted_in_one_phase(client: httpx.Client) -> None:
    answer = client.post("/api/v2/tasks/batch", json={"items": [{"task": "echo", "payload": 1}, {"task": "kind", "payload": "x"}]})
    assert (answer.status_code, answer.json()["runCount"]) == (202, 2)
    runs = client.get(f"/api/v2/batches/{answer.json()['id']}").json()["runs"]
    assert len(runs) == 2
    assert ended(client, runs[0])["output"] == 1


def test_a_large_payload_is_uploaded_first(client: httpx.Client) -> None:
    target = client.put("/api/v2/packets/folder/payload.json").json()["presignedUrl"]
    text = json.dumps({"json": {"text": "x" * 200_000}})
    assert httpx.put(target, content=text, headers={"content-type": wire.SUPERJSON}).status_code == 200
    run_id = trigger(client, "echo", "folder/payload.json", payloadType=wire.STORED)
    assert len(ended(client, run_id)["output"]["text"]) == 200_000
    odd = client.put(f"/api/v2/packets/{quote('tasks/100% of my task?/../#1.json', safe='')}").json()
    assert httpx.put(odd["presignedUrl"], content="[1]").status_code == 200
    assert ended(client, trigger(client, "echo", odd["storagePath"], payloadType=wire.STORED))["output"] == [1]
    for bad in (target.replace("payload.json", "other.json"), target.replace("signature=", "signature=0"), target.split("?")[0]):
        assert httpx.put(bad, content=text).status_code == 403
    source = client.get("/api/v1/packets/folder/payload.json").json()["presignedUrl"]
    assert httpx.get(source).text == text
    assert httpx.put(source, content="{}").status_code == 403


def test_lone_surrogates_are_told_as_they_came(client: httpx.Client) -> None:
    """JavaScript makes such strings whenever it cuts an emoji in two; one run of them must not hide the others."""
    cut = "\ud83d"
    body = {"payload": {"text": cut}, "options": {"tags": [cut], "metadata": {"text": cut}}}
    run_id = client.post("/api/v1/tasks/echo/trigger", content=json.dumps(body)).json()["id"]
    told = ended(client, run_id)
    assert (told["payload"], told["output"], told["tags"], told["metadata"]) == ({"text": cut}, {"text": cut}, [cut], {"text": cut})
    (listed,) = client.get("/api/v1/runs", params={"page[size]": 1, "page[after]": _newer(client, run_id)}).json()["data"]
    assert (listed["id"], listed["tags"]) == (run_id, [cut])


def _newer(client: httpx.Client, run_id: str) -> str:
    """Give a run that is the next one after another in the list."""
    newer = trigger(client, "nobody", delay="1h")
    client.post(f"/api/v2/runs/{newer}/cancel")
    assert newer != run_id
    return newer


def test_a_number_that_grows_too_large_leaves_the_metadata_as_it_was(client: httpx.Client) -> None:
    run_id = trigger(client, "nobody", delay="1h", metadata={"n": 1e308, "i": 10**400})
    for key, value in (("n", 1e308), ("i", 0.5)):
        answer = client.put(f"/api/v1/runs/{run_id}/metadata", json={"operations": [{"type": "increment", "key": key, "value": value}]})
        assert answer.status_code == 400, answer.text
    assert client.get(f"/api/v3/runs/{run_id}").json()["metadata"] == {"n": 1e308, "i": 10**400}
    client.post(f"/api/v2/runs/{run_id}/cancel")


def test_a_keys_time_that_is_beyond_all_times_is_no_error(client: httpx.Client) -> None:
    for ttl in ("99999999999d", "9" * 400 + "s"):
        first = trigger(client, "nobody", delay="1h", idempotencyKey="for ever", idempotencyKeyTTL=ttl)
        assert trigger(client, "nobody", delay="1h", idempotencyKey="for ever", idempotencyKeyTTL=ttl) == first
    client.post(f"/api/v2/runs/{first}/cancel")


def test_a_replay_that_is_asked_for_again_after_a_lost_answer_is_one_run(client: httpx.Client) -> None:
    first = trigger(client, "echo", 1)
    call = {"x-trigger-request-idempotency-key": "replay-1"}
    answers = [client.post(f"/api/v1/runs/{first}/replay", headers=call).json() for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0]["id"] != first
    assert client.post(f"/api/v1/runs/{first}/replay").json() not in answers


def test_metadata_changes_by_operations(client: httpx.Client) -> None:
    run_id = trigger(client, "echo", 1, delay="1h", metadata={"n": 1, "l": [1, 2]}, metadataType=wire.JSON)
    operations = [
        {"type": "set", "key": "a", "value": "b"},
        {"type": "increment", "key": "n", "value": 2},
        {"type": "append", "key": "l", "value": 3},
        {"type": "remove", "key": "l", "value": 1},
        {"type": "set", "key": "gone", "value": 1},
        {"type": "delete", "key": "gone"},
    ]
    answer = client.put(f"/api/v1/runs/{run_id}/metadata", json={"operations": operations})
    assert answer.json() == {"metadata": {"a": "b", "n": 3, "l": [2, 3]}}
    assert json.loads(client.get(f"/api/v1/runs/{run_id}/metadata").json()["metadata"]) == {"a": "b", "n": 3, "l": [2, 3]}
    assert client.put(f"/api/v1/runs/{run_id}/metadata", json={"operations": [{"type": "square", "key": "n"}]}).status_code == 400
    assert client.put(f"/api/v1/runs/{run_id}/metadata", json={"metadata": {"new": True}}).json() == {"metadata": {"new": True}}
    client.post(f"/api/v2/runs/{run_id}/cancel")


def test_lists_come_in_pages_and_by_filter(client: httpx.Client) -> None:
    runs = [trigger(client, "paged", number, delay="1h", tags=[f"tag{number % 2}"]) for number in range(5)]
    query = {"filter[taskIdentifier]": "paged", "page[size]": "2"}
    seen: list[str] = []
    answer = client.get("/api/v1/runs", params=query).json()
    assert "previous" not in answer["pagination"]
    while True:
        seen += [run["id"] for run in answer["data"]]
        if "next" not in answer["pagination"]:
            break
        answer = client.get("/api/v1/runs", params=query | {"page[after]": answer["pagination"]["next"]}).json()
    assert seen == runs[::-1]
    back = client.get("/api/v1/runs", params=query | {"page[before]": answer["pagination"]["previous"]}).json()
    assert [run["id"] for run in back["data"]] == [runs[2], runs[1]]
    tagged = client.get("/api/v1/runs", params=query | {"page[size]": "10", "filter[tag]": "tag1"}).json()
    assert [run["id"] for run in tagged["data"]] == [runs[3], runs[1]]
    delayed = client.get("/api/v1/runs", params=query | {"page[size]": "10", "filter[status]": "DELAYED,QUEUED"}).json()
    assert len(delayed["data"]) == 5
    whole = query | {"page[size]": "10"}
    for period, count in (("1h", 5), ("0s", 0)):
        assert len(client.get("/api/v1/runs", params=whole | {"filter[createdAt][period]": period}).json()["data"]) == count
    for since, count in (("2020-01-01T00:00:00Z", 5), ("2100-01-01", 0), ("4102444800000", 0)):
        assert len(client.get("/api/v1/runs", params=whole | {"filter[createdAt][from]": since}).json()["data"]) == count
    test = trigger(client, "paged", delay="1h", test=True)
    assert [run["id"] for run in client.get("/api/v1/runs", params=whole | {"filter[isTest]": "true"}).json()["data"]] == [test]
    assert len(client.get("/api/v1/runs", params=whole | {"filter[isTest]": "false"}).json()["data"]) == 5
    runs.append(test)
    for bad in (
        *({"filter[status]": "NONE"}, {"page[size]": "0"}, {"page[size]": "x"}, {"page[after]": "run_none"}),
        *({"filter[queue]": "q"}, {"filter[isTest]": "1"}, {"filter[createdAt][period]": "x"}, {"filter[createdAt][from]": "x"}),
    ):
        assert client.get("/api/v1/runs", params=bad).status_code == 400
    for run in runs:
        client.post(f"/api/v2/runs/{run}/cancel")


def test_a_page_before_another_holds_the_nearest_that_the_filter_lets_through(fresh: Any) -> None:
    """Also where more runs than are read at a time lie between them."""
    stage: Stage = fresh()
    _, url = stage.serve()
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=20) as client:
        oldest = trigger(client, "nobody")
        client.post("/api/v2/tasks/batch", json={"items": [{"task": "nobody"}] * 250})
        wanted = [trigger(client, "nobody", tags="wanted") for _ in range(2)]
        query = {"filter[tag]": "wanted", "page[size]": "1", "page[before]": oldest}
        answer = client.get("/api/v1/runs", params=query).json()
    assert [run["id"] for run in answer["data"]] == wanted[:1]
    assert "previous" in answer["pagination"]


def test_a_run_with_a_priority_goes_before_those_that_were_asked_for_up_to_so_much_earlier(fresh: Any) -> None:
    stage: Stage = fresh()
    _, url = stage.serve()
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=20) as client:
        runs = {
            priority: trigger(client, "echo", priority, priority=priority, ttl="1h", idempotencyKey=str(priority))
            for priority in (0, 10, 7200.5, 3600)
        }
        told = client.get(f"/api/v3/runs/{runs[3600]}").json()
        assert (told["status"], "delayedUntil" in told) == ("QUEUED", False)
        stage.worker(1)
        seen = {priority: stage.ended(run) for priority, run in runs.items()}
    assert sorted(seen, key=lambda priority: seen[priority].attempt.started_unix_ns) == [7200.5, 3600, 10, 0]
    assert seen[7200.5].consumer().attributes[semconv.QUEUE_LATENCY] < 3600


def test_results_are_told_once_there_are_any(client: httpx.Client) -> None:
    waiting = trigger(client, "echo", 1, delay="1h")
    assert client.get(f"/api/v1/runs/{waiting}/result").status_code == 404
    client.post(f"/api/v2/runs/{waiting}/cancel")
    good, bad = trigger(client, "echo", {"a": 1}), trigger(client, "fail", maxAttempts=1)
    for run in (good, bad):
        ended(client, run)
    told = client.get(f"/api/v1/runs/{good}/result").json()
    assert (told["ok"], json.loads(told["output"])) == (True, {"a": 1})
    error = client.get(f"/api/v1/runs/{bad}/result").json()["error"]
    assert (error["name"], error["message"]) == ("LookupError", "no such thing")


def test_a_server_without_a_key_does_not_start(fresh: Any) -> None:
    stage = fresh(TRIGGER_SECRET_KEY="")
    process = stage.command("trigger", "serve", "--port", "0", TRIGGER_SECRET_KEY="")
    assert process.returncode == 2
    assert "TRIGGER_SECRET_KEY" in process.stderr


def test_what_the_store_refuses_is_answered_without_its_address(client: httpx.Client) -> None:
    """Whoever has the key may trigger, and need not learn where the store is."""
    body = b'{"payload": 1, "options": {"idempotencyKey": "\\ud800"}}'
    answer = client.post("/api/v1/tasks/echo/trigger", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "surrogates not allowed" in answer.text
    assert "sqlite" not in answer.text
