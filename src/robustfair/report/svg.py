"""Elements of SVG, as markup: every text is escaped here, every number has at most two decimals."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape


def element(tag: str, kind: str, *inside: str, **attributes: float | str | None) -> Markup:
    """One element of class `kind` around others; text is escaped, a number has at most two decimals, None is left out.

    >>> print(element("text", "name", "a < b", x=1 / 3, text_anchor="end"))
    <text class="name" x="0.33" text-anchor="end">a &lt; b</text>
    """
    given = {"class": kind or None, **attributes}
    words = "".join(
        f' {key.replace("_", "-")}="{escape(value) if isinstance(value, str) else number(value)}"'
        for key, value in given.items()
        if value is not None
    )
    if not inside:
        return Markup(f"<{tag}{words}/>")
    return Markup(f"<{tag}{words}>{''.join(map(escape, inside))}</{tag}>")


def number(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def box(x: float, y: float, width: float, height: float, kind: str = "") -> Markup:
    """A rectangle."""
    return element("rect", kind, x=x, y=y, width=width, height=height)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A straight line."""
    return element("line", kind, x1=x1, y1=y1, x2=x2, y2=y2)


def dot(x: float, y: float, radius: float, kind: str, tip: Markup) -> Markup:
    """A circle with a tooltip."""
    return element("circle", kind, tip, cx=x, cy=y, r=radius)


def tip(text: str) -> Markup:
    """A tooltip, as the first child of what it belongs to."""
    return element("title", "", text)


def text(
    x: float,
    y: float,
    text: str,
    kind: str,
    *,
    anchor: str | None = None,
    tip: str = "",
    size: float | None = None,
    degrees: float = 0,
) -> Markup:
    """A line of text; `anchor` is "middle" or "end" where it does not start at x, `degrees` turn it about its start."""
    turned = f"rotate({number(degrees)} {number(x)} {number(y)})" if degrees else None
    return element("text", kind, tip, text, x=x, y=y, transform=turned, text_anchor=anchor, font_size=size)


def beside(rows: Markup, cells: Markup, label: str) -> Markup:
    """The names of the rows, and at their right the cells, which scroll sideways where they must."""
    scroll = element("div", "scroll", cells, tabindex="0", role="group", aria_label=label)
    return element("div", "heat", rows, scroll)


def drawing(
    width: float,
    height: float,
    parts: Sequence[Markup],
    kind: str,
    *,
    label: str | None = None,
    stretch: bool = False,
    fixed: bool = False,
) -> Markup:
    """The root element: `stretch` fills any width, `fixed` keeps its pixels; without a label it is decoration."""
    return element(
        "svg",
        kind,
        *parts,
        viewBox=f"0 0 {number(width)} {number(height)}",
        width=width if fixed else None,
        height=height if fixed else None,
        preserveAspectRatio="none" if stretch else None,
        role="img" if label else None,
        aria_label=label or None,
        aria_hidden=None if label else "true",
    )
