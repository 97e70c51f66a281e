"""`drm reproduce`: every table of the miniature is filled, and what is missing is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Outcome
from PIL import Image

from drmcli.measure import paper
from drmcli.recipes import reproduce
from drmcli.results import read

TINY = [
    "--quiet", "--set", "train_steps=2", "--set", "bench_pairs=12", "--set", "num_prompts=2", "--set", "geneval_prompts=2",
    "--set", "updates=1", "--set", "beams=[1,2]", "--set", "sigmas=[0.0,0.75]", "--set", "resolutions=[16]",
]  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experiments of a second each: the commands' own settings made small, as a preset would."""
    from drmcli.config import resolve

    extra = {
        "train-reward": {"shapes_prompts": 8, "shapes_generated": 0.0, "eval_pairs": 12, "batch_size": 12},
        "bench": {"shapes_prompts": 8, "shapes_generated": 0.0},
        "grpo": {
            "prompts_per_update": 2,
            "group_size": 2,
            "steps": 3,
            "eval_prompts": 2,
            "eval_seeds": 1,
            "lora_rank": 2,
        },
        "sample": {"steps": 2},
    }
    monkeypatch.setattr(
        reproduce,
        "resolve",
        lambda command, *, preset, flags: resolve(command, preset=preset, flags=extra[command] | flags),
    )


def test_every_table_is_filled(drm: Callable[..., Outcome], small: None, tmp_path: Path) -> None:
    """A killed run's experiments are kept: the second start makes the same report from them."""
    result = drm("reproduce", "--out", "r", *TINY)
    assert result.code == 0, result.err
    table = read(tmp_path / "r" / "tables.parquet")
    assert set(table["table"]) == {"accuracy", "accuracy by sigma", "alignment", "GenEval", "step-wise sampling"}
    assert set(table[table["table"] == "accuracy"]["row"]) == {"pretrained", "random", "frozen", "16px"}
    assert set(table[table["table"] == "alignment"]["row"]) == set(paper.ALIGNED)
    assert set(table[table["table"] == "step-wise sampling"]["row"]) == {"k = 1", "k = 2"}
    assert table["ours"].notna().all()
    assert set(table["beware"]) == {reproduce.MINIATURE}
    report = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert "Left out" not in report
    (tmp_path / "r" / "summary.json").unlink()
    (tmp_path / "r" / "report.html").unlink()
    assert drm("reproduce", "--out", "r", *TINY).code == 0
    assert (tmp_path / "r" / "report.html").read_text(encoding="utf-8") == report


def test_what_is_missing_is_named_and_left_out(drm: Callable[..., Outcome], tmp_path: Path) -> None:
    """The paper's preset without its data, model and prompts: no figure is made up, and the reasons are told."""
    result = drm("reproduce", "--preset", "paper", "--device", "cpu", "--json", "--out", "p")
    assert result.code == 0, result.err
    assert result.json["tables"] == []
    assert {row["experiment"] for row in result.json["left_out"]} == {"train-pretrained", "rl", "sampling"}
    assert all(row["why"] for row in result.json["left_out"])


def test_a_plan(drm: Callable[..., Outcome]) -> None:
    plan = drm("reproduce", "--only", "sampling", "--dry-run", "--json").json["plan"]
    assert plan["sampling"] == "192 pictures for k = 1, 2, 4, 6"
    assert "rl" not in plan


def test_diversity_is_the_mean_difference_of_pixels(tmp_path: Path) -> None:
    """Black, and white: 1 apart. Black, black and white: pairs 0, 1, 1, so 2/3."""
    for name, value in (("a", 0), ("b", 0), ("c", 255)):
        Image.fromarray(np.full((2, 2, 3), value, np.uint8)).save(tmp_path / f"{name}.png")
    rows = [{"prompt": "p", "path": str(tmp_path / f"{n}.png")} for n in "abc"]
    assert reproduce.diversity(rows[1:]) == pytest.approx(1)
    assert reproduce.diversity(rows) == pytest.approx(2 / 3)
    assert reproduce.diversity(rows[:1]) is None
