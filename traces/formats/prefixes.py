"""Prefixes: prompts given as ids, told as parts of the prompts before them."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from twinserve.traces.request import Part, merged


@dataclass(slots=True)
class _Edge:
    """The ids [start, end) of prompts that are alike up to `end`; `text` is the first of them."""

    text: int
    ids: list[int]
    start: int
    end: int
    children: dict[int, _Edge] = field(default_factory=dict)


class Prefixes:
    """Finds what a prompt shares with the prompts before it, from its start on: a radix tree over their ids.

    An id stands for `unit` tokens, a token or a block of them.
    """

    def __init__(self, unit: int = 1):
        self._unit = unit
        self._children: dict[int, _Edge] = {}

    def parts(self, ids: list[int], text: int) -> tuple[Part, ...]:
        """The prompt as parts: what it shares is of the texts of earlier prompts, the rest is of `text`."""
        shared: list[Part] = []
        at, children = 0, self._children
        while at < len(ids):
            edge = children.get(ids[at])
            if edge is None:
                edge = children[ids[at]] = _Edge(text, ids, at, len(ids))
            end = _common_end(edge, ids)
            if end < edge.end:
                rest = _Edge(edge.text, edge.ids, end, edge.end, edge.children)
                edge.end, edge.children = end, {edge.ids[end]: rest}
            shared.append(Part(edge.text, at * self._unit, (end - at) * self._unit))
            at, children = end, edge.children
        return tuple(merged(shared))


def _common_end(edge: _Edge, ids: list[int]) -> int:
    """Up to where `ids` is like the ids of the edge."""
    start, end = edge.start, min(edge.end, len(ids))
    if edge.ids[start:end] == ids[start:end]:
        return end
    return bisect_left(range(start, end), True, key=lambda at: edge.ids[start : at + 1] != ids[start : at + 1]) + start
