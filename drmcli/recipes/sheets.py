"""The tree of candidates of one picture."""

from __future__ import annotations

from PIL import Image

from drmcli.generator import Generator
from drmcli.sampling import Candidates
from drmcli.sheets import Block, Tile, score_text, sheet


def branch_tree(generator: Generator, steps: list[Candidates], picture: int, title: str) -> Image.Image:
    """A row a step: predicted clean pictures of the candidates with their scores, kept ones framed. title: prompt and seed."""
    blocks = []
    for c in steps:
        if c.preview is not None:
            tiles = [
                Tile(tile, note=score_text(float(c.score[picture, i])), framed=bool(c.kept[picture, i]))
                for i, tile in enumerate(generator.decode(c.preview[picture].to(generator.device)))
            ]
            blocks.append(Block(tiles, f"step {c.step}, to sigma {c.sigma_next:.3f}"))
    return sheet(blocks, title=title, columns=1)
