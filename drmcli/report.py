"""One-page HTML reports: headings, paragraphs, tables and pictures in a single file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #66717d; --line: #e3e6ea; --paper: #fff; --accent: #2f5d8a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #9aa4af; --line: #333b44; --paper: #16191d; --accent: #7fb0dd; } }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 54rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; }
p { margin: .5rem 0; } .soft { color: var(--soft); }
table { border-collapse: collapse; margin: .8rem 0; }
th, td { padding: .35rem 1.1rem .35rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } figure { margin: .8rem 0; } figcaption { color: var(--soft); font-size: .9rem; }
.row { display: flex; flex-wrap: wrap; gap: .9rem; margin: .4rem 0 1.1rem; } .row figure { margin: 0; text-align: center; }
.row img { width: 6.5rem; height: 6.5rem; image-rendering: pixelated; border: 1px solid var(--line); border-radius: 4px; }
code { background: color-mix(in srgb, var(--line) 55%, transparent); padding: .1rem .3rem; border-radius: 3px; }
"""


@dataclass
class Report:
    """A page that is filled from top to bottom. All text is escaped."""

    title: str
    parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, *, soft: bool = False) -> None:
        self.parts.append(
            '<p class="soft">' + html.escape(text) + "</p>" if soft else "<p>" + html.escape(text) + "</p>"
        )

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        self.parts.append(f"<table><tr>{head}</tr>{body}</table>")

    def picture(self, file: Path, caption: str) -> None:
        data = base64.b64encode(file.read_bytes()).decode()
        text = html.escape(caption)
        self.parts.append(
            f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
        )

    def row(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> None:
        """Small pictures side by side, each with a line under it."""
        cells = []
        for picture, caption in zip(pictures, captions):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            data = base64.b64encode(buffer.getvalue()).decode()
            text = html.escape(caption)
            cells.append(
                f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
            )
        self.parts.append(f'<div class="row">{"".join(cells)}</div>')

    def render(self) -> str:
        title = html.escape(self.title)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
            f"<body><h1>{title}</h1>\n" + "\n".join(self.parts) + "\n</body></html>\n"
        )
