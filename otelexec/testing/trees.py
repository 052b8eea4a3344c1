"""Spans as a literal that a test can compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from opentelemetry.sdk.trace import ReadableSpan

from otelexec.decoded import DecodedSpan

Tree: TypeAlias = tuple[Any, ...]


def span_tree(spans: Iterable[DecodedSpan | ReadableSpan], *, attributes: Sequence[str] = ()) -> list[Tree]:
    """
    Give spans as nested literals: `("name", [children])`, or `("name", {attributes}, [children])`.

    A span whose parent is not among them is a root. Brothers stand in the order of their start times, then names.

    Args:
        spans: Spans as a receiver or an exporter of the SDK has them.
        attributes: Names of attributes to show; those that a span lacks are left out.

    Raises:
        ValueError: Two spans carry one id.
    """
    by_id: dict[str, _Node] = {}
    for span in spans:
        node = _Node(span)
        if node.span_id in by_id:
            raise ValueError(f"two spans have the id {node.span_id}: {by_id[node.span_id].name} and {node.name}")
        by_id[node.span_id] = node
    roots: list[_Node] = []
    for node in by_id.values():
        (by_id[node.parent].children if node.parent in by_id else roots).append(node)
    return [root.literal(attributes) for root in sorted(roots, key=_Node.order)]


class _Node:
    def __init__(self, span: DecodedSpan | ReadableSpan) -> None:
        if isinstance(span, DecodedSpan):
            self.span_id, self.parent = span.span_id, span.parent_span_id or ""
            self.start = span.start_unix_ns
        else:
            context = span.get_span_context()
            self.span_id = "" if context is None else f"{context.span_id:016x}"
            self.parent = "" if span.parent is None else f"{span.parent.span_id:016x}"
            self.start = span.start_time or 0
        self.name = span.name
        self.attributes = dict(span.attributes or {})
        self.children: list[_Node] = []

    def order(self) -> tuple[int, str]:
        return self.start, self.name

    def literal(self, attributes: Sequence[str]) -> Tree:
        children = [child.literal(attributes) for child in sorted(self.children, key=_Node.order)]
        if not attributes:
            return self.name, children
        return self.name, {name: self.attributes[name] for name in attributes if name in self.attributes}, children
