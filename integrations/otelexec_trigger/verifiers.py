"""
Who sent a delivery: the signatures of push backends, verified on the raw body before anything else looks at it.

A verifier takes headers and body, whatever these are, and gives the delivery's identity, or raises `VerificationError` and
nothing else. Signatures are compared in constant time.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from otelexec.errors import OtelexecError, SettingsError

logger = logging.getLogger("otelexec.trigger")

TOLERANCE_SECONDS: Final = 300.0
"""How far a delivery's clock may be from ours, either way (Standard Webhooks, section "Verifying webhook authenticity")."""

_MAX_HEADER_CHARS: Final = 16_384
_MAX_IDENTITY_CHARS: Final = 512
_FAR: Final = 2**33
"""No time in seconds since 1970 is beyond this for now; a NaN or an infinity is not within it either."""
_PREFIX: Final = re.compile(rb"\Asignkey-[^-]+-")
_TIMESTAMP: Final = re.compile(r"\A(0|[1-9][0-9]{0,11})\Z")
"""Without zeros in front: where nothing stands between body and time, a body's last zero would else pass for the time's first."""
_SIGNATURE_V1: Final = re.compile(r"(?:\A|(?<=[\s,]))v1,([^\s,]+)")
_HEX_SHA256: Final = re.compile(r"\A[0-9a-fA-F]{64}\Z")

Clock = Callable[[], float]


class VerificationError(OtelexecError):
    """The delivery is not signed by whom it says it is from. Nothing was run."""


@dataclass(frozen=True, slots=True)
class Verified:
    """
    A delivery that is what it says.

    Attributes:
        identity: Names it; a redelivery has the same.
        proof: What proved it, where that does not cover the identity: it must never serve another one. Empty where it does cover it.
        valid_until: Until when the proof would be taken, in seconds since 1970; 0 where there is none.
    """

    identity: str
    proof: str = ""
    valid_until: float = 0.0


class Verifier(Protocol):
    """Verifies deliveries of one backend."""

    provider: str
    """The backend's name, as correlation field."""

    def verify(self, headers: Mapping[str, str], body: bytes) -> Verified:
        """
        Verify a delivery.

        Args:
            headers: Found by a name in any case.
            body: As it came.

        Raises:
            VerificationError: It is not signed, forged, too old or from the future.
        """
        ...


class TriggerDevAlert:
    """
    Alert webhooks of Trigger.dev: `x-trigger-signature-hmacsha256` is the hex HMAC-SHA256 of the body.

    They bear no time: an old alert is known by the id in its body, for as long as its record is kept.

    Args:
        key: The webhook's secret.

    Raises:
        SettingsError: The key is empty.
    """

    provider = "trigger.dev"

    def __init__(self, key: str | bytes) -> None:
        (self._key,) = _keys(key)

    def verify(self, headers: object, body: bytes) -> Verified:
        """Verify an alert; its identity is the body's `id`, else the signature."""
        found, body = lowercase(headers), raw(body)
        signature = _header(found, "x-trigger-signature-hmacsha256").strip().lower()
        if not _same(signature, hmac.digest(self._key, body, hashlib.sha256).hex()):
            raise VerificationError("The alert's signature is none of ours.")
        try:
            told = json.loads(body)
        except (ValueError, RecursionError):
            told = None
        alert = told.get("id") if isinstance(told, dict) else None
        named = isinstance(alert, str | int) and not isinstance(alert, bool) and alert != ""
        return Verified(identity_of(str(alert)) if named else signature)


class TimestampedHmac:
    """
    Signatures of the form `t=<seconds>&s=<hex>`, such as Inngest's: HMAC-SHA256 over the body followed by t.

    Args:
        keys: One key or several, of which any may have signed; a `signkey-<env>-` in front is left out.
        header: The header that holds the signature.
        tolerance_seconds: How old or how far ahead a signature may be.
        clock: Gives seconds since 1970.

    Raises:
        SettingsError: There is no key, or nothing of one but its prefix.
    """

    def __init__(
        self,
        keys: str | bytes | Iterable[str | bytes],
        *,
        header: str = "x-inngest-signature",
        tolerance_seconds: float = TOLERANCE_SECONDS,
        clock: Clock = time.time,
    ) -> None:
        # Checked again: a prefix with nothing behind it would be an empty key.
        self._keys = _keys([_PREFIX.sub(b"", key) for key in _keys(keys)])
        self._header = header.lower()
        self._tolerance = tolerance_seconds
        self._clock = clock
        self.provider = self._header

    def verify(self, headers: object, body: bytes) -> Verified:
        """Verify a delivery; its identity is the signature with its time, so that a delivery signed anew is another one."""
        found, body = lowercase(headers), raw(body)
        parts: dict[str, str] = {}
        for part in re.split("[&,]", _header(found, self._header)):
            name, _, value = part.strip().partition("=")
            parts.setdefault(name, value)
        sent, signature = parts.get("t", ""), parts.get("s", "").lower()
        if not _TIMESTAMP.match(sent) or not _HEX_SHA256.match(signature):
            raise VerificationError(f"{self._header} is not of the form t=<seconds>&s=<hex>.")
        digests = [hmac.digest(key, body + sent.encode(), hashlib.sha256).hex() for key in self._keys]
        if not any(_same(signature, digest) for digest in digests):
            raise VerificationError("The signature is none of ours.")
        _check_time(int(sent), self._tolerance, self._clock())
        return Verified(f"{sent}.{signature}")


class QStash:
    """
    Deliveries of Upstash QStash: `Upstash-Signature` is a JWT (HS256) over the URL and the body's digest.

    The message id is in a header that the token does not cover. So a token is bound to the first message id that it came
    with, durably, and with any other one, or without one, it is refused: whoever has seen a delivery can't make a second one
    of it. Delivered again by QStash itself, a message has the same id and a new token.

    Args:
        keys: The current signing key, and the next one.
        url: The URL that QStash was told to deliver to.
        tolerance_seconds: By how much the two clocks may differ.
        clock: Gives seconds since 1970.

    Raises:
        SettingsError: There is no key, or one is empty.
    """

    provider = "qstash"

    def __init__(
        self, keys: str | bytes | Iterable[str | bytes], *, url: str, tolerance_seconds: float = 0.0, clock: Clock = time.time
    ) -> None:
        self._keys = _keys(keys)
        self._url = url
        self._tolerance = tolerance_seconds
        self._clock = clock

    def verify(self, headers: object, body: bytes) -> Verified:
        """Verify a delivery; its identity is `Upstash-Message-Id`, else the token."""
        found, body = lowercase(headers), raw(body)
        token = _header(found, "upstash-signature").strip()
        parts = token.split(".")
        if len(parts) != 3 or not token.isascii():  # noqa: PLR2004 (RFC 7515, section 3.1)
            raise VerificationError("upstash-signature is no signed token.")
        signed = f"{parts[0]}.{parts[1]}".encode()
        given = _base64url(parts[2])
        if not any(hmac.compare_digest(given, hmac.digest(key, signed, hashlib.sha256)) for key in self._keys):
            raise VerificationError("The token is signed with none of our keys.")
        header, claims = _json_part(parts[0]), _json_part(parts[1])
        if header.get("alg") != "HS256":
            raise VerificationError("The token is not signed by HS256.")
        self._check(claims, body)
        proof = hashlib.sha256(signed).hexdigest()
        message_id = found.get("upstash-message-id", "").strip()
        # The token without a message id is a name like any other, or leaving out the header would make a second delivery of one.
        return Verified(identity_of(message_id) if message_id else proof, proof, float(claims["exp"]) + self._tolerance)

    def _check(self, claims: Mapping[str, Any], body: bytes) -> None:
        if claims.get("iss") != "Upstash":
            raise VerificationError("The token is not Upstash's.")
        if claims.get("sub") != self._url:
            raise VerificationError("The token is for another URL.")
        now, until, since = self._clock(), claims.get("exp"), claims.get("nbf", 0)
        if not isinstance(until, int | float) or not isinstance(since, int | float) or not (abs(until) < _FAR and abs(since) < _FAR):
            raise VerificationError("The token does not say how long it is valid.")
        if now > until + self._tolerance or now < since - self._tolerance:
            raise VerificationError("The token is not valid at this time.")
        digest = base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b"=").decode()
        if not _same(str(claims.get("body", "")).rstrip("="), digest):
            raise VerificationError("The token is for another body.")


class StandardWebhooks:
    """
    Deliveries as the Standard Webhooks specification 1.0.0 has them: `webhook-id`, `webhook-timestamp`, `webhook-signature`.

    Args:
        secrets: One secret or several, of which any may have signed: base64, with or without `whsec_` in front.
        tolerance_seconds: How old or how far ahead a delivery may be.
        clock: Gives seconds since 1970.

    Raises:
        SettingsError: There is no secret, or one is empty or no base64.
    """

    provider = "standard-webhooks"

    def __init__(
        self, secrets: str | bytes | Iterable[str | bytes], *, tolerance_seconds: float = TOLERANCE_SECONDS, clock: Clock = time.time
    ) -> None:
        try:
            self._keys = [base64.b64decode(secret.removeprefix(b"whsec_"), validate=True) for secret in _keys(secrets)]
        except (binascii.Error, ValueError):
            raise SettingsError("StandardWebhooks: a secret is base64, with or without whsec_ in front") from None
        if not all(self._keys):
            raise SettingsError("StandardWebhooks: a secret is empty")
        self._tolerance = tolerance_seconds
        self._clock = clock

    def verify(self, headers: object, body: bytes) -> Verified:
        """Verify a delivery; its identity is `webhook-id`, which the signature covers."""
        found, body = lowercase(headers), raw(body)
        message_id, sent = _header(found, "webhook-id"), _header(found, "webhook-timestamp").strip()
        _header(found, "webhook-signature")
        if not message_id:
            raise VerificationError("webhook-id is empty.")
        if not _TIMESTAMP.match(sent):
            raise VerificationError("webhook-timestamp is no number of seconds.")
        given = _SIGNATURE_V1.findall(_joined(found, "webhook-signature"))
        for signed_id in _sent_as(message_id):
            signed = signed_id + f".{sent}.".encode() + body
            wanted = [base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode() for key in self._keys]
            if any(_same(each, digest) for each in given for digest in wanted):
                _check_time(int(sent), self._tolerance, self._clock())
                # Named by the bytes that are signed, or one that is read in two ways would be two deliveries.
                return Verified(identity_of(signed_id.decode("utf-8", "surrogateescape")))
        raise VerificationError("The signature is none of ours.")


# --- What they share ---------------------------------------------------------------------------------------------


class Headers(Mapping[str, str]):
    """
    Headers by lowercase name, found by a name in any case.

    Args:
        found: Them, by lowercase name.
        further: What further headers of a name hold.
    """

    def __init__(self, found: Mapping[str, str], further: Mapping[str, Sequence[str]] | None = None) -> None:
        self._found = found
        self._further = further or {}

    def every(self, name: str) -> list[str]:
        """Give what all headers of a name hold."""
        name = name.lower()
        return [*([self._found[name]] if name in self._found else []), *self._further.get(name, [])]

    def __getitem__(self, name: str) -> str:
        return self._found[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def lowercase(headers: object) -> Headers:
    """
    Give headers by lowercase name, whatever they came in: a mapping or pairs, of text or bytes. The first of several counts.

    Args:
        headers: Any object; what is no header is left out. Never raises because of it.
    """
    if isinstance(headers, Headers):
        return headers
    found: dict[str, str] = {}
    further: dict[str, list[str]] = {}
    try:
        items = getattr(headers, "items", None)
        pairs: Any = items() if callable(items) else headers if isinstance(headers, Iterable) else ()
        for pair in pairs:
            if isinstance(pair, Sequence) and len(pair) == 2:  # noqa: PLR2004 (a pair)
                name, value = (each.decode("latin-1") if isinstance(each, bytes) else each for each in pair)
                if isinstance(name, str) and isinstance(value, str):
                    if name.lower() in found:
                        further.setdefault(name.lower(), []).append(value)
                    else:
                        found[name.lower()] = value
    except Exception:  # the object's own code
        logger.debug("otelexec.trigger.unreadable: %s", type(headers).__name__, exc_info=True)
    return Headers(found, further)


def raw(body: object) -> bytes:
    """
    Give a body as bytes; one that a server has made text of is UTF-8, and its signature tells whether it was.

    Args:
        body: Any object.

    Raises:
        VerificationError: It is no body.
    """
    if isinstance(body, str):
        return body.encode("utf-8", "surrogatepass")
    if isinstance(body, bytes | bytearray | memoryview):
        return bytes(body)
    raise VerificationError(f"A body is bytes, not {type(body).__name__}.")


def identity_of(name: str) -> str:
    """
    Give the identity that a delivery's name makes: the name, or its digest where no record could hold it as it is.

    Args:
        name: Any text.
    """
    if len(name) <= _MAX_IDENTITY_CHARS and name.isprintable():
        return name
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def _keys(keys: str | bytes | Iterable[str | bytes]) -> list[bytes]:
    given = [keys] if isinstance(keys, str | bytes) else list(keys)
    found = [key.encode() if isinstance(key, str) else key for key in given]
    if not found or not all(found):
        raise SettingsError("A verifier needs a key: an empty one would take every delivery for genuine.")
    return found


def _header(headers: Mapping[str, str], name: str) -> str:
    value = headers.get(name)
    if value is None:
        raise VerificationError(f"The delivery has no {name}.")
    if len(value) > _MAX_HEADER_CHARS:
        raise VerificationError(f"{name} is too long.")
    return value


def _joined(headers: Headers, name: str) -> str:
    """Give what all headers of a name hold, as a proxy joins them (RFC 9110, section 5.3)."""
    value = ", ".join(headers.every(name))
    if len(value) > _MAX_HEADER_CHARS:
        raise VerificationError(f"{name} is too long.")
    return value


def _sent_as(text: str) -> list[bytes]:
    """
    Give the bytes that a header's text may have been sent as.

    Servers read headers as Latin-1, whatever they were written in (PEP 3333; ASGI gives bytes, which are read so here), and some
    read them as UTF-8.
    """
    found = [text.encode("utf-8", "surrogatepass")]
    with contextlib.suppress(UnicodeEncodeError):
        found.append(text.encode("latin-1"))
    return list(dict.fromkeys(found))


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), wanted.encode())


def _check_time(sent: int, tolerance_seconds: float, now: float) -> None:
    if sent < now - tolerance_seconds:
        raise VerificationError("The delivery is too old.")
    if sent > now + tolerance_seconds:
        raise VerificationError("The delivery is from the future.")


def _base64url(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise VerificationError("The token is no base64.") from None


def _json_part(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(_base64url(text))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise VerificationError("The token holds no JSON object.")
    return found
