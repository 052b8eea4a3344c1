"""
The plans of the very statements that a store runs, also inside its functions: `auto_explain` writes them to the server's log.

What must not be in them is a node that reads a large table, or one of its indexes, from end to end: it costs nothing
today and grows with the store.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tests.postgres_servers import database_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tests.postgres_servers import Server

LARGE: Final = ("execution", "attempt", "outbox", "open_span")
"""The tables that grow with the work."""

# By database, so that no other session on the server writes any.
_SETTINGS: Final = {
    "session_preload_libraries": "auto_explain",
    "auto_explain.log_min_duration": "0",
    "auto_explain.log_nested_statements": "on",
    "auto_explain.log_analyze": "on",
    "auto_explain.log_buffers": "on",
    "auto_explain.log_timing": "off",
    "auto_explain.log_format": "json",
}

_MARK: Final = "plan:\n"


@dataclass(frozen=True, slots=True)
class Scan:
    """
    One node that reads a table or an index.

    Attributes:
        node: What it is, for example `Index Scan`.
        table: The table; empty for a node that reads an index alone.
        index: The index; empty for a sequential scan.
        condition: What the index is searched for; empty where it is read from its beginning.
        rows: How many rows it gave, in all its loops.
        one: Whether no more than its first entries are wanted, as for a minimum.
    """

    node: str
    table: str
    index: str
    condition: str
    rows: float
    one: bool

    def __str__(self) -> str:
        where = " on ".join(part for part in (f"using {self.index}" if self.index else "", self.table) if part)
        return f"{self.node} {where} {self.condition[:80]} -> {self.rows:g} rows"


@dataclass(frozen=True, slots=True)
class Plan:
    """
    The plan of one statement as it was run.

    Attributes:
        statement: Its text.
        scans: What it read.
        buffers: Pages that it touched, in memory or not.
    """

    statement: str
    scans: Sequence[Scan]
    buffers: int


class Recorder:
    """
    Records the plans of one database; only sessions that begin afterwards take part.

    Args:
        server: The server.
        url: The database.
    """

    def __init__(self, server: Server, url: str) -> None:
        self._server = server
        self._database = database_of(url)
        with server.administrator() as connection:
            for name, value in _SETTINGS.items():
                connection.execute(f"ALTER DATABASE {self._database} SET {name} = '{value}'".encode())

    def forget(self) -> None:
        """Let new sessions be as they were."""
        with self._server.administrator() as connection:
            for name in _SETTINGS:
                connection.execute(f"ALTER DATABASE {self._database} RESET {name}".encode())

    @contextmanager
    def recorded(self) -> Iterator[list[Plan]]:
        """Give a list that holds the plans of whatever runs in the block, once it has ended."""
        plans: list[Plan] = []
        start = self._server.log.stat().st_size
        yield plans
        # The server writes a plan before it answers, so everything is there.
        with self._server.log.open("rb") as log:
            log.seek(start)
            text = log.read().decode("utf-8", "replace")
        decoder = json.JSONDecoder()
        for part in text.split(_MARK)[1:]:
            found, _ = decoder.raw_decode(part.lstrip())
            plans.append(_plan(found))


def _plan(found: Mapping[str, Any]) -> Plan:
    top = found["Plan"]
    buffers = top.get("Shared Hit Blocks", 0) + top.get("Shared Read Blocks", 0)
    return Plan(found["Query Text"], tuple(_scans(top)), buffers)


def _scans(node: Mapping[str, Any], parent: str = "") -> Iterator[Scan]:
    if "Scan" in node["Node Type"] and ("Relation Name" in node or "Index Name" in node):
        conditions = (node.get(name, "") for name in ("Index Cond", "TID Cond", "Recheck Cond"))
        yield Scan(
            node["Node Type"] + (" Backward" if node.get("Scan Direction") == "Backward" else ""),
            node.get("Relation Name", ""),
            node.get("Index Name", ""),
            next(filter(None, conditions), ""),
            node.get("Actual Rows", 0) * node.get("Actual Loops", 0),
            parent == "Limit" and "Index Name" in node and "Filter" not in node,
        )
    for child in node.get("Plans", ()):
        yield from _scans(child, node["Node Type"])


def from_end_to_end(plans: Sequence[Plan], tables: Sequence[str] = LARGE) -> list[str]:
    """
    Give what reads one of these tables, or an index of theirs, without a condition to search by.

    Args:
        plans: The plans.
        tables: The tables.

    Returns:
        A line for each such node, with its statement; empty when there is none.
    """
    return [
        f"{scan} in {' '.join(plan.statement.split())[:160]}"
        for plan in plans
        for scan in plan.scans
        if not scan.condition and not scan.one and (scan.table in tables or scan.index.startswith(tuple(tables)))
    ]


def show(what: str, plans: Sequence[Plan]) -> None:
    """
    Print what was read, and complain of what reads from end to end.

    Args:
        what: What ran.
        plans: Its plans.
    """
    print(f"\n{what}:")
    for plan in plans:
        for scan in plan.scans:
            print(f"    {scan}")
    for line in from_end_to_end(plans):
        print(f"    READS ALL: {line}")
