"""A page that holds everything: style, tables and pictures are inside the one HTML file, so that it opens offline."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 68rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note { color: #444; } p.stamp { border: 2px solid #1a1a1a; display: inline-block; padding: .1rem .6rem; }
div.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ccc; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #1a1a1a; }
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
        """A table, the first row a heading."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
        inner = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
        self._parts.append(f'<div class="wide"><table>{inner}</table></div>')

    def picture(self, png: bytes, text: str) -> None:
        """A picture, and what it shows, for those who cannot see it."""
        data = base64.b64encode(png).decode()
        self._parts.append(f'<p><img alt="{escape(text)}" src="data:image/png;base64,{data}"></p>')

    def html(self) -> str:
        body = "\n".join(self._parts)
        head = f'<meta charset="utf-8">\n<title>{escape(self._title)}</title>\n<style>{STYLE}</style>'
        return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
