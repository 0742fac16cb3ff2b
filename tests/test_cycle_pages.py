"""The learning path as a learner walks it: the commands of every page in their order, and what its snippets print."""

from __future__ import annotations

import contextlib
import io
import re
from collections import Counter
from pathlib import Path

import pytest
from shell import twinserve
from walked import as_walked, commands, make_tiny

__all__ = ["twinserve"]

BESIDE = ("speculation", "tensor-parallel")
FOLDER = Path(__file__).resolve().parents[1] / "docs" / "cycles"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.md"))}
LEFT_OUT = {"generate": "wants the weights of SmolLM2", "--device cuda": "wants a GPU"}


def walked(page: str) -> list[str]:
    """The commands of a page that need neither a GPU nor a download."""
    return [line for line in commands(PAGES[page]) if not any(f" {word}" in line for word in LEFT_OUT)]


@pytest.mark.parametrize("page", [page for page in PAGES if walked(page)])
def test_the_commands_of_a_page_run_in_their_order(page, tmp_path, monkeypatch, twinserve):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    make_tiny(tmp_path)
    for line in walked(page):
        result = twinserve(*as_walked(line))
        assert result.code == 0, f"{line}: {result.err}"
        if line.startswith("twinserve replay"):
            assert "exact" in result.out
    if page == "cycle8":
        waits = [float(share) for share in re.findall(r"waited for the host ([\d.]+)%", _said(twinserve, "cycle8"))]
        assert waits[0] > 5 > 1 > waits[1], "one step ahead the device waits for nobody"


def _said(twinserve, page: str) -> str:
    """What the simulations of a page say, once more and without a record."""
    lines = [line.partition(" --out")[0] for line in walked(page) if line.startswith("twinserve sim")]
    return " ".join(" ".join(twinserve(*as_walked(line)).out.split()) for line in lines)


@pytest.mark.parametrize(
    ("page", "printed", "answer"),
    [
        ("cycle3", ["[0, 1] [2, 3]", "[1, 0, 4]"], "C needs 3 blocks and holds [1, 0, 4]"),
        ("cycle5", ["0 [0, 1, 2]", "32 [0, 1, 3]", "48 [0, 1, 2, 4]"], "32, then 48."),
        ("cycle8", ["252 [1460, 1460]", "1 [1000, 800]"], "`252 [1460, 1460]` and `1 [1000, 800]`"),
        (
            "cycle9",
            ["[(0, 0, 6), (1, 4, 1)]", "[(0, 6, 1), (1, 5, 1)]", "[(2, 0, 3)]", "[(2, 3, 1)]", "True False"],
            "It prints four decisions of (request, first token, number of tokens), then `True False`.",
        ),
        (
            "speculation",
            ["[1.8, 2.44, 3.36, 4.33]", "0.5 3 1.63", "0.8 8 3.09", "0.9 13 4.67"],
            "`[1.8, 2.44, 3.36, 4.33]`, then `0.5 3 1.63`, `0.8 8 3.09` and `0.9 13 4.67`",
        ),
        ("tensor-parallel", ["[0.6, 2.9, 5.9, 11.7]"], "It prints `[0.6, 2.9, 5.9, 11.7]`."),
    ],
)
def test_a_snippet_prints_what_the_answer_says(page, printed, answer):
    """The last of the page, which is that of the exercise."""
    *_, snippet = re.findall(r"^```python\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(snippet, page, "exec"), {})
    assert output.getvalue().splitlines() == printed
    assert answer in PAGES[page]


KOREAN = {
    path.stem: path.read_text(encoding="utf-8") for path in sorted((FOLDER / "ko").glob("*.md")) if path.stem != "index"
}


def code_and_figures(page: str) -> list[str]:
    """The lines of a page that are code, commands or figures, by a reading of its own."""
    kept, until = [], ""
    for line in page.splitlines():
        if until:
            until = "" if line.startswith(until) else until
            kept.append(line)
        elif line.startswith(("```", "<!-- figures of", "<!-- what each", "<!-- a window")):
            until = "```" if line.startswith("```") else "<!-- end of"
            kept.append(line)
        elif line.startswith("    "):
            kept.append(line)
    return kept


@pytest.mark.parametrize("page", KOREAN)
def test_code_and_figures_are_the_same_in_both_languages(page):
    own = code_and_figures(KOREAN[page])
    assert own == code_and_figures(PAGES[page]) and own, "python benchmarks/render.py, and commit what it changed"


@pytest.mark.parametrize("page", KOREAN)
def test_a_page_in_korean_has_the_parts_of_the_english_one(page):
    korean, english = KOREAN[page], PAGES[page]
    for each in (r"^#+ ", r"^<details>$", r"^</details>$", r"^\| "):
        own, theirs = (len(re.findall(each, text, re.MULTILINE)) for text in (korean, english))
        is_open = page == "tensor-parallel" and "details" in each  # its answer stands there unfolded
        assert own == theirs and (own or is_open or "Not measured yet." in english), each

    def linked(text: str, folder: Path) -> set[str]:
        links = (link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text))
        files = {str((folder / link).resolve().relative_to(FOLDER.parents[1])) for link in links if "://" not in link}
        return {name.replace("docs/cycles/ko/", "docs/cycles/") for name in files} - {"docs/cycles.md"}

    missing = linked(english, FOLDER) - linked(korean, FOLDER / "ko")
    assert not missing and len(re.findall("[가-힣]", korean)) > 300
    for each in (r"`[^`\n]+`", r"\d[\d,.]*\d|\d"):
        own, theirs = (Counter(re.findall(each, text)) for text in (korean, english))
        assert not theirs - own, f"names or figures that the page in Korean lacks: {theirs - own}"


@pytest.mark.parametrize("page", KOREAN)
def test_a_page_in_korean_leads_to_others_in_korean(page):
    """But for the page that it translates."""
    led = set(re.findall(r"\]\(\.\./([\w-]+)\.md", KOREAN[page]))
    assert led & KOREAN.keys() == {page}


def test_every_cycle_is_there_in_both_languages_and_each_links_to_the_other():
    cycles = [page for page in PAGES if page.startswith("cycle")]
    assert cycles == [f"cycle{number}" for number in range(1, 10)] and list(KOREAN) == [*cycles, *BESIDE]
    index = (FOLDER / "ko" / "index.md").read_text(encoding="utf-8")
    for page in KOREAN:
        assert f"](../{page}.md)" in KOREAN[page] and f"]({page}.md)" in index
        assert f"](ko/{page}.md)" in PAGES[page] or page == "tensor-parallel"
    assert all(f"]({beside}.md)" in pages["cycle7"] for beside in BESIDE for pages in (PAGES, KOREAN))
