"""Drawings as SVG, the same bytes for the same shapes."""

from __future__ import annotations

from html import escape

INK, MUTED, LINE, PAPER = "#1f2937", "#6b7280", "#9ca3af", "#ffffff"


class Drawing:
    """Shapes one after another on paper, in pixels from the top left.

    Args:
        title: what it shows, in words.
    """

    def __init__(self, width: int, height: int, title: str):
        self._width, self._height, self._title = width, height, title
        self._shapes: list[str] = []

    def rectangle(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        self._add("rect", x=x, y=y, width=width, height=height, fill=fill)

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, label: str = "", *, dashed: bool = False
    ) -> None:
        """An outlined rectangle with a label in its middle."""
        dashes = "3 3" if dashed else None
        self._add("rect", x=x, y=y, width=width, height=height, rx=3, fill=fill, stroke=LINE, stroke_dasharray=dashes)
        if label:
            self.text(x + width // 2, y + height // 2 + 4, label, anchor="middle")

    def line(
        self, points: list[tuple[float, float]], color: str, *, width: float = 1.0, dash: str | None = None
    ) -> None:
        """A line from point to point; `dash` is SVG's pattern of dashes and gaps."""
        path = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        self._add("polyline", points=path, fill="none", stroke=color, stroke_width=width, stroke_dasharray=dash)

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        head = "url(#head)"
        self._add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=MUTED, stroke_width=1.5, marker_end=head)

    def dot(self, x: float, y: float, color: str, radius: float = 3.0) -> None:
        self._add("circle", cx=x, cy=y, r=radius, fill=color, stroke=PAPER)

    def text(
        self, x: float, y: float, words: str, *, anchor: str = "start", color: str = INK, bold: bool = False
    ) -> None:
        """Words on the base line `y`; `anchor` says which end of them lies at `x`: "start", "middle" or "end"."""
        self._add("text", words, x=x, y=y, text_anchor=anchor, fill=color, font_weight=600 if bold else None)

    def _add(self, tag: str, words: str | None = None, **attributes: float | str | None) -> None:
        """A shape with these attributes but for those that are None."""
        given = [(name.replace("_", "-"), value) for name, value in attributes.items() if value is not None]
        begin = f"<{tag}" + "".join(f' {name}="{_number(value)}"' for name, value in given)
        self._shapes.append(begin + ("/>" if words is None else f">{escape(words, quote=False)}</{tag}>"))

    def svg(self) -> str:
        """The drawing as a file's text."""
        size = f'width="{self._width}" height="{self._height}"'
        head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {self._width} {self._height}"'
                ' font-family="sans-serif" font-size="12">',
                f"<title>{escape(self._title, quote=False)}</title>",
                f'<defs>{head}<path d="M0 0L8 4L0 8z" fill="{MUTED}"/></marker></defs>',
                f'<rect {size} rx="8" fill="{PAPER}"/>',
                *self._shapes,
                "</svg>\n",
            ]
        )


def _number(value: float | str) -> str:
    """A number to a hundredth of a pixel, without zeros at its end; a text as it is."""
    return value if isinstance(value, str) else f"{round(value, 2):g}"
