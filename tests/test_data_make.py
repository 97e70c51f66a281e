"""`drm data make`: labels from scores, a folder that `--data` takes, and going on after an interruption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from drmcli.data.datasets import read
from drmcli.data.labels import combined, pairs, spread
from drmcli.scorers.plain import shapes

SETTINGS = {"labels": "soft", "temperature": 1.0, "tie_gap": 0.0, "weight_by_gap": False}
SMALL = ["--limit", 3, "--num-images", 3, "--steps", 2, "--json"]


def made(scores: np.ndarray, **settings: object):
    return pairs(scores, **(SETTINGS | settings), rng=np.random.default_rng(0))  # type: ignore[arg-type]


def test_scorers_count_by_their_weight_whatever_their_scale() -> None:
    """Two scorers of scales 1 and 1000 with weights 1 and -1 cancel; one that tells nothing apart adds nothing."""
    rng = np.random.default_rng(1)
    one = rng.normal(size=(40, 4)) + rng.normal(size=(40, 1)) * 9  # prompts differ by more than their pictures
    assert spread(combined(one[None], [1.0])) == pytest.approx(1)
    assert np.abs(combined(np.stack([one, 1000 * one]), [1.0, -1.0])).max() < 1e-6
    assert np.abs(combined(np.full((1, 5, 4), 0.1), [1.0])).max() == 0
    assert np.allclose(combined(np.stack([one, 1000 * one]), [2.0, 1.0]), combined(one[None], [1.0]))
    assert np.allclose(combined(np.stack([one, np.full_like(one, 7)]), [1.0, 5.0]), combined(one[None], [1.0]))


def test_labels_are_bradley_terrys() -> None:
    scores = np.array([[0.0, 1.0, 1.0 + np.log(3)]])
    found = made(scores)
    assert list(zip(found.first, found.second)) == [(0, 1), (0, 2), (1, 2)]
    assert found.label[0] == pytest.approx(1 / (1 + np.e))
    assert found.label[2] == pytest.approx(0.25)
    assert made(scores, temperature=0.5).label[2] == pytest.approx(0.1)
    assert made(scores, tie_gap=1.05).label.tolist() == pytest.approx([0.5, found.label[1], found.label[2]])
    assert made(scores, labels="hard").label.tolist() == [0, 0, 0]
    weighted = made(scores, weight_by_gap=True).weight
    assert weighted.mean() == pytest.approx(1)
    assert weighted[1] / weighted[2] == pytest.approx((1 - 2 * found.label[1]) / 0.5)


def test_drawn_labels_are_votes_of_that_probability() -> None:
    found = made(np.tile([0.0, np.log(3)], (4000, 1)), labels="drawn")
    assert set(found.label) == {0.0, 1.0}
    assert found.label.mean() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 4000) ** 0.5)


def test_a_folder_that_trains(tmp_path: Path, drm) -> None:
    """Pictures, pairs and a sheet; the judge's order; mixed with other data by ratio; the same again from the same seed."""
    result = drm("data", "make", *SMALL, "--out", tmp_path / "own")
    assert result.code == 0, result.err
    assert (result.json["n_images"], result.json["n_pairs"]) == (9, 9)
    data = read(tmp_path / "own")
    assert (len(data), len(data.images), len(data.prompts)) == (9, 9, 3)
    assert data.name == "own"
    drawn = pd.read_parquet(tmp_path / "own" / "drawn.parquet")
    judged = shapes([Image.open(tmp_path / "own" / p) for p in drawn["path"]], list(drawn["prompt"]))
    by_path = dict(zip(drawn["path"], judged))
    table = pd.read_parquet(tmp_path / "own" / "preferences.parquet")
    assert all(by_path[c] >= by_path[r] for c, r in zip(table["chosen"], table["rejected"]))
    assert table["label"].between(0.5, 1).all() and table["label"].nunique() > 3
    with Image.open(tmp_path / "own" / "sheet.png") as picture:
        assert picture.height > picture.width / 3 > 100
    again = drm("data", "make", *SMALL, "--out", tmp_path / "again")
    assert pd.read_parquet(tmp_path / "again" / "preferences.parquet").equals(table), again.err
    assert drm("data", "check", tmp_path / "own").code == 0
    flags = ["--set", "shapes_prompts=8", "--set", "shapes_generated=0", "--set", "eval_pairs=12", "--batch-size", 12]
    trained = drm(
        "train-reward", "--data", f"{tmp_path / 'own'}=0.5", "--data", "shapes=0.5", *flags, "--steps", 1, "--json"
    )
    assert trained.code == 0, trained.err
    assert trained.json["train_pairs"] == 9 + 48


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, drm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge fails at its second batch: no picture is drawn twice afterwards and no batch judged twice."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "strict_judge.py").write_text(
        "from pathlib import Path\nasked = []\ndef score(images, prompts):\n    asked.append(len(images))\n"
        "    if len(asked) == 2: raise RuntimeError('gone')\n    return [image.getpixel((9, 9))[0] for image in images]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = ["data", "make", *SMALL, "--batch-size", 4, "--label", "strict_judge:score", "--out", tmp_path / "own"]
    assert drm(*flags).code == 1
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "own" / "drawn" / "images").iterdir()}
    assert len(times) == 9
    result = drm(*flags)
    assert result.code == 0, result.err
    import strict_judge  # type: ignore[import-not-found]

    assert strict_judge.asked == [4, 4, 4, 1]
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert not (tmp_path / "own" / "partial").exists()


def test_what_is_not_judged_and_what_cannot_be(tmp_path: Path, drm) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    none = drm("data", "make", prompts, *SMALL, "--label", "none", "--out", tmp_path / "own")
    assert (none.code, none.json["n_pairs"], none.json["n_images"]) == (0, 0, 6)
    assert not (tmp_path / "own" / "preferences.parquet").exists()
    for flags, fact in (
        (["--label", "shapes"], "a cat"),  # said before anything is drawn
        (["--label", "people", "--label", "shapes"], "--label people: given together with"),
        (["--label", "shapes=0"], "--label shapes=0: the weight"),
        (["--label", "pikscore"], "--label pikscore: there is no such scorer"),
        (["--num-images", 1, "--label", "none"], "--num-images"),
    ):
        result = drm("data", "make", prompts, *SMALL, *flags, "--out", tmp_path / "wrong")
        assert result.code == 2, (flags, result.err)
        assert fact in result.err
        assert not (tmp_path / "wrong" / "drawn").exists()
    assert drm("data", "make", prompts, "--preset", "sd35-medium", "--dry-run").code == 2  # nobody is named who judges
