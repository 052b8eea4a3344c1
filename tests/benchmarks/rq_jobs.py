"""What the RQ benchmark runs."""

from __future__ import annotations


def nothing() -> None:
    """Do nothing."""
