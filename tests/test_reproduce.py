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
    trained, *drawn = plan["experiments"]
    assert (trained["experiment"], trained["times"]) == ("train-reward", 1)  # the one that the part steers with
    assert [row["experiment"] for row in drawn] == [f"sample --stepwise --beams {k}" for k in (1, 2, 4, 6)]
    sizes = [row["memory"] for row in drawn]
    assert sizes == sorted(sizes) and 1e6 < sizes[0] < 1e9
    assert all(row["hours"] is None for row in plan["experiments"]) and "not timed" in plan["hours"]


def test_a_plan_with_hours(drm: Callable[..., Outcome]) -> None:
    """Gigabytes and hours of a part: so many alignments as are run, each twice as long with twice the updates."""
    plans = [
        drm("reproduce", "--only", "rl", "--set", f"updates={n}", "--set", "timing=on", "--dry-run", "--json").json[
            "plan"
        ]
        for n in (2, 4)
    ]
    a, b = ({row["experiment"]: row for row in plan["experiments"]} for plan in plans)
    assert {name: row["times"] for name, row in a.items()} == {
        "train-reward": 1, "grpo, flow-grpo": 3, "grpo, step-grpo": 1, "sample, of each generator": 5
    }  # fmt: skip
    assert all(row["hours"] > 0 and row["memory"] > 1e6 for row in [*a.values(), *b.values()])
    assert float(plans[0]["hours"].split()[0]) == pytest.approx(sum(row["hours"] for row in a.values()), rel=0.01)


def test_a_plan_of_the_paper(drm: Callable[..., Outcome]) -> None:
    """Without its model, data and prompts: planned from the published config, and what is missing is said."""
    plan = drm(
        "reproduce",
        "--preset",
        "paper",
        "--dry-run",
        "--json",
        "--device",
        "cpu",
        "--only",
        "rl",
        "--only",
        "sampling",
        "--set",
        "beams=[4]",
    ).json["plan"]
    found = {row["experiment"]: row for row in plan["experiments"]}
    assert plan["left out without --prompts FILE and --eval-prompts FILE"] == "rl, sampling"
    assert found["grpo, step-grpo"]["memory"] > found["sample --stepwise --beams 4"]["memory"] > 10e9


def test_diversity_is_the_mean_difference_of_pixels(tmp_path: Path) -> None:
    """Black, and white: 1 apart. Black, black and white: pairs 0, 1, 1, so 2/3."""
    for name, value in (("a", 0), ("b", 0), ("c", 255)):
        Image.fromarray(np.full((2, 2, 3), value, np.uint8)).save(tmp_path / f"{name}.png")
    rows = [{"prompt": "p", "path": str(tmp_path / f"{n}.png")} for n in "abc"]
    assert reproduce.diversity(rows[1:]) == pytest.approx(1)
    assert reproduce.diversity(rows) == pytest.approx(2 / 3)
    assert reproduce.diversity(rows[:1]) is None
