"""A page that holds everything: style, tables and pictures are inside the one HTML file, so that it opens offline."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

LONGEST_NUMBER = 14
"""Characters of a cell that is kept on one line: an accuracy with its deviation."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 68rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note { color: #444; } p.stamp { border: 2px solid #1a1a1a; display: inline-block; padding: .1rem .6rem; }
div.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; font-size: .9rem; vertical-align: top; border-bottom: 1px solid #ccc;
         text-align: right; white-space: nowrap; }
th:first-child, td:first-child, td.text { text-align: left; } th { border-bottom: 2px solid #1a1a1a; }
th:first-child, td:first-child { min-width: 8.5rem; } th.text { text-align: left; }
th, td:first-child, td.text { white-space: normal; overflow-wrap: break-word; }
td.text { word-break: break-word; max-width: 24rem; } details { margin-top: 1rem; } summary { cursor: pointer; }
img { max-width: 100%; height: auto; }
"""


class Page:
    """Collects the sections of a page."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]

    def title(self, text: str) -> None:
        self._parts.append(f"<h1>{escape(text)}</h1>")

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def note(self, text: str) -> None:
        self._parts.append(f'<p class="note">{escape(text)}</p>')

    def stamp(self, text: str) -> None:
        self._parts.append(f'<p class="stamp">{escape(text)}</p>')

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Add a table, the first row a heading."""
        self._parts.append(table_html(rows))

    def folded_table(self, text: str, rows: Sequence[Sequence[str]]) -> None:
        """Add a table that opens on a click."""
        self._parts.append(f"<details><summary>{escape(text)}</summary>\n{table_html(rows)}\n</details>")

    def picture(self, png: bytes, text: str) -> None:
        """A picture, and what it shows, for those who cannot see it."""
        self._parts.append(picture_html(png, text))

    def html(self) -> str:
        return document(self._title, "\n".join(self._parts))


def document(title: str, body: str, style: str = STYLE) -> str:
    """Return a whole HTML document."""
    head = f'<meta charset="utf-8">\n<title>{escape(title)}</title>\n<style>{style}</style>'
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def picture_html(png: bytes, text: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<p><img alt="{escape(text)}" src="data:image/png;base64,{data}"></p>'


def table_html(rows: Sequence[Sequence[str]]) -> str:
    """Return a table, the first row a heading. Columns of numbers are aligned to the right, those of texts to the left.

    Numbers stay on one line, longer texts may wrap, so that the page need not scroll sideways.
    """
    texts = [any(len(cell) > LONGEST_NUMBER for cell in column) for column in zip(*rows[1:], strict=True)]
    texts[:1] = [False]  # to the left anyway, and short ones do not wrap

    def cell(kind: str, text: str, is_text: bool) -> str:
        is_text = is_text or (kind == "td" and len(text) > LONGEST_NUMBER)
        return f"<{kind}{' class=text' if is_text else ''}>{escape(text)}</{kind}>"

    def line(kind: str, row: Sequence[str]) -> str:
        return "<tr>" + "".join(cell(kind, *of) for of in zip(row, texts or [False] * len(row), strict=True)) + "</tr>"

    body = "".join(line("td", row) for row in rows[1:])
    return f'<div class="wide"><table><thead>{line("th", rows[0])}</thead><tbody>{body}</tbody></table></div>'
