"""Where files go and come from: `~`, names that pyarrow would take for others, a locale without UTF-8, folders that are gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL
from PIL import Image

from drmcli import results
from drmcli.data import cache, parquet
from drmcli.data.manifest import look
from drmcli.errors import InputError, RunError
from drmcli.files import guarded, home, make_folder, name_place, write_text

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""A locale without UTF-8, which Python is told to keep to."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder beside the one where the command runs, with a picture in each."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Image.new("RGB", (32, 32), "red").save("a.png")
    return tmp_path


def test_what_is_written_below_the_home_folder_is_read_there(here: Path, drm) -> None:
    assert drm("score", "a.png", "--prompt", "x", "--out", "~/r").code == 0
    assert (here / "home" / "r" / "scores.parquet").is_file()
    assert drm("show", here / "home" / "r").code == 0
    Path("c.yaml").write_text("cache_dir: ~/zz\n")
    told = drm("train-reward", *SMALL, "--steps", "1", "--config", "c.yaml", "--out", "t")
    assert told.code == 0, told.err
    assert list((here / "home" / "zz" / "shapes").glob("*.parquet"))
    assert not Path("~").exists()


def test_a_cache_of_the_environment_below_the_home_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRM_CACHE", "~/zz")
    assert cache.cache_root(None) == here / "home" / "zz"
    assert cache.cache_root("~/yy") == here / "home" / "yy"
    monkeypatch.setenv("DRM_CACHE", "")
    for empty in ("", "~/.cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", empty)
        assert cache.cache_root(None) == here / "home" / ".cache" / "drmcli"


@pytest.mark.parametrize("name", ["s3:/x", "file:/x", "./~/x", "~x", "a=1", os.fsdecode(b"\xe9")])
def test_a_table_is_read_where_it_was_written(here: Path, name: str) -> None:
    file = Path(name) / "scores.parquet"
    row = {"dataset": "d", "image": "i", "prompt_id": "", "prompt": "p", "sigma": 0.0, "score": 1.0}
    results.write(file, "scores", [row], "run")
    assert results.read(file).to_dict("records") == [row]
    assert parquet.read_table(file, ["score"]).column_names == ["score"]
    with parquet.opened(file) as opened:
        assert opened.read_row_group(0, columns=["prompt"]).to_pylist() == [{"prompt": "p"}]


def test_a_run_in_a_folder_named_as_a_bucket(here: Path, drm) -> None:
    assert drm("score", "a.png", "--prompt", "x", "--out", "s3:/x").code == 0
    shown = drm("show", "s3:/x", "--json")
    assert shown.code == 0, shown.err
    assert shown.json["tables"] == {"scores": 1}


def test_a_place_that_is_no_text_is_looked_at_anew(here: Path) -> None:
    strange = os.fsdecode(b"\xe9.png")
    Path("a.png").rename(strange)
    assert look(strange, {}) is None


def test_names_that_the_locale_cannot_hold_are_refused(here: Path) -> None:
    Path("a.png").rename("é.png")

    def run(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "drmcli", "score", *words, "--json"]
        done = subprocess.run(command, capture_output=True, env=os.environ | ASCII)
        return done.returncode, (done.stdout + done.stderr).decode()

    hint = "hint: set PYTHONUTF8=1"
    code, said = run("é.png", "--prompt", "x", "--dry-run")
    assert (code, "missing" in said, hint in said) == (2, False, True), said
    Path("é.png").rename("a.png")
    code, said = run("a.png", "--prompt", "x", "--out", "o é", "--dry-run")
    assert code == 2 and "--out: 'o \\xe9': files have no such names" in said and hint in said, said
    code, said = run("a.png", "--prompt", "é", "--dry-run")
    assert code == 0 and json.loads(said)["config"]["prompts"] == ["é"], said


def test_a_folder_is_gone_only_where_a_run_had_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(RunError, match="folder is gone"), home(run), guarded(run / "a"):
        raise FileNotFoundError(2, "No such file or directory")
    with pytest.raises(RunError, match=r"b/a: cannot write: No such file"), guarded(tmp_path / "b" / "a"):
        raise FileNotFoundError(2, "No such file or directory")


def test_what_fails_below_a_place_is_told_with_what_named_it(tmp_path: Path) -> None:
    place = tmp_path / "x"
    name_place(place, "DRM_CACHE")
    for error in (
        FileNotFoundError(2, "No such file"),
        PermissionError(13, "no"),
        OSError(30, "Read-only file system"),
    ):
        with pytest.raises(InputError, match=f"^DRM_CACHE {place}: ") as told, guarded(place / "y" / "z"):
            raise error
        assert "DRM_CACHE" in told.value.hint
    place.mkdir()
    with pytest.raises(InputError) as refused, home(place), guarded(place / "y"):
        raise PermissionError(13, "no")
    assert refused.value.message.startswith(str(place / "y")) and "--out" in refused.value.hint
    write_text(place / "file", "x")
    with pytest.raises(InputError, match=f"^DRM_CACHE {place}: a part of this path is a file"):
        make_folder(place / "file" / "y")
