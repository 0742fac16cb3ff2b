"""What the pages that are made from results share: tables and paragraphs in Markdown."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path


def page_arguments(doc: str | None, page: str) -> argparse.Namespace:
    """The options of a script that makes a page from the public traces: `traces`, `page` and `jobs`.

    Args:
        doc: of the script, whose first line its help says.
        page: which one it is, unless told otherwise.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, help="folder of the public traces")
    parser.add_argument("--page", type=Path, default=Path(page))
    parser.add_argument("--jobs", type=int, default=None)
    return parser.parse_args()


def write_or_check(texts: Mapping[Path, str], *, check: bool) -> int:
    """Write those pages that are not as they should be, and name them; with `check` nothing is written, and the exit
    status is 1 if there are any."""
    changed = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in changed:
        print(path)
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(texts[path], encoding="utf-8")
    return int(check and bool(changed))


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
