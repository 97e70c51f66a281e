"""Hours in the plan of --dry-run, timed on the CPU with the embedded model's shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from drmcli.config import resolve
from drmcli.memory import blank_states
from drmcli.recipes import bench, grpo, hours, sample, score, timing, train_reward
from drmcli.recipes.alignment_plan import velocities, work
from drmcli.recipes.plan import describe_generator
from drmcli.run import Silent

CAPTION = "a large red circle above a small blue square"


def rows_of(plan: dict) -> dict[str, dict]:
    """By their names; the total is their sum, and each is its count times its seconds."""
    found = plan["hours"]
    assert found["timed_on"] == "the CPU with random weights"
    assert found["total"] == pytest.approx(sum(row["hours"] for row in found["rows"]))
    for row in found["rows"]:
        assert row["seconds_each"] > 0 and row["hours"] == pytest.approx(row["count"] * row["seconds_each"] / 3600), row
    return {row["what"]: row for row in found["rows"]}


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """All work is done, and said to take a second."""

    def second(work: Callable[[], object], device: torch.device) -> float:
        work()
        return 1.0

    monkeypatch.setattr(timing, "seconds", second)


def test_training_is_timed_and_counted(drm: Callable) -> None:
    """Two micro-batches a step; evaluations after each third step but the last, and at the end, of two pictures a pair."""
    flags = ["--data", "shapes", "--set", "shapes_prompts=10", "--set", "batch_size=8", "--set", "micro_batch_size=4", "--steps", 9,
             "--set", "eval_every=3", "--set", "eval_pairs=5", "--set", "eval_sigmas=[0,0.5]", "--dry-run"]  # fmt: skip
    rows = rows_of(drm("train-reward", *flags, "--set", "timing=on", "--json").json["plan"])
    counts = {name: row["count"] for name, row in rows.items()}
    assert counts == {"steps": 9, "pictures encoded": 40, "prompts encoded": 10, "scores of evaluations": 3 * 2 * 5 * 2}
    shown = drm("train-reward", *flags, "--set", "timing=on").out
    assert "hours, timed on the CPU with random weights" in shown and "steps" in shown


@pytest.mark.parametrize("backbone", ["lora", "full", "head"])
def test_twice_the_steps_are_twice_the_hours(steady: None, backbone: str) -> None:
    made = []
    for steps in (100, 200):
        flags = {"timing": "on", "steps": steps, "backbone": backbone, "batch_size": 12, "micro_batch_size": 2}
        made.append(rows_of(train_reward.plan(resolve("train-reward", flags=flags)))["steps"]["hours"])
    # Four of the six micro-batches take the second.
    assert made == [pytest.approx(100 * 1.5 / 3600), pytest.approx(200 * 1.5 / 3600)]


def test_without_a_gpu_a_line_says_how_to_ask(drm: Callable) -> None:
    assert "hours: not timed, no GPU (ask with --set timing=on)" in drm("train-reward", "--dry-run").out
    assert "hours" not in drm("grpo", "--dry-run", "--json", "--set", "timing=off").json["plan"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory on the CPU"),
        (MemoryError(), "out of memory on the CPU"),
    ],
)
def test_too_little_memory_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, drm: Callable, error: Exception, line: str
) -> None:
    def fail(*args: object) -> float:
        raise error

    monkeypatch.setattr(timing, "seconds", fail)
    plan = drm("train-reward", "--dry-run", "--json", "--set", "timing=on")
    assert plan.code == 0 and line in plan.json["plan"]["hours"]
    assert plan.json["plan"]["memory"]["total"] > 0


@pytest.mark.parametrize(
    "flags",
    [
        {"algorithm": "step-grpo"},
        {"algorithm": "step-grpo", "score_at": "clean"},
        {"algorithm": "step-grpo", "diversity_bonus": 0.1},
        {"algorithm": "tempflow"},
        {"algorithm": "flow-grpo"},
        {"algorithm": "nft"},
        {"algorithm": "nft-step", "score_at": "clean"},
        {"algorithm": "direct", "direct_steps": 2},
    ],
    ids=lambda flags: "-".join(map(str, flags.values())),
)
def test_velocities_of_an_update_are_those_that_a_run_counts(tmp_path: Path, flags: dict) -> None:
    """The run counts what draws, with a gradient or not; passes of other policies in the loss it does not."""
    small = {
        "prompts_per_update": 2,
        "group_size": 3,
        "steps": 4,
        "updates": 1,
        "eval_prompts": 1,
        "eval_seeds": 1,
        "judge": "none",
    }
    config = resolve("grpo", flags=small | flags | {"kl_beta": 0.0, "out": str(tmp_path / "run")})
    summary = grpo.run(config, Silent())
    _, states, rewards = work(config)
    others = states if config.algorithm.startswith("nft") else 0
    with_gradient = states if config.algorithm == "direct" else 0
    assert summary["generator_calls"] == velocities(config) - others + with_gradient
    assert summary["reward_calls"] == rewards
    config.kl_beta = 0.1
    assert summary["generator_calls"] == velocities(config) - others - states + with_gradient


@pytest.mark.parametrize("train", ["lora", "full"])
def test_alignment_is_timed(steady: None, train: str) -> None:
    """Three updates of a second for each velocity, reward, state and optimizer step; looks at the start, after two and at the end."""
    flags = {"timing": "on", "train": train, "updates": 3, "prompts_per_update": 2, "group_size": 3, "steps": 4, "kl_beta": 0.0,
             "eval_every": 2, "eval_prompts": 5, "eval_seeds": 2, "judge": "none", "micro_batch_size": 1, "max_batch": 1}  # fmt: skip
    config = resolve("grpo", flags=flags)
    rows = rows_of(grpo.plan(config))
    _, states, rewards = work(config)
    assert rows["updates: drawing"]["hours"] == pytest.approx(3 * 4 * 2 / 3600)
    assert rows["updates: rewards"]["hours"] == pytest.approx(3 * rewards / 3600)
    assert rows["updates: learning"]["hours"] == pytest.approx(3 * (states + 1) / 3600)
    assert rows["pictures of evaluations"]["count"] == 2 * 5 * (3 + 2)
    assert rows["pictures of evaluations"]["seconds_each"] == 4 + 1 + 1


def test_using_is_timed(tmp_path: Path, steady: None, reward_folder: Path) -> None:
    """Bench, score and sample: passes as they are counted elsewhere in the plan."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    shared = {"timing": "on", "reward": str(reward_folder)}
    flags = shared | {"dataset": "shapes", "pairs": 10, "sigmas": [0.0, 0.5], "noise_samples": 3, "scorers": ["shapes"]}
    plan = bench.plan(resolve("bench", flags=flags))
    assert rows_of(plan)[f"scores of {reward_folder}"]["count"] == plan["pictures"] * (1 + 3)
    assert plan["hours"]["not_timed"] == ["shapes"]
    flags = shared | {
        "images": [str(tmp_path / "a.png")] * 3,
        "prompts": [CAPTION],
        "sigmas": [0.5],
        "noise_samples": 2,
    }
    assert rows_of(score.plan(resolve("score", flags=flags)))["scores"]["count"] == 6
    flags = shared | {
        "prompts": [CAPTION],
        "num_images": 2,
        "mode": "stepwise",
        "beams": 2,
        "steps": 4,
        "guidance_scale": 3.0,
    }
    plan = sample.plan(resolve("sample", flags=flags))
    rows = rows_of(plan)
    assert rows["forward passes"]["count"] == 2 * plan["generator calls a picture, about"] == 2 * 8
    assert rows["scores of the reward model"]["count"] == 2 * plan["scores a picture, about"]
    assert rows["pictures decoded"]["count"] == 2


def test_random_weights_have_a_number_format_and_finite_passes() -> None:
    """What learns is in float32, what does not is not; nothing is left without a value."""
    known = describe_generator(resolve("train-reward"))
    model = timing.random_denoiser(known, torch.bfloat16, torch.device("cpu"))
    assert all(p.dtype == torch.bfloat16 and not p.is_meta and bool(p.isfinite().all()) for p in model.parameters())
    state = blank_states(known.family, known.transformer, 2, (4, 4), known.prompt_tokens)
    with torch.no_grad():
        found = timing.velocity(known.family, model, state)
    assert found.shape == state[0].shape and bool(found.isfinite().all())
    assert hours.passes([0.0, 0.5, 1.0], 4) == 9
