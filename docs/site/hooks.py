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
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "examples/README.md", "benchmarks/results.md")
_COMMENT = re.compile(r"^(<!--.*-->)\n(?=\S)", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """The pages, what they link to, and the reference, in place of what lies in the folder of the docs."""
    found: dict[str, File] = {}
    for pattern in PAGES:
        for page in sorted(ROOT.glob(pattern)):
            _add(found, page, config)
            for link in _LINK.findall(page.read_text(encoding="utf-8")):
                target = _target(page, link)
                if target.is_file() and target.suffix != ".md":
                    _add(found, target, config)
                elif target.is_dir():
                    _add_folder(found, target, config)
    for name, text in reference.pages().items():
        found[name] = File.generated(config, f"reference/{name}", content=text)
    theme = [file for file in files if file.src_uri.startswith("assets/")]
    return Files([*theme, *found.values()])


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """What GitHub reads and a site does not: Markdown within a fold and right behind a comment, links to folders."""

    def led(found: re.Match[str]) -> str:
        link = found[1]
        return found[0].replace(link, f"{link.rstrip('/')}/index.md") if _target(here, link).is_dir() else found[0]

    here = ROOT / page.file.src_uri
    markdown = _LINK.sub(led, markdown.replace("<details>", '<details markdown="1">'))
    return _COMMENT.sub(r"\1\n\n", markdown)


def _target(page: Path, link: str) -> Path:
    """Where a link of a page leads."""
    return ROOT / posixpath.normpath((page.parent / link).relative_to(ROOT).as_posix())


def _add_folder(found: dict[str, File], folder: Path, config: Any) -> None:
    """The files of a folder, and a page that lists them."""
    name = folder.relative_to(ROOT).as_posix()
    inside = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    for path in inside:
        _add(found, path, config)
    listed = "".join(f"- [{path.name}]({path.name})\n" for path in inside)
    found[f"{name}/index.md"] = File.generated(config, f"{name}/index.md", content=f"# {name}\n\n{listed}")


def _add(found: dict[str, File], path: Path, config: Any) -> None:
    name = path.relative_to(ROOT).as_posix()
    found[name] = File.generated(config, name, abs_src_path=str(path))
