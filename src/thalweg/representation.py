"""How is a result shown to people: as lines of text, as a table or curve of a notebook?

A table is a title, the heads of its columns, and rows of text; the first column is a name.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, heads (all empty: none are shown) and rows."""
WIDTH, HEIGHT = 460, 150
"""Of a curve, in pixels."""
MARGIN = 34


def as_text(table: Table) -> str:
    """A table as lines: numbers to the right, below the title.

    Example:
        >>> print(as_text(("spectrum", ["", "eigenvalue"], [["lambda_1", "12.5"]])))
        spectrum
                    eigenvalue
          lambda_1        12.5
    """
    title, heads, rows = table
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        first, *rest = row
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    shown = [line(row) for row in ([heads] if any(heads) else [])] + [line(row) for row in rows]
    return "\n".join([title, *(f"  {each}" for each in shown)])


def as_html(table: Table) -> str:
    """A table as HTML, every text escaped.

    Example:
        >>> as_html(("a < b", ["", ""], [["x", "1"]]))
        '<table><caption>a &lt; b</caption><tr><td>x</td><td>1</td></tr></table>'
    """
    title, heads, rows = table

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)

    head = f"<tr>{cells('th', heads)}</tr>" if any(heads) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><caption>{html.escape(title)}</caption>{head}{body}</table>"


def curve_as_svg(x: Sequence[float], y: Sequence[float], label: str) -> str:
    """A curve as SVG, its ends and its height written at it; it takes the colour of text.

    Args:
        x: ascending, at least two different numbers.
        y: one for each, from zero up.
        label: what is drawn, for those who do not see it, too.
    """
    low, high, top = x[0], x[-1], max(y) or 1.0
    across = [MARGIN + (WIDTH - 2 * MARGIN) * (value - low) / (high - low) for value in x]
    up = [HEIGHT - MARGIN + (2 * MARGIN - HEIGHT) * value / top for value in y]
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, up, strict=True))
    said, base = html.escape(label), HEIGHT - MARGIN
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{said}"'
        ' font-size="11" fill="currentColor">'
        f'<path d="M{MARGIN} {base}H{WIDTH - MARGIN}" stroke="currentColor" opacity="0.4"/>'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
        f'<text x="{MARGIN}" y="{HEIGHT - 16}">{low:.4g}</text>'
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 16}" text-anchor="end">{high:.4g}</text>'
        f'<text x="{MARGIN}" y="{MARGIN - 12}">{said}</text></svg>'
    )
