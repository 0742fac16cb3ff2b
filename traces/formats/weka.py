"""WEKA's agentic coding traces (github.com/callanjfox/kv-cache-tester): a JSON object a conversation.

A file is one conversation, or has one a line; or a folder has files.

`block_size`, and `requests` with `t` (seconds from the start of the conversation), `in`, `out`, and `hash_ids`: an id
for each whole block of the prompt, alike where the prefix that ends there is alike. Ids are local to a conversation. An
element of `requests` that has `requests` of its own is a sub-agent, whose times count from its own `t`.

A conversation is a session. A request waits for the answer of the one before it, a sub-agent's first for the one that
its parent sent last, and comes `think_time` later; where the request before it lacks `api_time`, the time between the
two. When conversations begin is not known: each begins at 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from twinserve.traces.formats.prefixes import Prefixes
from twinserve.traces.formats.reading import Reading, Rows
from twinserve.traces.lines import Line
from twinserve.traces.request import Part, Request, merged
from twinserve.traces.transforms import renumbered

NAME = "weka"
FIELDS = ("block_size", "requests")


@dataclass(frozen=True)
class _Turn:
    """A request of a conversation.

    Attributes:
        number: in all conversations, in the order of the files.
        time_ns: from the start of its conversation.
        after: number of the request whose answer it waits for.
        think_ns: how long after that answer it comes.
    """

    line: Line
    number: int
    time_ns: int
    after: int | None
    think_ns: int


def rows(conversations: list[Line], reading: Reading) -> Rows:
    """The requests of conversations, by their time."""
    found: list[tuple[Line, Request]] = []
    for session, conversation in enumerate(conversations):
        block = conversation.integer("block_size", 1)
        prefixes = Prefixes(block)
        for turn in _turns(conversation, 0, None, len(found), reading):
            parts = _parts(turn, block, prefixes, reading)
            output_tokens = reading.output_tokens(turn.line, "out")
            request = Request(turn.number, turn.time_ns, parts, output_tokens, session, turn.after, turn.think_ns)
            found.append((turn.line, request))
    ordered = reading.in_time_order(found)
    requests = renumbered([request for _, request in ordered])
    for (line, _), request in zip(ordered, requests, strict=True):
        yield line, "t", request


def _turns(agent: Line, start_ns: int, parent: _Turn | None, number: int, reading: Reading) -> Iterator[_Turn]:
    """The requests of an agent and of its sub-agents in the order of the file, numbered from `number`."""
    before = parent
    for line in agent.items("requests"):
        time_ns = start_ns + reading.time_ns(line, "t")
        if "requests" in line.values:
            for turn in _turns(line, time_ns, before, number, reading):
                yield turn
                number += 1
        else:
            after, think_ns = None, 0
            if before is not None:
                after, think_ns = before.number, _think_ns(line, time_ns, before, before is parent, reading)
            before = _Turn(line, number, time_ns, after, think_ns)
            yield before
            number += 1


def _think_ns(line: Line, time_ns: int, before: _Turn, is_first: bool, reading: Reading) -> int:
    """From the end of the answer `before` to a request, which is the first of its agent or not."""
    since_ns = max(0, time_ns - before.time_ns)
    if before.line.values.get("api_time") is None:
        return since_ns
    if is_first or line.values.get("think_time") is None:
        return max(0, since_ns - reading.time_ns(before.line, "api_time"))
    return reading.time_ns(line, "think_time")


def _parts(turn: _Turn, block: int, prefixes: Prefixes, reading: Reading) -> tuple[Part, ...]:
    """The prompt: its blocks, and what it holds beyond the last whole one."""
    length, ids = turn.line.integer("in", 1), turn.line.integers("hash_ids")
    if length % block and len(ids) == length // block + 1:
        # Some writers have an id for the part-filled block, too; nothing else can share it.
        reading.repaired["id_of_a_part_filled_block"] += 1
        ids = ids[:-1]
    if len(ids) != length // block:
        problem = f"expected {length // block} ids, one for each whole {block} of {length} tokens"
        raise turn.line.error(problem, "hash_ids", f"{len(ids)} ids")
    rest = length % block
    return tuple(merged((*prefixes.parts(ids, turn.number), Part(turn.number, length - rest, rest))))
