"""What is wrong with an input: a value, a cell, some bytes of a valid one, drawn from a random generator."""

from __future__ import annotations

import json
import random
from typing import Any

JUNK: tuple[Any, ...] = (
    None, True, False, -1, 0, 1.5, -0.0, 1e308, 2**31, 2**63, 2**64, 10**30, "", "x", "1", "nan", "\x1b[31m", "a\nb",
    "\ud83d", "[red]", "[/b]", [], [[]], [1], {}, {"a": 1}, float("inf"), float("nan"),
)  # fmt: skip
BYTES = (
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"[" * 50_000,
    b"{",
    b"}",
    b",",
    b'"',
    b"9" * 5000,
    b"\xf0\x9f",
    b"\n\n",
)
WORDS = ("", "x", "-1", "0", "nan", "inf", "1e308", "1e-300", "1000000000", "9" * 12, "9" * 30, "1_6", "０", "0:5",
         "5:0", ":", "0:1:2", "9:0:1", "roofline:x@h100",
         "roofline:llama-3-8b@h100:tp=0", "/dev/zero", "/", "a\nb", "x" * 300,
         "[/b]", "f.py:C")  # fmt: skip


def changed_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with one of the values in it changed, taken away, or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        if rng.random() < 0.15:
            return {key: inner for key, inner in value.items() if key != name}
        return value | {name: changed_value(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        action = rng.random()
        if action < 0.1:
            return value[:place] + value[place + 1 :]
        if action < 0.2:
            return [*value, value[place]]
        return [*value[:place], changed_value(rng, value[place]), *value[place + 1 :]]
    return rng.choice(JUNK)


def changed_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes cut short, doubled, or with others put in."""
    place = rng.randrange(len(content) + 1)
    action = rng.random()
    if action < 0.3:
        return content[:place]
    if action < 0.4:
        return content[place:] + content
    if action < 0.7:
        return content[:place] + rng.choice(BYTES) + content[place:]
    return content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]


def changed(rng: random.Random, content: bytes) -> bytes:
    """A file's content with something wrong in it, as likely as not."""
    if rng.random() < 0.35:
        return changed_bytes(rng, content)
    try:
        lines = content.decode().splitlines()
        try:
            return json.dumps(changed_value(rng, json.loads(content))).encode()
        except ValueError:
            place = rng.randrange(len(lines))
            lines[place] = json.dumps(changed_value(rng, json.loads(lines[place])))
            return ("\n".join(lines) + "\n").encode()
    except ValueError:
        return changed_cells(rng, content)


def changed_cells(rng: random.Random, content: bytes) -> bytes:
    """A table, or another text, with one of its cells changed."""
    lines = content.decode("utf-8", "replace").splitlines() or [""]
    place = rng.randrange(len(lines))
    mark = "," if "," in lines[place] else "="
    cells = lines[place].split(mark)
    cells[rng.randrange(len(cells))] = str(rng.choice([*JUNK, *WORDS]))
    lines[place] = mark.join(cells)
    return "\n".join(lines).encode("utf-8", "replace")
