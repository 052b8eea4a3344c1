"""Ids, and the text of whatever a user or a message calls one."""

from __future__ import annotations

import os
import time
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from hashlib import sha256
from typing import Final
from uuid import UUID

from otelexec.w3c import clean

MAX_ID_CHARS: Final = 128
MAX_ORIGINAL_CHARS: Final = 256
"""How much of an id that had to be hashed is kept beside the hash."""


def mint_id() -> str:
    """
    Make a new id: a UUIDv7 in lowercase text, so that ids sort by time.

    The 12 bits after the version hold the fraction of the millisecond in units of about 244 ns (RFC 9562,
    section 6.2, method 3), the 62 random bits come from the operating system: a user's `random.seed()` and a fork
    change nothing.
    """
    milliseconds, rest = divmod(time.time_ns(), 1_000_000)
    noise = int.from_bytes(os.urandom(8), "big")
    fraction = (rest << 12) // 1_000_000
    return (
        f"{milliseconds >> 16:08x}-{milliseconds & 0xFFFF:04x}-7{fraction:03x}-{noise >> 50 | 0x8000:04x}-{noise & 0xFFFF_FFFF_FFFF:012x}"
    )


def normalize_id(value: str) -> tuple[str, str | None]:
    """
    Make an id of any text.

    Args:
        value: 1 to 128 printable ASCII characters are an id already. Other text is hashed (SHA-256, lowercase hex).
            Empty text names nothing: hashing it would give one id to everything unnamed, so a new id is minted.

    Returns:
        The id, and the start of the original text where it was hashed (at most 256 characters), else None.
    """
    if not value:
        return mint_id(), None
    if len(value) <= MAX_ID_CHARS and value.isascii() and value.isprintable():
        return value, None
    return sha256(value.encode("utf-8", "surrogatepass")).hexdigest(), clean(value[:MAX_ORIGINAL_CHARS])


def as_text(value: object) -> str:
    """
    Give the text of a field: numbers as Python writes them, dates and times in ISO 8601, UUIDs, enums by their value.

    Raises:
        ValueError: The value is none of those.
    """
    if isinstance(value, str):
        return clean(str.__str__(value))
    if isinstance(value, Enum):
        return as_text(value.value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, int | float | Decimal | UUID):
        return str(value)
    msg = f"must be text, a number, a date or a UUID, not {type(value).__name__}"
    raise ValueError(msg)
