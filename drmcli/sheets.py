"""Sheets of pictures with their captions: grids, before and after, contact sheets, trees of candidates. Drawn with Pillow alone.

A sheet holds blocks (of a prompt, mostly), a block a title and tiles, a tile a picture with a strip below it. Nothing is written over a
picture, which may be 64 pixels wide.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from drmcli.data.text import filled

SMALLEST, LARGEST, OF_MANY = 128, 512, 256
"""Sides of a tile in pixels: at least, at most, and at most where there are more than MANY."""
MANY = 16
GAP = 6
"""Between tiles, pixels; twice that between blocks."""
LINES = 3
"""A caption's part (a prompt) has at most as many, then it ends in dots."""
LONGEST = 400
"""Characters of a text that are looked at."""
ASPECT = 1.4
"""Width by height of a sheet, about."""
INK, SOFT, FRAME = "#1d2733", "#66717d", "#c8553d"


@dataclass(frozen=True)
class Tile:
    """A picture and what stands below it."""

    picture: Image.Image
    prompt: str = ""
    """Wrapped to LINES lines."""
    note: str = ""
    """Seed, score; its lines are shortened, not wrapped."""
    framed: bool = False


@dataclass(frozen=True)
class Block:
    """Tiles that belong together, in one row."""

    tiles: Sequence[Tile]
    title: str = ""
    """Above them, wrapped to two lines."""


def by_prompt(prompts: Sequence[str], pictures: Sequence[Image.Image], notes: Sequence[str]) -> list[Block]:
    """A block a prompt, of pictures that lie in order of prompts; a single picture has its prompt below it."""
    blocks: list[Block] = []
    start = 0
    while start < len(prompts):
        end = next((i for i in range(start, len(prompts)) if prompts[i] != prompts[start]), len(prompts))
        if end - start == 1:
            blocks.append(Block([Tile(pictures[start], prompts[start], notes[start])]))
        else:
            tiles = [Tile(pictures[i], note=notes[i]) for i in range(start, end)]
            rows = [tiles[i : i + 8] for i in range(0, len(tiles), 8)]
            blocks += [Block(row, prompts[start] if not i else "") for i, row in enumerate(rows)]
        start = end
    return blocks


def score_text(value: float | None) -> str:
    """A score as captions have it; nothing where there is none."""
    return "" if value is None or math.isnan(value) else f"{value:+.2f}" if abs(value) < 1000 else f"{value:+.3g}"


def note_of(seed: int, score: float | None) -> str:
    """Score and seed in one line; of a long seed the end may be cut."""
    said = score_text(score)
    return f"score {said}, seed {seed}" if said else f"seed {seed}"


def sheet(blocks: Sequence[Block], *, title: str = "", columns: int | None = None) -> Image.Image:
    """All blocks in one picture, below a title. columns: blocks side by side; None is what makes it a little wider than high."""
    across = max(len(b.tiles) for b in blocks)
    side = _side([t.picture for b in blocks for t in b.tiles])
    tall = max(_height(t.picture, side) for b in blocks for t in b.tiles)
    size = max(12, round(side / 24))
    line = round(size * 1.3)
    width = across * (side + GAP) - GAP
    titles = [wrapped(b.title, width, size, 2) for b in blocks]
    strips = [[_strip(t, side, size) for t in b.tiles] for b in blocks]
    head = max(map(len, titles)) * line + (3 if any(titles) else 0)
    foot = max(len(s) for row in strips for s in row) * line + (4 if any(s for row in strips for s in row) else 0)
    high = head + tall + foot
    columns = min(columns or _columns(len(blocks), width + 2 * GAP, high + 2 * GAP), len(blocks))
    rows = math.ceil(len(blocks) / columns)
    whole = columns * (width + 2 * GAP)
    above = wrapped(title, whole - 2 * GAP, size, 2)
    start = 2 * GAP + (len(above) * line + GAP if above else 0)
    made = Image.new("RGB", (whole + 2 * GAP, start + rows * (high + 2 * GAP)), "white")
    pen = ImageDraw.Draw(made)
    for i, text in enumerate(above):
        _write(pen, (2 * GAP, 2 * GAP + i * line), text, size, INK)
    for number, block in enumerate(blocks):
        left = 2 * GAP + number % columns * (width + 2 * GAP)
        top = start + number // columns * (high + 2 * GAP)
        for i, text in enumerate(reversed(titles[number])):  # next to the pictures, where others have more lines
            _write(pen, (left, top + head - 3 - (i + 1) * line), text, size, INK)
        for i, (tile, strip) in enumerate(zip(block.tiles, strips[number])):
            x, y = left + i * (side + GAP), top + head
            made.paste(fitted(tile.picture, side), (x, y))
            if tile.framed:
                frame = (x - 3, y - 3, x + side + 2, y + _height(tile.picture, side) + 2)
                pen.rectangle(frame, outline=FRAME, width=3)
            for j, (text, ink) in enumerate(strip):
                _write(pen, (x + 1, y + tall + 4 + j * line), text, size, ink)
    return made


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """A picture of that width; small ones keep their pixels square and sharp."""
    how = Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize((side, _height(picture, side)), how)


def _height(picture: Image.Image, side: int) -> int:
    return max(1, round(side * picture.height / picture.width))


def _side(pictures: Sequence[Image.Image]) -> int:
    most = OF_MANY if len(pictures) > MANY else LARGEST
    return max(SMALLEST, min(most, max(p.width for p in pictures)))


def _columns(count: int, width: int, height: int) -> int:
    """Blocks side by side that come nearest to ASPECT."""
    return min(
        range(1, count + 1),
        key=lambda k: (abs(math.log(k * width / (math.ceil(count / k) * height) / ASPECT)), k),
    )


def _strip(tile: Tile, side: int, size: int) -> list[tuple[str, str]]:
    """Lines below a picture with their colours."""
    prompt = [(line, INK) for line in wrapped(tile.prompt, side, size, LINES)]
    return prompt + [(wrapped(line, side, size, 1)[0], SOFT) for line in tile.note.split("\n") if line.strip()]


# --- text -------------------------------------------------------------------------------------------------------------


def wrapped(text: str, width: int, size: int, most: int) -> list[str]:
    """Lines no wider than `width` pixels, at most `most`; what does not fit ends in dots. Words wider than a line are cut."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    whole = filled(
        text[: LONGEST + 1].split(), lambda word: _pieces(word, width, size), lambda line: _length(line, size) <= width
    )
    lines = [line for line in islice(whole, most + 1) if line]
    if len(lines) <= most and len(text) <= LONGEST:
        return lines
    last = lines[most - 1] if len(lines) >= most else lines[-1]
    while last and _length(last + "...", size) > width:
        last = last[:-1]
    return [*lines[: min(most, len(lines)) - 1], last.rstrip(" ,.;:") + "..."]


def _pieces(word: str, width: int, size: int) -> list[str]:
    """A word in parts that fit in a line: names of files, and scripts that are written without spaces."""
    pieces = []
    while _length(word, size) > width and len(word) > 1:
        count = next((n for n in range(2, len(word)) if _length(word[:n], size) > width), len(word)) - 1
        pieces.append(word[:count])
        word = word[count:]
    return [*pieces, word]


def _write(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, ink: str) -> None:
    pen.text(at, text, fill=ink, font=_font_of(text, size))


def _length(text: str, size: int) -> float:
    return float(_font_of(text, size).getlength(text))


def _font_of(text: str, size: int) -> Any:
    """Pillow's own font, which is narrow and has little but ASCII; for other text DejaVu Sans of matplotlib, which has most alphabets and
    draws a box for what it lacks."""
    return _fonts(size)[0 if text.isascii() else 1]


@cache
def _fonts(size: int) -> tuple[Any, Any]:
    own = ImageFont.load_default(size)
    try:
        from matplotlib import get_data_path

        wide: Any = ImageFont.truetype(os.path.join(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
    except (ImportError, OSError):  # packaged without its fonts: boxes are better than no sheet
        wide = own
    return own, wide
