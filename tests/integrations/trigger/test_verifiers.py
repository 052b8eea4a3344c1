"""Every verifier takes what its backend signs, and nothing else whatever it is given."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
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
    assert verifier.verify(lowercase([(name.upper().encode(), value.encode()) for name, value in headers.items()]), BODY).identity
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


def test_identities_name_the_delivery() -> None:
    assert ALERT.verify(lowercase(signed_alert(BODY)), BODY).identity == "alert-1"
    assert ALERT.verify(lowercase(signed_alert(b"text")), b"text").identity == signed_alert(b"text")["X-Trigger-Signature-HMACSHA256"]
    assert STANDARD.verify(lowercase(standard(BODY)), BODY).identity == "msg_2"
    assert QSTASH.verify(lowercase(pushed(BODY)), BODY).identity == "msg_1"
    once, again = (TIMED.verify(lowercase(signed_by_time(BODY, at=NOW + second)), BODY).identity for second in (0, 1))
    assert once != again
    nameless = QSTASH.verify(lowercase(pushed(BODY, None)), BODY)
    assert (len(nameless.identity), nameless.proof) == (64, "")


@pytest.mark.parametrize(
    "make",
    [
        lambda: TriggerDevAlert(""),
        lambda: TimestampedHmac([]),
        lambda: StandardWebhooks("whsec_"),
        lambda: StandardWebhooks("whsec_!"),
        lambda: QStash([""], url=URL),
    ],
)
def test_a_verifier_without_a_key_is_none(make: Any) -> None:
    with pytest.raises(SettingsError):
        make()


TEXT = st.text(max_size=60) | st.from_regex(r"t=[0-9]{1,12}&s=[0-9a-f]{64}", fullmatch=True) | st.from_regex(r"[\w-]+\.[\w-]+\.[\w-]+")
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


@given(headers=NAMED, body=st.binary(max_size=100))
def test_nothing_else_is_ever_raised(headers: dict[str, str], body: bytes) -> None:
    for verifier, _ in ALL:
        with pytest.raises(VerificationError):
            verifier.verify(headers, body)


@given(
    st.one_of(
        st.none(), st.integers(), st.lists(st.lists(st.text() | st.binary() | st.none(), max_size=3)), st.dictionaries(st.text(), st.none())
    )
)
def test_headers_of_any_shape_are_read(headers: Any) -> None:
    assert isinstance(lowercase(headers), dict)
