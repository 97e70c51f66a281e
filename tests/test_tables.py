"""Tables at every width: numbers whole, texts wrapped between words, nothing wider than the terminal, nothing wrapped in a pipe."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from drmcli.cli import output, render
from drmcli.cli.tables import Table, wrapped

ROWS = [
    ("runs/a/images/000000.png", "-4.809", "75.7 to 93.8", "a large red circle above a small blue square", "0"),
    ("runs/a/images/000001.png", "+12.70 (+3.7 to +21.7)", "-", "红色的圆在蓝色正方形上面 " * 4, "1234567"),
    ("", "", "", "3 small circles [bold]and[/] a\nbreak", ""),
]


def printed(width: int, columns: tuple[str, ...] = ("path", "score", "95 % interval", "prompt", "seed")) -> list[str]:
    made = Table(list(columns))
    for row in ROWS:
        made.add_row(*row)
    file = io.StringIO()
    Console(markup=False, emoji=False, highlight=False, width=width, file=file).print(made)
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [24, 40, 60, 80, 100, 140, 10_000])
def test_every_width(width: int) -> None:
    lines = printed(width)
    assert max(map(cell_len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)
    text = "\n".join(lines)
    if width >= 40:
        for cell in ("-4.809", "+12.70 (+3.7 to +21.7)", "75.7 to 93.8", "1234567", "runs/a/images/000001.png"):
            assert cell in text
    for word in ("large", "circle", "square", "[bold]and[/]"):
        assert word in text


def test_a_pipe_wraps_nothing() -> None:
    """A line a row; texts on the left, numbers on the right."""
    lines = printed(output.PIPE_WIDTH)
    assert len(lines) == 1 + len(ROWS)
    at = lines[0].index("prompt")
    assert lines[1][at:].startswith("a large red circle") and lines[3][at:].startswith("3 small")
    end = lines[0].index("score") + len("score")
    assert lines[1][:end].endswith(" -4.809") and lines[2][:end].endswith("+21.7)")


def test_narrow_tables_are_a_line_a_column() -> None:
    lines = printed(60)
    assert lines[0] == "path runs/a/images/000000.png"
    assert "  score          -4.809" in lines and "  seed           0" in lines


@pytest.mark.parametrize("text", ["", " ", "a", "x" * 30, "红" * 9, "a " + "红" * 9, "one two three"])
@pytest.mark.parametrize("width", [1, 2, 7])
def test_wrapped_ends(text: str, width: int) -> None:
    lines = wrapped(text, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(cell_len(line) <= max(2, width) for line in lines)


def test_no_rows(capsys: pytest.CaptureFixture[str]) -> None:
    output.stdout().print(render.table("nothing", "a", "b"))
    assert capsys.readouterr().out == "nothing\na  b\n"
