"""What every page is made of: one self-contained HTML document, its sections and its figures."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape, unescape
from importlib.resources import files

from twinserve.reports.drawing import Figure, packed

# Nothing is fetched: a reader's browser is told so, and holds the page to it.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def html_page(title: str, content: Iterable[str]) -> str:
    """A document that holds all that it needs; `content` is what stands in it from top to bottom."""
    from plotly.offline import get_plotlyjs

    return "".join(
        (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f"<title>{escape(title)} – twinserve report</title>\n<style>\n{_part('page.css')}</style>\n",
            "</head>\n<body>\n<main>\n",
            *content,
            "</main>\n<script>",
            get_plotlyjs(),
            f"</script>\n<script>\n{_part('page.js')}</script>\n</body>\n</html>\n",
        )
    )


def _part(name: str) -> str:
    return (files("twinserve.reports") / name).read_text(encoding="utf-8")


def section(title: str, content: str) -> str:
    """A section with its heading, which is HTML; its anchor is made of that."""
    return f'<section id="{anchor(title)}">\n<h2>{title}</h2>\n{content}</section>\n'


def anchor(title: str) -> str:
    """The name of a section's anchor."""
    return re.sub(r"\W+", "-", unescape(title).lower()).strip("-")


def drawn(figure: Figure | None) -> str:
    """A figure's place on the page, its data, and what is said of it."""
    if figure is None:
        return '<p class="caption">Nothing to draw: no record here holds what this figure shows.</p>\n'
    title = f"<h3>{figure.title}</h3>\n" if figure.title else ""
    notes = f' <span class="note">{" ".join(figure.notes)}</span>' if figure.notes else ""
    linked = " data-linked" if figure.is_linked else ""
    return (
        f'<figure id="figure-{figure.id}">\n{title}<div class="plot" id="{figure.id}" role="img" tabindex="0" '
        f'aria-label="{_in_words(figure)}" style="height: {figure.layout["height"]}px"></div>\n'
        f'<script type="application/json" data-plot="{figure.id}"{linked}>{figure.json()}</script>\n'
        f"{_detail(figure)}"
        f'<figcaption class="caption">{figure.caption}{notes}</figcaption>\n</figure>\n'
    )


def _detail(figure: Figure) -> str:
    if figure.detail is None:
        return ""
    return f'<script type="text/plain" data-detail="{figure.id}">{packed(figure.detail)}</script>\n'


def _in_words(figure: Figure) -> str:
    """What a figure shows, for who does not see it; its texts are HTML already."""
    axes = [figure.layout.get(name, {}).get("title", {}).get("text", "") for name in ("yaxis", "xaxis")]
    words = [figure.title or " against ".join(filter(None, axes)), *figure.notes]
    text = ". ".join(word.rstrip(".") for word in words if word).replace("<br>", " ")
    return escape(unescape(f"{text}."))


def side_by_side(figures: Iterable[Figure | None]) -> str:
    """Figures beside each other where there is room; those that are None are left out."""
    shown = [drawn(figure) for figure in figures if figure is not None]
    return f'<div class="grid">\n{"".join(shown)}</div>\n' if shown else drawn(None)


def contents(titles: Iterable[str]) -> str:
    """Links to sections, whose headings are HTML."""
    links = "".join(f'<li><a href="#{anchor(title)}">{title}</a></li>' for title in titles)
    return f'<nav aria-label="On this page"><ul>{links}</ul></nav>\n'
