"""BurstGPT (github.com/HPMLL/BurstGPT, releases 1.1 and 2.0): CSV with Timestamp, Request tokens, Response tokens.

Times are seconds from the midnight before the first request. Nothing is known of the prompts, so each is a text of its
own. A response of 0 tokens is a call that failed. `Session ID`, where there is such a column, tells sessions apart.
"""

from __future__ import annotations

from pathlib import Path

from twinserve.traces.formats.reading import Reading, Rows, count, private_prompt, table_rows
from twinserve.traces.request import Request

NAME = "burstgpt"
KEYS = {"Request tokens", "Response tokens"}

_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")


def rows(lines: list[str], path: Path, reading: Reading) -> Rows:
    """The requests of a file."""
    number = 0
    sessions: dict[str, int] = {}
    for line in table_rows(lines, path, _COLUMNS):
        arrival_ns = reading.time_ns(line, "Timestamp")
        prompt_tokens, output_tokens = count(line, "Request tokens", 0), count(line, "Response tokens", 0)
        if not output_tokens or not prompt_tokens:
            reading.dropped["empty_prompt" if output_tokens else "failed"] += 1
            continue
        name = line.values.get("Session ID")
        session = sessions.setdefault(name, len(sessions)) if name else None
        parts = private_prompt(number, prompt_tokens)
        yield line, "Timestamp", Request(number, arrival_ns, parts, output_tokens, session)
        number += 1
