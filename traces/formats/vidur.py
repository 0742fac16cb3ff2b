"""Vidur (github.com/microsoft/vidur, processed traces): CSV with arrived_at, num_prefill_tokens, num_decode_tokens.

Times are seconds. Nothing is known of the prompts, so each is a text of its own.
"""

from __future__ import annotations

from pathlib import Path

from twinserve.traces.formats.reading import Reading, Rows, count, private_prompt, table_rows
from twinserve.traces.request import Request

NAME = "vidur"
KEYS = {"arrived_at", "num_prefill_tokens", "num_decode_tokens"}

_COLUMNS = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")


def rows(lines: list[str], path: Path, reading: Reading) -> Rows:
    """The requests of a file."""
    for number, line in enumerate(table_rows(lines, path, _COLUMNS)):
        parts = private_prompt(number, count(line, "num_prefill_tokens"))
        arrival_ns = reading.time_ns(line, "arrived_at")
        yield line, "arrived_at", Request(number, arrival_ns, parts, count(line, "num_decode_tokens"))
