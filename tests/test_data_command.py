"""`drm data`: what is fetched, what is found, and what is said when it cannot be had."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

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


def test_get_asks_for_the_split_alone(tmp_path: Path, drm, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def fetch(hub_id: str, **options: object) -> None:
        asked.update(options, hub_id=hub_id)
        (Path(str(options["local_dir"])) / "data").mkdir(parents=True)
        (Path(str(options["local_dir"])) / "data" / "test_unique-00000.parquet").write_bytes(b"rows")

    monkeypatch.setattr(recipe, "snapshot_download", fetch)
    monkeypatch.setattr(recipe.HfApi, "dataset_info", lambda self, name: SimpleNamespace(sha="abc"))
    result = drm("data", "get", "pickapic", "--data-dir", tmp_path / "p", "--json")
    assert result.code == 0, result.err
    assert asked["hub_id"] == "yuvalkirstain/pickapic_v1"
    assert asked["allow_patterns"] == ["data/test_unique-*.parquet"]
    manifest = json.loads((tmp_path / "p" / recipe.MANIFEST).read_text())
    assert manifest == result.json
    assert manifest["files"] == {"data/test_unique-00000.parquet": 4}


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
