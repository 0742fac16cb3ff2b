"""The pages: links lead somewhere, commands exist, snippets run, pictures are what their script draws."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from forked_scripts import help_of

from twinserve.commands.app import parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "results.md"])
CYCLES = [ROOT / "docs" / "cycles" / f"cycle{number}.md" for number in range(1, 10)]
GUIDED = range(1, 8)
"""The cycles of the guide, each of which has a benchmark."""
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"^(?: {4,}|```\w*\n)((?:twinserve|python|make) .*?)(?: {2,}#.*)?$", re.MULTILINE)
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`]+)`")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files(page):
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    missing = [link for link in links if link[0] != "#" and not (page.parent / link.split("#")[0]).exists()]
    assert not missing, f"{name_of(page)} links to {missing}"


@pytest.mark.parametrize("page", CYCLES, ids=name_of)
def test_a_cycles_page_has_all_its_parts(page):
    text = page.read_text(encoding="utf-8")
    number = page.stem.removeprefix("cycle")
    figures = ["## Figures"] if int(number) in GUIDED else []
    for part in ("## Read", "## Run", *figures, "## Exercise", "<details>", "</details>"):
        assert text.count(part) == 1, f"{name_of(page)}: {part}"
    assert f"](pictures/cycle{number}.svg)" in text
    if int(number) in GUIDED:
        assert f"python benchmarks/benchmark_cycle{number}.py" in text
        assert f"<!-- figures of cycle {number} -->\n" in text and "<!-- end of figures -->\n" in text


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_pages_exist(page):
    for command in COMMAND.findall(page.read_text(encoding="utf-8")):
        program, *words = shlex.split(command.replace(" ...", ""), comments=True)
        check = {"twinserve": check_twinserve, "python": check_python, "make": check_make}[program]
        check(words, f"{name_of(page)}: {command}")


def check_twinserve(words: list[str], where: str) -> None:
    """Every subcommand and option is one of the command line's, and as many arguments are given as it wants."""
    command = parser()
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, where
        command, words = command.commands[words[0]], words[1:]
    given = [word.split("=")[0] for word in words if word.startswith("--") and word != "--"]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert set(given) <= known, f"{where}: no option {sorted(set(given) - known)}"
    context = command.make_context("twinserve", list(words), resilient_parsing=False)
    assert context.params is not None


def check_python(words: list[str], where: str) -> None:
    """A script that is there and knows the options given, or a module and files that are there."""
    if words[0] == "-m":
        importlib.import_module(words[1])
        assert all((ROOT / word).exists() for word in words[2:] if not word.startswith("-")), where
        return
    script = ROOT / words[0]
    assert script.is_file(), where
    options = [word for word in words[1:] if word.startswith("--")]
    if options:
        shown = help_of(script)
        assert shown.returncode == 0 and all(option in shown.stdout for option in options), where


def check_make(words: list[str], where: str) -> None:
    assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), where


def snippets(page: Path) -> list[str]:
    return SNIPPET.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_snippets_import_is_there(page):
    for snippet in snippets(page):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("twinserve"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), f"{name_of(page)}: {node.module}"


def test_our_names_beside_vllms_are_there():
    text = "\n".join(
        path.read_text(encoding="utf-8") for folder in ("policies", "orders", "engine") for path in modules(folder)
    )
    rows = [line.split(" | ") for line in (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8").splitlines()]
    ours = [row[1] for row in rows if len(row) == 3 and not row[0].startswith("| ---")]
    names = {word for cell in ours for code in CODE.findall(cell) for word in re.findall(r"[A-Za-z_]{2,}", code)}
    assert len(names) > 20
    missing = {name for name in names if not re.search(rf"\b{name}\b", text)}
    assert not missing


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_pictures_are_what_their_script_draws():
    script = ROOT / "docs" / "cycles" / "pictures.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"python docs/cycles/pictures.py, and commit what it changed: {done.stdout}"
