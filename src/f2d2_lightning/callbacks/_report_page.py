"""A report as one HTML file that holds its pictures: to send, or to open anywhere."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: left; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
td:last-child { white-space: normal; }
img { max-width: 100%; height: auto; }
code { background: #f4f4f4; padding: 0 .2rem; }
"""


def page(markdown: str, folder: Path) -> str:
    """The text of a report as HTML, its pictures, files of ``folder``, within it.

    Tags in the text stay text, so that names of columns or paths cannot become a page's own.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for token in tokens:
        for part in token.children or ():
            if part.type == "image":
                content = base64.b64encode((folder / str(part.attrs["src"])).read_bytes()).decode()
                part.attrs["src"] = f"data:image/png;base64,{content}"
    title = escape(markdown.splitlines()[0].lstrip("# "))
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    body = parser.renderer.render(tokens, parser.options, {})
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'
