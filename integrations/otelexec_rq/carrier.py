"""
What a job carries for us: one key of its `meta`, which holds a dict of plain strings that any serializer can write.

RQ saves `meta` from the memory of whoever saves the job, so it carries what was known when the job was made, and never
an outcome.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from otelexec import semconv
from otelexec.carrier import HEADERS, NOTHING, Carrier, read_headers

KEY: Final = "otelexec"
"""The key of `job.meta`."""

NAME: Final = "otelexec-name"
"""Name of the execution: a worker's parent process does not unpickle the job to learn it."""
PREVIOUS: Final = "otelexec-previous"
"""`traceparent` of the attempt before this one."""
FIRST: Final = "otelexec-first"
"""`traceparent` of the first run of a job that repeats itself."""
DEPENDS: Final = "otelexec-depends"
"""`traceparent` of each job that this one depends on, separated by commas."""


def takes_stamp(job: Any) -> bool:
    """Tell whether a job's meta is a dict or empty; RQ takes any value there, and what users put there stays."""
    return not job.meta or isinstance(job.meta, Mapping)


def stamp(job: Any, carried: Mapping[str, str]) -> None:
    """
    Put what a job carries into its meta; what an earlier stamp left there, or a copied meta brought along, goes.

    Args:
        job: The job. Its meta is replaced, since it may be the caller's own dict.
        carried: Names and values to write.
    """
    if takes_stamp(job):
        job.meta = {**(job.meta or {}), KEY: dict(carried)}


def find(job: Any) -> Mapping[str, Any]:
    """Find what a job carries; empty when it was made by somebody who is not instrumented, or its meta can't be read."""
    meta = getattr(job, "meta", None)
    found = meta.get(KEY) if isinstance(meta, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def carrier_of(found: Mapping[str, Any]) -> Carrier:
    """Give the W3C part of what `find` gave."""
    if not found:
        return NOTHING
    return read_headers({name: found[name] for name in HEADERS if name in found})


def text_of(found: Mapping[str, Any], name: str) -> str | None:
    """Give one of the strings; None when it is not there, or no text."""
    value = found.get(name)
    return value if isinstance(value, str) and value else None


def traceparent_of(job: Any) -> str | None:
    """Give the `traceparent` of a job's PRODUCER span; None when it carries none."""
    return text_of(find(job), semconv.HEADER_TRACEPARENT)
