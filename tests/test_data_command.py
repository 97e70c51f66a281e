"""`drm data`: what is fetched, what is found, and what is said when it cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_pairs

from drmcli.recipes import data as recipe


def test_list(drm) -> None:
    found = drm("data", "list", "--json").json
    assert set(found) == {"hpdv2", "hpdv3", "pickapic", "pickapic_v2", "imagereward"}
    assert found["hpdv2"]["hub_id"] == "ymhao/HPDv2"
    assert "shapes" in drm("data", "list").out


def test_every_dataset_knows_what_it_needs() -> None:
    assert set(recipe.PATTERNS) == set(recipe.DATASETS)


def test_get_offline_says_so(tmp_path: Path, drm) -> None:
    result = drm("data", "get", "hpdv2", "--data-dir", tmp_path / "h")
    assert result.code == 3
    assert "cannot be reached" in result.err
    assert not (tmp_path / "h" / recipe.MANIFEST).exists()


@pytest.mark.parametrize("args", [["get", "hpdv9"], ["get", "hpdv2", "--split", "dev"], ["check", "gone.jsonl"]])
def test_bad_input(args: list[str], drm) -> None:
    result = drm("data", *args)
    assert result.code == 2
    assert [line.split(":")[0] for line in result.err.splitlines()] == ["error", "hint"]


def test_check_names_what_is_wrong(tmp_path: Path, drm) -> None:
    file = write_pairs(tmp_path / "data", 4)
    fine = drm("data", "check", file, "--json")
    assert (fine.code, fine.json["ok"], fine.json["pairs"]) == (0, True, 4)
    (file.parent / "2-b.png").write_bytes(b"nonsense")
    (file.parent / "3-b.png").write_bytes((file.parent / "3-a.png").read_bytes())
    broken = drm("data", "check", file)
    assert broken.code == 1
    assert "2-b.png" in broken.out
    assert drm("data", "check", file, "--json").json["duplicate images"] == [["3-a.png", "3-b.png"]]


def test_two_sets_that_share_something(tmp_path: Path, drm) -> None:
    """The same pictures under other names are found by content, and prompts by their text."""
    first = write_pairs(tmp_path / "a", 4)
    lines = write_pairs(tmp_path / "b", 8).read_text().splitlines()
    other = tmp_path / "b" / "rest.jsonl"
    other.write_text("\n".join(lines[4:]) + "\n")
    clean = drm("data", "check", first, "--against", other, "--json")
    assert (clean.code, clean.json["images in both"], clean.json["prompts in both"]) == (0, [], [])
    (tmp_path / "b" / "7-a.png").write_bytes((tmp_path / "a" / "1-b.png").read_bytes())
    shared = drm("data", "check", first, "--against", other, "--json")
    assert shared.code == 1
    assert shared.json["images in both"] == ["1-b.png = 7-a.png"]
    assert (
        len(drm("data", "check", first, "--against", tmp_path / "b" / "pairs.jsonl", "--json").json["prompts in both"])
        == 4
    )
