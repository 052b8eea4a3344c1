"""Every verifier takes what its backend signs, and nothing else whatever it is given."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from otelexec_trigger import QStash, StandardWebhooks, TimestampedHmac, TriggerDevAlert, VerificationError
from otelexec_trigger.verifiers import Verifier, lowercase

from otelexec.errors import SettingsError
from tests.integrations.trigger.signing import BODY, NOW, SECRET, URL, clock, pushed, signed_alert, signed_by_time, standard

ALERT = TriggerDevAlert("key")
TIMED = TimestampedHmac("secret", clock=clock)
QSTASH = QStash(["current", "next"], url=URL, clock=clock)
STANDARD = StandardWebhooks(SECRET, clock=clock)
ALL: list[tuple[Verifier, dict[str, str]]] = [
    (ALERT, signed_alert(BODY)),
    (TIMED, signed_by_time(BODY)),
    (QSTASH, pushed(BODY)),
    (STANDARD, standard(BODY)),
]
NAMES = ["alert", "timed", "qstash", "standard"]


@pytest.mark.parametrize(("verifier", "headers"), ALL, ids=NAMES)
def test_what_is_signed_is_taken_and_what_is_changed_is_not(verifier: Verifier, headers: dict[str, str]) -> None:
    found = lowercase(headers)
    assert verifier.verify(found, BODY).identity
    pairs: Any = [(name.upper().encode(), value.encode()) for name, value in headers.items()]
    assert verifier.verify(pairs, BODY).identity
    assert verifier.verify(headers, BODY.decode()).identity  # type: ignore[arg-type] # a server may have made text of it
    for body in (b"", BODY + b" ", BODY.replace(b"1", b"2"), BODY[:-1]):
        with pytest.raises(VerificationError):
            verifier.verify(found, body)
    for name in headers:
        if name == "Upstash-Message-Id":
            continue
        with pytest.raises(VerificationError):
            verifier.verify({key: value for key, value in found.items() if key != name.lower()}, BODY)


@pytest.mark.parametrize(("verifier", "headers"), ALL, ids=NAMES)
def test_a_changed_signature_is_none(verifier: Verifier, headers: dict[str, str]) -> None:
    name = next(name for name in headers if "signature" in name.lower())
    value = headers[name]
    for changed in (
        value[:-2] + ("AA" if not value.endswith("AA") else "BB"),
        value.swapcase() + "x",
        "",
        "v1,",
        "t=&s=",
        "a.b.c",
        "é" * 40,
    ):
        with pytest.raises(VerificationError):
            verifier.verify(lowercase(headers | {name: changed}), BODY)


@pytest.mark.parametrize(
    ("verifier", "headers"),
    [
        (TIMED, signed_by_time(BODY, at=NOW - 301)),
        (TIMED, signed_by_time(BODY, at=NOW + 301)),
        (STANDARD, standard(BODY, at=NOW - 301)),
        (STANDARD, standard(BODY, at=NOW + 301)),
        (QSTASH, pushed(BODY, exp=NOW - 1)),
        (QSTASH, pushed(BODY, nbf=NOW + 1)),
        (QSTASH, pushed(BODY, exp="soon")),
        (QSTASH, pushed(BODY, exp=None)),
        (QSTASH, pushed(BODY, iss="Somebody")),
        (QSTASH, pushed(BODY, sub="https://example.test/other")),
        (QSTASH, pushed(BODY, body="")),
        (QSTASH, pushed(BODY, algorithm="none")),
        (QSTASH, pushed(BODY, key="former")),
        (ALERT, signed_alert(BODY, "another key")),
        (TIMED, signed_by_time(BODY, "another key")),
        (STANDARD, standard(BODY, "whsec_" + base64.b64encode(b"another").decode())),
    ],
)
def test_what_is_stale_or_somebody_elses_is_refused(verifier: Verifier, headers: dict[str, str]) -> None:
    with pytest.raises(VerificationError):
        verifier.verify(lowercase(headers), BODY)


def test_any_of_the_keys_may_have_signed() -> None:
    rotated = TimestampedHmac(["signkey-prod-old", "signkey-test-secret"], clock=clock)
    assert rotated.verify(lowercase(signed_by_time(BODY)), BODY).identity
    assert QSTASH.verify(lowercase(pushed(BODY, key="next")), BODY).identity
    both = StandardWebhooks(["whsec_" + base64.b64encode(b"old").decode(), SECRET], clock=clock)
    headers = standard(BODY)
    headers["Webhook-Signature"] = "v1a,nonsense v1,bm9uZQ== " + headers["Webhook-Signature"]
    assert both.verify(lowercase(headers), BODY).identity


def test_an_id_beyond_ascii_is_verified_however_the_server_reads_headers_and_is_one_delivery() -> None:
    name = "évt_ü"
    headers = standard(BODY, message=name)
    as_bytes = [(key.encode(), value.encode()) for key, value in headers.items()]
    as_latin = headers | {"Webhook-Id": name.encode().decode("latin-1")}
    other_bytes = [(key, b"\xe9vt_\xfc" if key == b"Webhook-Id" else value) for key, value in as_bytes]
    given: list[Any] = [headers, as_bytes, as_latin, other_bytes]
    assert {STANDARD.verify(each, BODY).identity for each in given} == {name}
    for changed in ("evt_ü", "évt_u", "évt_ü ", name.encode().decode("latin-1").encode().decode("latin-1"), "\ud800"):
        with pytest.raises(VerificationError):
            STANDARD.verify(headers | {"Webhook-Id": changed}, BODY)


def test_bytes_that_are_no_utf_8_name_another_delivery_than_the_same_text_in_utf_8() -> None:
    def signed(name: bytes) -> list[tuple[bytes, bytes]]:
        sent = str(int(NOW)).encode()
        digest = hmac.digest(base64.b64decode(SECRET.removeprefix("whsec_")), b".".join((name, sent, BODY)), hashlib.sha256)
        return [(b"webhook-id", name), (b"webhook-timestamp", sent), (b"webhook-signature", b"v1," + base64.b64encode(digest))]

    latin, utf8 = STANDARD.verify(signed(b"\xe9"), BODY).identity, STANDARD.verify(signed(b"\xc3\xa9"), BODY).identity
    assert (len(latin), utf8) == (64, "é")


@pytest.mark.parametrize("join", [", ", ",", " ", None])
def test_every_signature_header_counts(join: str | None) -> None:
    headers = standard(BODY)
    right = headers.pop("Webhook-Signature")
    for signatures in (["v1,AAAA", right], [right, "v1,AAAA"], ["v1a,AAAA", "v1,AAAA", right]):
        given = signatures if join is None else [join.join(signatures)]
        pairs = [*headers.items(), *(("webhook-Signature", each) for each in given)]
        assert STANDARD.verify(pairs, BODY).identity == "msg_2"
    for wrong in (["v1,AAAA", "v1a," + right[3:]], [right[3:], "v1,"], [right + "A", "x" + right], ["v1,AAAA"] * 3000 + [right]):
        with pytest.raises(VerificationError):
            STANDARD.verify([*headers.items(), *(("Webhook-Signature", each) for each in wrong)], BODY)


def test_a_zero_does_not_pass_from_the_body_to_the_time() -> None:
    value = signed_by_time(b"10")["X-Inngest-Signature"]
    assert TIMED.verify({"X-Inngest-Signature": value}, b"10").identity
    with pytest.raises(VerificationError):
        TIMED.verify({"X-Inngest-Signature": value.replace("t=", "t=0")}, b"1")


def test_identities_name_the_delivery() -> None:
    assert ALERT.verify(lowercase(signed_alert(BODY)), BODY).identity == "alert-1"
    assert ALERT.verify(lowercase(signed_alert(b"text")), b"text").identity == signed_alert(b"text")["X-Trigger-Signature-HMACSHA256"]
    assert STANDARD.verify(lowercase(standard(BODY)), BODY).identity == "msg_2"
    assert QSTASH.verify(lowercase(pushed(BODY)), BODY).identity == "msg_1"
    once, again = (TIMED.verify(lowercase(signed_by_time(BODY, at=NOW + second)), BODY).identity for second in (0, 1))
    assert once != again
    nameless = QSTASH.verify(lowercase(pushed(BODY, None)), BODY)
    assert nameless.identity == nameless.proof == QSTASH.verify(pushed(BODY), BODY).proof
    assert ALERT.verify(signed_alert(b'{"id": 7}'), b'{"id": 7}').identity == "7"


@pytest.mark.parametrize("name", ["x" * 513, "a\0b", "a\nb", "\ud800"])
def test_a_name_that_no_record_can_hold_is_hashed(name: str) -> None:
    body = json.dumps({"id": name}).encode()
    assert len(ALERT.verify(signed_alert(body), body).identity) == 64


@pytest.mark.parametrize(
    "make",
    [
        lambda: TriggerDevAlert(""),
        lambda: TimestampedHmac([]),
        lambda: TimestampedHmac("signkey-prod-"),
        lambda: StandardWebhooks("whsec_"),
        lambda: StandardWebhooks("whsec_!"),
        lambda: QStash([""], url=URL),
    ],
)
def test_a_verifier_without_a_key_is_none(make: Any) -> None:
    with pytest.raises(SettingsError):
        make()


UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
ODD = st.sampled_from("aZ019 .,=&-_+/%{}[]\0\n\x7f\xa0\xe9\u2028\ud800\udc80\U0001f600")
TEXT = (
    st.text(ODD, max_size=60)
    | st.from_regex(r"t=[0-9]{1,12}&s=[0-9a-f]{64}", fullmatch=True)
    | st.from_regex(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+", fullmatch=True)
)
NAMED = st.dictionaries(
    st.sampled_from(
        [
            "x-trigger-signature-hmacsha256",
            "x-inngest-signature",
            "upstash-signature",
            "upstash-message-id",
            "webhook-id",
            "webhook-timestamp",
            "webhook-signature",
        ]
    ),
    TEXT,
    max_size=7,
)


BODIES = st.binary(max_size=100) | st.text(ODD, max_size=20) | st.none() | st.integers() | st.lists(st.integers(), max_size=2)


@UNHURRIED
@given(headers=NAMED | st.none() | st.lists(st.text(ODD, max_size=2) | st.tuples(TEXT, st.binary()), max_size=4), body=BODIES)
def test_nothing_else_is_ever_raised(headers: Any, body: Any) -> None:
    for verifier, _ in ALL:
        with pytest.raises(VerificationError):
            verifier.verify(headers, body)


@UNHURRIED
@given(
    st.one_of(
        st.none(), st.integers(), st.lists(st.lists(st.text() | st.binary() | st.none(), max_size=3)), st.dictionaries(st.text(), st.none())
    )
)
def test_headers_of_any_shape_are_read(headers: Any) -> None:
    assert isinstance(lowercase(headers), Mapping)


def test_headers_whose_own_code_fails_are_none() -> None:
    class Broken:
        def items(self) -> Any:
            raise RuntimeError

    assert dict(lowercase(Broken())) == {}
