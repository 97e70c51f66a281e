"""Sheets of pictures: all that a run drew, and the tree of candidates of one picture."""

from __future__ import annotations

import math

from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw

from drmcli.generator import Generator
from drmcli.sampling import Candidates

TILE = 128
"""Side of a picture in a sheet at least, and of a candidate in a tree, pixels."""


def contact_sheet(pictures: list[Image.Image], columns: int | None = None) -> Image.Image:
    """The pictures in rows; None is about as many columns as rows."""
    side = max(TILE, min(512, pictures[0].width))
    how = Image.Resampling.NEAREST if pictures[0].width < side else Image.Resampling.LANCZOS
    tiles = [t.resize((side, side * t.height // t.width), how) for t in pictures]
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    tiles += [Image.new("RGB", tiles[0].size, "white")] * (rows * columns - len(tiles))
    return make_image_grid(tiles, rows, columns)


def branch_tree(generator: Generator, steps: list[Candidates], picture: int) -> Image.Image:
    """A row a step: predicted clean pictures of the candidates with their scores, kept ones framed."""
    shown = [c for c in steps if c.preview is not None]
    columns = max(c.score.shape[1] for c in shown)
    line = 18
    sheet = Image.new("RGB", (110 + columns * (TILE + 8), len(shown) * (TILE + line + 10) + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for row, c in enumerate(shown):
        top = 8 + row * (TILE + line + 10)
        pen.text((8, top + TILE // 2 - 12), f"step {c.step}\nsigma {c.sigma_next:.3f}", fill="black")
        assert c.preview is not None
        for column, tile in enumerate(generator.decode(c.preview[picture].to(generator.device))):
            left = 110 + column * (TILE + 8)
            sheet.paste(
                tile.resize((TILE, TILE), Image.Resampling.NEAREST if tile.width < TILE else Image.Resampling.LANCZOS),
                (left, top),
            )
            if bool(c.kept[picture, column]):
                pen.rectangle((left - 3, top - 3, left + TILE + 2, top + TILE + 2), outline="#c8553d", width=3)
            pen.text((left + 4, top + TILE + 3), f"{float(c.score[picture, column]):+.2f}", fill="black")
    return sheet
