"""What every page is made of: one self-contained HTML document, its sections and its figures."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib.resources import files

from twinserve.reports.drawing import Figure

# Nothing is fetched: a reader's browser is told so, and holds the page to it.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

_DRAW = """
const touched = matchMedia("(pointer: coarse)").matches;
for (const json of document.querySelectorAll("script[data-plot]")) {
  const figure = JSON.parse(json.textContent);
  if (touched) figure.layout.dragmode = false;
  Plotly.newPlot(json.dataset.plot, figure.data, figure.layout, {
    responsive: true,
    displaylogo: false,
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
  });
}
"""


def html_page(title: str, content: Iterable[str]) -> str:
    """A document that holds all that it needs; `content` is what stands in it from top to bottom."""
    from plotly.offline import get_plotlyjs

    return "".join(
        (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f"<title>{escape(title)} – twinserve report</title>\n<style>\n{_style()}</style>\n",
            "</head>\n<body>\n<main>\n",
            *content,
            "</main>\n<script>",
            get_plotlyjs(),
            f"</script>\n<script>{_DRAW}</script>\n</body>\n</html>\n",
        )
    )


def _style() -> str:
    return (files("twinserve.reports") / "page.css").read_text(encoding="utf-8")


def section(title: str, content: str) -> str:
    """A section with its heading, which is HTML."""
    return f"<section>\n<h2>{title}</h2>\n{content}</section>\n"


def drawn(figure: Figure | None) -> str:
    """A figure's place on the page, its data, and what is said of it."""
    if figure is None:
        return '<p class="caption">Nothing to draw: no record here holds what this figure shows.</p>\n'
    title = f"<h3>{figure.title}</h3>\n" if figure.title else ""
    notes = f' <span class="note">{" ".join(figure.notes)}</span>' if figure.notes else ""
    return (
        f'<figure id="figure-{figure.id}">\n{title}<div class="plot" id="{figure.id}" '
        f'style="height: {figure.layout["height"]}px"></div>\n'
        f'<script type="application/json" data-plot="{figure.id}">{figure.json()}</script>\n'
        f'<figcaption class="caption">{figure.caption}{notes}</figcaption>\n</figure>\n'
    )


def side_by_side(figures: Iterable[Figure | None]) -> str:
    """Figures beside each other where there is room; those that are None are left out."""
    shown = [drawn(figure) for figure in figures if figure is not None]
    return f'<div class="grid">\n{"".join(shown)}</div>\n' if shown else drawn(None)
