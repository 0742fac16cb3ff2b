"""The pages of this checkout as a site, each under the path that it has here, so that links lead where they do here."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).resolve().parent))

import reference  # noqa: E402 - lies beside this file

ROOT = reference.ROOT
PAGES = ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "examples/README.md", "benchmarks/results.md")
_COMMENT = re.compile(r"^(<!--.*-->)\n(?=\S)", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """The pages, what they link to, and the reference, in place of what lies in the folder of the docs."""
    found: dict[str, File] = {}
    for pattern in PAGES:
        for page in sorted(ROOT.glob(pattern)):
            _add(found, page, config)
            for link in _LINK.findall(page.read_text(encoding="utf-8")):
                target = ROOT / posixpath.normpath((page.parent / link).relative_to(ROOT).as_posix())
                if target.is_file() and target.suffix != ".md":
                    _add(found, target, config)
    for name, text in reference.pages().items():
        found[name] = File.generated(config, f"reference/{name}", content=text)
    theme = [file for file in files if file.src_uri.startswith("assets/")]
    return Files([*theme, *found.values()])


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """What GitHub reads and Python-Markdown does not: Markdown within a fold, and right behind a comment."""
    return _COMMENT.sub(r"\1\n\n", markdown.replace("<details>", '<details markdown="1">'))


def _add(found: dict[str, File], path: Path, config: Any) -> None:
    name = path.relative_to(ROOT).as_posix()
    found[name] = File.generated(config, name, abs_src_path=str(path))
