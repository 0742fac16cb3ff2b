"""A run record's requests.jsonl: the requests of a run, live traffic for one, as a trace to be replayed elsewhere.

A request asks for as many tokens as it got: what ended its answer then is not known elsewhere. Prompts are parts of
texts, without a word of what they said. A prompt that holds answers waits for the last of them, so that it is not sent
before it can be. What was refused is left out. Time 0 is the first request.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from twinserve.traces.formats.reading import Reading, Rows
from twinserve.traces.lines import Line, json_lines
from twinserve.traces.request import Part, Request, answer_text

NAME = "twinserve-record"
FIELDS = ("ingest", "finish_reason", "arrival_ns")


def rows(lines: Iterable[str], path: Path, reading: Reading) -> Rows:
    """The requests of a file."""
    found: list[tuple[Line, int]] = []
    for line in json_lines(lines, path):
        if line.get("finish_reason") == "refused":
            reading.dropped["refused"] += 1
        else:
            found.append((line, line.integer("arrival_ns")))
    found.sort(key=lambda row: row[1])
    numbers: dict[int, int] = {}
    for number, (line, arrival_ns) in enumerate(found):
        parts = tuple(_renumbered(line, part, numbers) for part in line.parts("prompt"))
        after = max((-1 - part.text for part in parts if part.text < 0), default=None)
        if (waited := line.optional_integer("after")) is not None and waited in numbers:
            after = max(numbers[waited], -1 if after is None else after)
        numbers[line.integer("id")] = number
        yield (
            line,
            "arrival_ns",
            Request(
                number,
                arrival_ns - found[0][1],
                parts,
                reading.output_tokens(line, "output_tokens"),
                session=line.optional_integer("session"),
                after=after,
                **line.labels(),
            ),
        )


def _renumbered(line: Line, part: Part, numbers: dict[int, int]) -> Part:
    """A part whose answer, if it is one, has the number that its request has here."""
    if part.text >= 0:
        return part
    if (number := numbers.get(-1 - part.text)) is None:
        raise line.error("expected answers of requests that came before", "prompt")
    return part._replace(text=answer_text(number))
