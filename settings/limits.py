"""Limits on what a number may ask for, before work on it begins; an environment variable raises each."""

from __future__ import annotations

import os

from twinserve.settings.errors import InputError


def limit(name: str, most: int) -> int:
    """A limit; `TWINSERVE_MOST_<name>` in the environment is another."""
    return whole_number(f"TWINSERVE_MOST_{name}", most)


def plain(text: str) -> str:
    """The text of a number as other programs know it, too.

    Raises:
        ValueError: it has what Python alone reads: underscores, spaces, a plus sign, or other digits than 0 to 9.
    """
    if not text.isascii() or "_" in text or text != text.strip() or text.startswith("+"):
        raise ValueError(f"{text!r} is not written as a number")
    return text


def whole_number(variable: str, usual: int) -> int:
    """The integer that an environment variable holds, or the usual one.

    Raises:
        InputError: it holds something else, or more than 63 bits.
    """
    text = os.environ.get(variable, str(usual))
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise InputError("expected an integer >= 0 of at most 18 digits", field=variable, value=text)
    return int(text)


MOST_BLOCKS = limit("BLOCKS", 1 << 22)
"""KV blocks of a pool; each takes some 180 bytes."""
MOST_FLEET_BLOCKS = limit("FLEET_BLOCKS", 1 << 25)
"""KV blocks of all pools of a fleet together."""
MOST_REPLICAS = limit("REPLICAS", 1 << 14)
"""Replicas of a fleet."""
MOST_POINTS = limit("POINTS", 1 << 20)
"""Points of a plan, all seeds counted."""
MOST_TOKENS = limit("TOKENS", 1 << 24)
"""Tokens of a prompt or an answer that is replayed."""
MOST_REQUESTS = limit("REQUESTS", 1 << 26)
"""Requests of a synthetic trace."""
MOST_PARTS = limit("PARTS", 1 << 26)
"""Texts and answers that the prompts of a synthetic trace are made of, about: its requests times its turns."""
MOST_SHAPES = limit("SHAPES", 1 << 16)
"""Shapes of steps that a profile measures, and steps of each."""
MOST_JOBS = limit("JOBS", 1 << 10)
"""Processes that compute beside one another."""
MOST_ANSWERS = limit("ANSWERS", 1 << 13)
"""Answers that one request over HTTP asks for: its prompts, and how often each is to be answered."""
MOST_STOPS = limit("STOPS", 1 << 10)
"""Stop strings of a request, and its stop tokens, and its biased ones: each is looked at for every token."""
MOST_TERMS = limit("TERMS", 64)
"""Of an objective."""
MOST_WAIT_S = limit("WAIT_S", 7 * 86_400)
"""Seconds that a server, or who watches one, is to wait for something."""
MOST_TIME_SCALE = limit("TIME_SCALE", 1_000_000)
"""How many times slower than a trace or a simulation the wall's clock may be taken to go, or faster."""
MOST_MIB = limit("MIB", 1 << 20)
"""MiB of a request's body, and of a record's segment."""
MOST_SETTINGS_BYTES = limit("SETTINGS_BYTES", 4 << 20)
"""Of a file of settings, of a plan or a device, and of one with a class of one's own."""
MOST_KEY_PARTS = limit("KEY_PARTS", 64)
"""Of a dotted key in a file of settings: what it takes to read one grows with their square."""
MOST = 1 << 48
"""Where nothing is made that is as large: of budgets, thresholds and seeds."""
