"""What the pages that are made from results share: tables and paragraphs in Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable


def table(heads: list[str], rows: Iterable[Iterable[str]], *, numbers: bool = False) -> list[str]:
    """The lines of a table and an empty one; with `numbers`, all columns but the first are aligned at the right."""
    rule = ["---"] + ["---:" if numbers else "---"] * (len(heads) - 1)
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (heads, rule, *rows)] + [""]


def prose(*paragraphs: str) -> list[str]:
    """Paragraphs in lines that a person can read in a terminal."""
    return [line for text in paragraphs for line in (*textwrap.wrap(" ".join(text.split()), 118), "")]


def percent(value: float | None) -> str:
    """A relative error, or that it lies beyond what was tried."""
    return "beyond" if value is None else f"{value:+.1%}"
