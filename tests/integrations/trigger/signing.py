"""Deliveries as the backends sign them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from datetime import UTC, datetime
from typing import Any

from standardwebhooks import Webhook

NOW = 1_790_000_000.0
URL = "https://example.test/hook"
BODY = b'{"id": "alert-1", "n": 1}'
SECRET = "whsec_" + base64.b64encode(b"a secret of some length").decode()


def clock() -> float:
    return NOW


def signed_alert(body: bytes, key: str = "key") -> dict[str, str]:
    return {"X-Trigger-Signature-HMACSHA256": hmac.digest(key.encode(), body, hashlib.sha256).hex()}


def signed_by_time(body: bytes, key: str = "secret", at: float = NOW) -> dict[str, str]:
    sent = str(int(at))
    return {"X-Inngest-Signature": f"t={sent}&s={hmac.digest(key.encode(), body + sent.encode(), hashlib.sha256).hex()}"}


def _part(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def token(content: bytes, key: str = "current", algorithm: str = "HS256", **claims: Any) -> str:
    known = {
        "iss": "Upstash",
        "sub": URL,
        "exp": NOW + 300,
        "nbf": NOW,
        "iat": NOW,
        "jti": "jwt_1",
        "body": base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode(),
    }
    signed = f"{_part({'alg': algorithm, 'typ': 'JWT'})}.{_part({**known, **claims})}"
    return f"{signed}.{_part(hmac.digest(key.encode(), signed.encode(), hashlib.sha256))}"


def pushed(content: bytes, message: str | None = "msg_1", **claims: Any) -> dict[str, str]:
    headers = {"Upstash-Signature": token(content, **claims)}
    return headers if message is None else headers | {"Upstash-Message-Id": message}


def standard(body: bytes, secret: str = SECRET, at: float = NOW, message: str = "msg_2") -> dict[str, str]:
    signature = Webhook(secret).sign(message, datetime.fromtimestamp(at, UTC), body.decode())
    return {"Webhook-Id": message, "Webhook-Timestamp": str(int(at)), "Webhook-Signature": signature}
