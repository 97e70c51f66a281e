"""What people see: their own text as they wrote it, on one line, and nothing of the package's insides."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from PIL import Image

from drmcli.cli import output, render
from drmcli.config import spoken

ODD = ["a circle [/]", "[bold]red[/bold]", "a [link=x]circle", ":cat: [/red] \\[x]", "a\x1b[31m circle\twith\ncontrol"]


def test_prompts_and_names_are_shown_as_they_are(drm, tmp_path: Path) -> None:
    """Pictures are drawn, shown and scored under names that Rich would read as markup."""
    out = tmp_path / "r[/]x"
    drawn = drm("sample", *ODD, "--steps", "1", "--reward", "none", "--out", out)
    assert drawn.code == 0, drawn.err
    shown = drm("show", out)
    assert shown.code == 0, shown.err
    for text in (drawn.out, shown.out):
        for prompt in ODD[:-1]:
            assert prompt in text
        assert "\x1b" not in text
        assert "a\\x1b[31m circle with control" in text
        assert "r[/]x" in text
    picture = tmp_path / "[bold]b.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    scored = drm("score", picture, "--prompt", ODD[1], "--out", tmp_path / "s")
    assert scored.code == 0, scored.err
    assert "[bold]b.png" in scored.out
    assert ODD[1] in scored.out
    gone = drm("score", "[/]gone.png", "--prompt", "x", "--out", tmp_path / "t")
    assert gone.err.startswith("error: [/]gone.png: ")


@pytest.mark.parametrize("text", ODD)
def test_every_kind_of_output_takes_any_text(text: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Titles, columns, cells, progress, notes, warnings and errors, on a terminal and in a pipe."""
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        with output.Screen() as screen:
            screen.progress(text, 1, 2, more=text)
            screen.note(text)
            screen.warn(text)
        output.show_error(text, text)
        made = render.table(text, text, "b")
        made.add_row(text, text)
        output.stdout().print(made)
    captured = capsys.readouterr()
    assert f"error: {output.plain(text)}" in captured.err
    assert captured.out.count(output.plain(text)) >= 6


def test_plain_cuts_what_is_long() -> None:
    assert output.plain("x" * 10_000, 600).count("x") < 600
    assert output.plain("caf\udce9 ☃") == "caf\\udce9 ☃"


def test_a_stream_that_is_not_utf8_ends_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from drmcli.cli.app import invoke

    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    assert invoke(["sample", "un café ☃", "--steps", "1", "--reward", "none", "--out", str(tmp_path / "é")]) == 0
    sys.stdout.flush()
    assert "caf\\xe9" in buffer.getvalue().decode()


def test_the_embedded_models_are_named_by_what_they_are(drm, tmp_path: Path) -> None:
    assert spoken("{package}/tiny/weights/reward-own") == "the embedded reward model"
    assert spoken("owner/name") == "owner/name"
    flags = ["--pairs", "6", "--sigma", "0.25", "--set", "shapes_generated=0", "--scorer", "shapes"]
    bench = drm("bench", *flags, "--out", tmp_path / "b")
    assert not (tmp_path / "b" / "accuracy_by_noise.png").exists(), "one noise level is no curve"
    shown = drm("show", tmp_path / "b")
    page = (tmp_path / "b" / "report.html").read_text(encoding="utf-8")
    for text in (bench.out, bench.err, shown.out, page):
        assert "{package}" not in text
        assert "tiny/weights" not in text
    assert "the embedded reward model" in bench.out


def test_a_table_in_a_pipe_is_not_wrapped(drm, tmp_path: Path) -> None:
    prompt = "a large red circle above a small blue square " * 5
    drawn = drm("sample", prompt, "--steps", "1", "--reward", "none", "--out", tmp_path / "r")
    assert prompt.strip() in drawn.out
    assert drawn.err.splitlines()[-1] == f"next: drm show {tmp_path / 'r'}"
