"""Pages in another language: prose of their own, and the code and the figures of the page that they translate."""

from __future__ import annotations

import re

BLOCK = re.compile(
    r"^```\w*\n(?:.*?\n)??```$"  # a fence
    r"|^<!-- (figures of [^>]+|what each thing buys|a window over ranks) -->\n"  # what render.py makes
    r".*?^<!-- end of [^>]+ -->$"
    r"|(?:^ {4}[^\n]*\n)+",  # commands
    re.MULTILINE | re.DOTALL,
)


def blocks(page: str) -> list[str]:
    """The blocks of code, of commands and of figures of a page, in their order."""
    return [found[0] for found in BLOCK.finditer(page)]


def with_blocks_of(page: str, source: str) -> str:
    """`page` with the blocks of `source` in the place of its own, one by one.

    Raises:
        ValueError: they have different numbers of blocks.
    """
    mine, theirs = blocks(page), blocks(source)
    if len(mine) != len(theirs):
        raise ValueError(f"{len(mine)} blocks of code and figures, expected {len(theirs)}, as in what it translates")
    coming = iter(theirs)
    return BLOCK.sub(lambda _: next(coming), page)
