"""Sheets of pictures: captions lie below the pictures, fit, and can be of any script."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from drmcli.sheets import LINES, Block, Tile, _length, by_prompt, note_of, sheet, wrapped

TEXTS = {
    "plain": "a large red circle above a small blue square",
    "accents": "un café à l'océan — l'été",
    "Cyrillic": "красный круг над синим квадратом",
    "Chinese": "红色的圆在蓝色正方形上面",
    "Hebrew": "שלום עולם",
    "emoji": "a 😀 face",
    "markup": "a [bold]circle[/] [/]",
    "one endless word": "x" * 500,
    "long": "word " * 5000,
    "half a surrogate pair": "a\ud800b",
    "controls": "a\x00b\x1b[31m\r\nc",
    "blank": "  ",
    "a page of blanks": " " * 500,
    "words after a page of blanks": " " * 500 + "a red circle",
    "empty": "",
}


def picture(color: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_fits(text: str) -> None:
    lines = wrapped(text, 128, 12, LINES)
    assert len(lines) <= LINES and all(_length(line, 12) <= 128 for line in lines)
    assert bool(lines) == bool(text.strip())
    if len(text.strip()) > 200:
        assert lines[-1].endswith("...")
    made = sheet([Block([Tile(picture("red"), text, note_of(7, -2.5))], title=text)], title=text)
    assert made.width == 128 + 4 * 6


def test_what_fits_is_whole() -> None:
    assert " ".join(wrapped(TEXTS["plain"], 128, 12, LINES)) == TEXTS["plain"]
    assert "".join(wrapped("x" * 40, 128, 12, LINES)) == "x" * 40
    assert wrapped(" " * 500 + "a\n red", 128, 12, LINES) == ["a red"]


def test_captions_are_below_and_cover_no_picture() -> None:
    """Each picture is found whole and unspoilt, and there is ink of text in the strip under it."""
    made = np.asarray(
        sheet(by_prompt(["a", "b", "b"], [picture(c) for c in ("#ff0000", "#00ff00", "#0000ff")], ["1", "2", "3"]))
    )
    for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        rows, columns = np.nonzero((made == color).all(-1))
        top, left = rows.min(), columns.min()
        assert len(rows) == 128 * 128 and (rows.max() - top, columns.max() - left) == (127, 127)
        strip = made[top + 128 : top + 128 + 40, left : left + 128]
        assert (strip < 200).any()


@pytest.mark.parametrize(
    "sizes, side, height",
    [
        ([(64, 64)], 128, 128),
        ([(1024, 512)], 512, 256),
        ([(1024, 512)] * 20, 256, 128),
        ([(64, 64), (64, 128)], 128, 256),
        ([(2000, 1)], 512, 1),
    ],
)  # fmt: skip
def test_shapes_are_kept(sizes: list[tuple[int, int]], side: int, height: int) -> None:
    made = np.asarray(sheet([Block([Tile(picture("#ff0000", size))]) for size in sizes]))
    red = (made == (255, 0, 0)).all(-1)
    assert red.sum() == sum(side * max(1, round(side * h / w)) for w, h in sizes)
    assert red.any(1).sum() >= height


def test_many_pictures_make_no_tower() -> None:
    prompts = [f"prompt {i // 2}" for i in range(48)]
    made = sheet(by_prompt(prompts, [picture("red")] * 48, ["seed"] * 48))
    assert 0.7 < made.width / made.height < 2.8


def test_notes() -> None:
    assert note_of(3, -2.5) == "score -2.50, seed 3"
    assert note_of(3, float("nan")) == note_of(3, None) == "seed 3"
