"""Run records as traces: the requests of a run, live traffic for one, to be replayed elsewhere.

A trace is a run record's folder, a fleet's too, or the file requests.jsonl of one.

A request asks for as many tokens as it got: what ended its answer then is not known elsewhere. Prompts are parts of
texts, without a word of what they said. A prompt that holds answers waits for the last of them, so that it is not sent
before it can be. What was refused, or was not answered when its server was killed, is left out. Time 0 is the first
request.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from twinserve.settings.errors import InputError
from twinserve.settings.files import refuse_endless
from twinserve.traces.formats.reading import Reading, Rows
from twinserve.traces.lines import Line, json_lines
from twinserve.traces.request import Part, Request, answer_text

NAME = "twinserve-record"
FIELDS: tuple[str, ...] = ("ingest", "finish_reason", "arrival_ns")
SEGMENTS, REPLICAS = "segments", "replicas"
"""Folders in that of a record: pieces of live traffic's, and the records of a fleet's replicas."""


def is_record(folder: Path) -> bool:
    """Is there a run record in the folder?"""
    return (folder / "run.json").is_file()


def segments_of(folder: Path) -> list[Path]:
    """The pieces in which a record lies, each there whole, in their order; none where it lies in its folder itself.

    Raises:
        InputError: none is whole yet, or one is missing.
    """
    if not (folder / SEGMENTS).is_dir():
        return []
    found = sorted(piece for piece in (folder / SEGMENTS).iterdir() if piece.name.isdecimal())
    if not found:
        raise InputError("has no segment that is whole", path=folder / SEGMENTS)
    for number, piece in enumerate(found):
        if int(piece.name) != number:
            raise InputError(f"expected the segments from {segment_name(0)} on, without a gap", path=piece)
    return found


def segment_name(number: int) -> str:
    """The name of a segment's folder."""
    return f"{number:06}"


def replicas_of(folder: Path) -> list[Path]:
    """The records of a fleet's replicas, by number and life.

    Raises:
        InputError: there is none.
    """
    found = [(place, one) for one in (folder / REPLICAS).iterdir() if (place := replica_place(one)) is not None]
    if not found:
        raise InputError("has no replicas, expected folders named 0, 1, 2...", path=folder / REPLICAS)
    return [one for _, one in sorted(found)]


def replica_place(folder: Path) -> tuple[int, int] | None:
    """Number and life of a replica, from its folder's name."""
    number, _, life = folder.name.partition(".")
    return (int(number), int(life or 0)) if number.isdecimal() and (not life or life.isdecimal()) else None


def request_files(folder: Path) -> list[Path]:
    """The files that hold the requests of a record.

    Raises:
        InputError: a segment or a replica is missing, or one holds what is no file.
    """
    records = replicas_of(folder) if (folder / REPLICAS).is_dir() else [folder]
    pieces = [piece for record in records for piece in segments_of(record) or [record]]
    for piece in pieces:
        refuse_endless(piece)
    return [piece / "requests.jsonl" for piece in pieces]


def rows(lines: Iterable[str], path: Path, reading: Reading) -> Rows:
    """The requests of a file."""
    yield from rows_of(json_lines(lines, path), reading)


def rows_of(lines: Iterable[Line], reading: Reading) -> Rows:
    """The requests of a record's lines."""
    found: list[tuple[Line, int]] = []
    for line in lines:
        reason = line.get("finish_reason")
        if reason is None or reason == "refused":
            reading.dropped["unanswered" if reason is None else reason] += 1
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
