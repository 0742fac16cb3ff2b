"""BurstGPT (github.com/HPMLL/BurstGPT, releases 1.1 and 2.0): CSV with Timestamp, Request tokens, Response tokens.

Times are seconds from a midnight; time 0 is the first request that was answered. Nothing is known of the prompts, so
each is a text of its own. A response of 0 tokens is a call that failed. `Session ID`, where there is such a column,
tells sessions apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from twinserve.traces.formats.reading import Reading, Rows, count, private_prompt, table_rows
from twinserve.traces.request import Request

NAME = "burstgpt"
FIELDS = ("Timestamp", "Request tokens", "Response tokens")


def rows(lines: Iterable[str], path: Path, reading: Reading) -> Rows:
    """The requests of a file."""
    number, first_ns = 0, None
    sessions: dict[str, int] = {}
    for line in table_rows(lines, path, FIELDS, reading.rows_at_once):
        time_ns = reading.time_ns(line, "Timestamp", in_table=True)
        prompt_tokens, output_tokens = count(line, "Request tokens", 0), count(line, "Response tokens", 0)
        if not output_tokens or not prompt_tokens:
            reading.dropped["empty_prompt" if output_tokens else "failed"] += 1
            continue
        first_ns = time_ns if first_ns is None else first_ns
        arrival_ns = reading.since_first(time_ns, first_ns)
        name = line.values.get("Session ID")
        session = sessions.setdefault(name, len(sessions)) if name else None
        parts = private_prompt(number, prompt_tokens)
        yield line, "Timestamp", Request(number, arrival_ns, parts, output_tokens, session)
        number += 1
