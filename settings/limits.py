"""Limits on what a number may ask for, before work on it begins; an environment variable raises each."""

from __future__ import annotations

import os


def limit(name: str, most: int) -> int:
    """A limit; `TWINSERVE_MOST_<name>` in the environment is another."""
    return int(os.environ.get(f"TWINSERVE_MOST_{name}", most))


MOST_BLOCKS = limit("BLOCKS", 1 << 24)
"""KV blocks of a pool; each takes some 200 bytes."""
MOST_REPLICAS = limit("REPLICAS", 1 << 14)
"""Replicas of a fleet."""
MOST_POINTS = limit("POINTS", 1 << 20)
"""Points of a plan, all seeds counted."""
MOST_TOKENS = limit("TOKENS", 1 << 24)
"""Tokens of a prompt or an answer that is replayed."""
MOST_REQUESTS = limit("REQUESTS", 1 << 26)
"""Requests of a synthetic trace."""
MOST_SETTINGS_BYTES = limit("SETTINGS_BYTES", 16 << 20)
"""Of a file of settings, of a plan or a device, and of one with a class of one's own."""
MOST = 1 << 48
"""Where nothing is made that is as large: of budgets, thresholds and seeds."""
