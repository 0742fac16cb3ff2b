"""ShareGPT with token ids, as LLMServingSim has it (github.com/casys-kaist/LLMServingSim): JSON lines.

`arrival_time_ns`, `input_toks`, `output_toks`, and the ids in `input_tok_ids` and `output_tok_ids`. Prompts share what
their ids share from the start on; what was answered is not looked for in later prompts. Time 0 is the first row.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from twinserve.traces.formats.prefixes import Prefixes
from twinserve.traces.formats.reading import Reading, Rows, private_prompt
from twinserve.traces.lines import Line, json_lines
from twinserve.traces.request import Request

NAME = "sharegpt"
FIELDS = ("arrival_time_ns", "input_toks", "output_toks")


def rows(lines: Iterable[str], path: Path, reading: Reading) -> Rows:
    """The requests of a file."""
    prefixes = Prefixes()
    first_ns: int | None = None
    for number, line in enumerate(json_lines(lines, path)):
        prompt_tokens, max_tokens = line.integer("input_toks", 1), line.integer("output_toks", 1)
        for name, length in (("input_tok_ids", prompt_tokens), ("output_tok_ids", max_tokens)):
            if name in line.values:
                _check_length(line, name, length)
        if "input_tok_ids" in line.values:
            parts = prefixes.parts(line.values["input_tok_ids"], number)
        else:
            parts = private_prompt(number, prompt_tokens)
        time_ns = line.integer("arrival_time_ns")
        first_ns = time_ns if first_ns is None else first_ns
        yield line, "arrival_time_ns", Request(number, reading.since_first(time_ns, first_ns), parts, max_tokens)


def _check_length(line: Line, name: str, length: int) -> None:
    ids = line.integers(name)
    if len(ids) != length:
        raise line.error(f"expected {length} ids", name, f"{len(ids)} ids")
