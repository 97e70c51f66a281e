"""From a generator and captions to a reward model of one's own: the study, small, and the four commands of the README's path."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

SMALL = ["--captions", "3", "--num-images", "3", "--steps", "2", "--batch-size", "12", "--held", "2", "--prompts", "2",
         "--seeds", "1", "--searches", "stepwise", "halving", "--shapes-prompts", "4", "--ways", "mix-cps",
         "--lr", "0.05", "--head-lr", "0.05"]  # fmt: skip


def test_the_study_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A way is trained, benched and searched with; the shipped model's difference from itself is 0; all cost the same."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "studies"))
    found = importlib.import_module("own_samples").main([str(tmp_path), *SMALL])["table"]
    assert list(found) == ["shipped", "mix-cps"]
    for way in ("stepwise", "halving"):
        assert found["shipped"]["searches"][way]["gain"] == 0
        assert len({row["searches"][way]["cost"] for row in found.values()}) == 1
    assert (
        found["mix-cps"]["order"] != found["shipped"]["order"]
        or found["mix-cps"]["searches"] != found["shipped"]["searches"]
    )
    assert "together" in capsys.readouterr().out


def test_your_gpu_your_prompts_no_weights_yet(tmp_path: Path, drm) -> None:
    """data make; train-reward; bench; sample --stepwise: four commands from a file of prompts to a picture."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "a large red circle on the left\na small blue square in the center\na small green triangle on the right\n"
    )
    made = drm("data", "make", prompts, "--num-images", 3, "--steps", 2, "--out", tmp_path / "mine")
    assert made.code == 0, made.err
    flags = ["--set", "shapes_prompts=4", "--set", "shapes_generated=0", "--set", "eval_pairs=6", "--batch-size", 12]
    trained = drm(
        "train-reward",
        "--data",
        f"{tmp_path / 'mine'}=0.7",
        "--data",
        "shapes=0.3",
        *flags,
        "--steps",
        2,
        "--out",
        tmp_path / "run",
    )
    assert trained.code == 0, trained.err
    reward = tmp_path / "run" / "reward"
    benched = drm("bench", "--dataset", tmp_path / "mine", "--reward", reward, "--json")
    assert benched.code == 0, benched.err
    assert benched.json["n_pairs"] == 9 - benched.json["n_ties"]
    drawn = drm(
        "sample",
        "a large red circle on the left",
        "--stepwise",
        "--beams",
        2,
        "--steps",
        2,
        "--reward",
        reward,
        "--json",
    )
    assert drawn.code == 0, drawn.err
    assert Path(drawn.json["images"][0]["path"]).is_file()
