"""Ids, and the text of whatever a user or a message calls one."""

from __future__ import annotations

import os
import time
from collections import deque
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from hashlib import sha256
from struct import Struct
from typing import Final
from uuid import UUID

from otelexec.w3c import clean

MAX_ID_CHARS: Final = 128
MAX_ORIGINAL_CHARS: Final = 256
"""How much of an id that had to be hashed is kept beside the hash."""

_WORDS: Final = Struct("=512Q")
_random: deque[int] = deque()


def _renew() -> None:
    """Leave to the parent what it has drawn: a forked child that went on with a copy would repeat the parent's ids."""
    global _random  # noqa: PLW0603 (not cleared but replaced, in case a signal handler forks while it is being filled)
    _random = deque()


os.register_at_fork(after_in_child=_renew)


def random_word() -> int:
    """
    Give 64 random bits of the operating system's, which a user's `random.seed()` doesn't touch; no two callers get the same.

    They are fetched many at a time: each call of `os.urandom` lets another thread take the interpreter, which under
    load takes longer to come back than the rest of an id's making.
    """
    while True:
        words = _random
        try:
            return words.popleft()  # atomic, and unlike a lock it can't be inherited in the locked state by a fork
        except IndexError:
            words.extend(_WORDS.unpack(os.urandom(_WORDS.size)))


def mint_id() -> str:
    """
    Make a new id: a UUIDv7 in lowercase text, so that ids sort by time.

    The 12 bits after the version hold the fraction of the millisecond in units of about 244 ns (RFC 9562,
    section 6.2, method 3), 62 of a `random_word()` follow.
    """
    milliseconds, rest = divmod(time.time_ns(), 1_000_000)
    noise = random_word()
    fraction = (rest << 12) // 1_000_000
    return (
        f"{milliseconds >> 16:08x}-{milliseconds & 0xFFFF:04x}-7{fraction:03x}-{noise >> 50 | 0x8000:04x}-{noise & 0xFFFF_FFFF_FFFF:012x}"
    )


def mint_nonce() -> str:
    """Name a write that may be repeated; the names sort by time."""
    return nonce_at(time.time_ns()) + f"{random_word():016x}"


def nonce_at(unix_ns: int) -> str:
    """Give what nonces of a time begin with."""
    return f"{unix_ns // 1_000_000:012x}"


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
