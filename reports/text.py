"""Numbers and values as a page writes them."""

from __future__ import annotations

import json
from typing import Any


def number(value: float | None) -> str:
    """A number with four significant digits, an integer with all of its own; a dash for what is not defined."""
    if value is None:
        return "–"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.4g}".rstrip(".") if value else "0"


def count(how_many: int, what: str) -> str:
    """How many of something there are: "1 request", "2,000 requests"."""
    return f"{how_many:,} {what}" + ("" if how_many == 1 else "s")


def duration(seconds: float) -> str:
    """A time with its unit."""
    unit, scale = time_unit(seconds)
    return f"{number(seconds * scale)} {unit}"


def percent(share: float | None, *, signed: bool = False) -> str:
    """A share in percent with one decimal; a dash for what is not defined."""
    if share is None:
        return "–"
    if not signed or abs(share) < 0.0005:
        return f"{abs(share):.1%}"
    return f"{share:+.1%}".replace("-", "−")


def share_of_limit(share: float) -> str:
    """How much of a limit was used, in percent, or how many times the limit."""
    return f"{share:.0%} of its limit" if share < 10 else f"{share:,.0f} times its limit"


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit in which a time is best read, and how many of it are in a second."""
    return ("s", 1.0) if seconds >= 1 else ("ms", 1e3)


def plain(value: Any) -> str:
    """A value of a record as text: a string as it is, nothing and what is empty as "none", all else as JSON."""
    if value is None or value == [] or value == {}:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, with dotted names."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result
