"""Tables of a terminal or a pipe. Numbers are never cut or wrapped: a table that is too wide is shown a row at a time, a line a column."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.cells import cell_len, chop_cells
from rich.text import Text

from drmcli.cli.output import plain
from drmcli.data.text import filled

CELL = 400
"""Characters of a cell."""
NARROWEST, WORD = 16, 40
"""Columns that a text is wrapped to at least; or its longest word, up to so many."""
GAP = 2
TEXTS = {
    "prompt",
    "image",
    "picture",
    "path",
    "chosen",
    "rejected",
    "name",
    "about",
    "found",
    "what",
    "to do",
    "source",
}
"""Columns of text, whatever their cells begin with."""
NO_NUMBER = ("", "-", "nan")


@dataclass
class Table:
    """Rows below a header; Rich prints it by `__rich_console__`, as wide as the console."""

    columns: list[str]
    rows: list[tuple[list[str], str]] = field(default_factory=list)
    """Cells, and the style of the whole row."""

    def add_row(self, *cells: str, style: str = "") -> None:
        self.rows.append(([plain(cell, CELL) for cell in cells], style))

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Text]:
        widths = self._widths(options.max_width)
        lines = self._records(options.max_width) if widths is None else self._lines(widths)
        for line, style in lines:
            yield Text(line, style=style, no_wrap=True, overflow="ignore", end="\n")

    def _text(self, i: int) -> bool:
        """Is this a column of text, which stands left and may be wrapped?"""
        cells = [row[i] for row, _ in self.rows]
        return (
            i == 0 or self.columns[i] in TEXTS or any(c not in NO_NUMBER and c[0] not in "+-0123456789" for c in cells)
        )

    def _widths(self, most: int) -> list[int] | None:
        """A width a column; the widest texts give way where there is too little room. None where that is not enough."""
        shown = [self.columns, *(row for row, _ in self.rows)]
        widths = [max(cell_len(row[i]) for row in shown) for i in range(len(self.columns))]
        words = [max(cell_len(word) for row in shown for word in row[i].split(" ")) for i in range(len(widths))]
        least = [min(w, max(NARROWEST, min(words[i], WORD))) if self._text(i) else w for i, w in enumerate(widths)]
        room = most - GAP * (len(widths) - 1)
        if sum(least) > room:
            return None
        while sum(widths) > room:
            widest = max((i for i in range(len(widths)) if widths[i] > least[i]), key=widths.__getitem__)
            widths[widest] -= 1
        return widths

    def _lines(self, widths: list[int]) -> Iterator[tuple[str, str]]:
        """The header and the rows, wrapped."""
        left = [self._text(i) for i in range(len(widths))]
        for cells, style in [(self.columns, "bold"), *self.rows]:
            parts = [wrapped(cell, width) for cell, width in zip(cells, widths)]
            for k in range(max(map(len, parts))):
                line = [part[k] if k < len(part) else "" for part in parts]
                spaces = [" " * (width - cell_len(cell)) for cell, width in zip(line, widths)]
                yield (
                    (" " * GAP).join(c + s if to_left else s + c for c, s, to_left in zip(line, spaces, left)).rstrip(),
                    style,
                )

    def _records(self, width: int) -> Iterator[tuple[str, str]]:
        """Each row by itself: its first cell, and below it a line a column that says something."""
        indent = 2 + max(map(cell_len, self.columns[1:]), default=0) + GAP
        below = width - indent < NARROWEST  # then a value has lines of its own
        indent = 4 if below else indent
        for number, (cells, style) in enumerate(self.rows):
            if number:
                yield "", ""
            for line in wrapped(f"{self.columns[0]} {cells[0]}".strip(), width):
                yield line, style or "bold"
            for name, cell in zip(self.columns[1:], cells[1:]):
                lines = wrapped(cell, width - indent) if cell else []
                if below and lines:
                    yield f"  {name}", style
                for k, line in enumerate(lines):
                    head = " " * indent if below or k else f"  {name}" + " " * (indent - 2 - cell_len(name))
                    yield head + line, style


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most that many columns; words that are wider are cut."""
    cells = max(2, width)
    return list(
        filled(text.split(" "), lambda word: chop_cells(word, cells) or [""], lambda line: cell_len(line) <= width)
    )
