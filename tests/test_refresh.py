"""Reward models that learn on, and the reward of spread."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drmcli.config import resolve
from drmcli.errors import InputError
from drmcli.generator import Generator
from drmcli.recipes import grpo
from drmcli.refresh import Memory, continue_head
from drmcli.results import read
from drmcli.reward import RewardModel
from drmcli.rollout import distance_to_others
from drmcli.run import Silent
from drmcli.tiny import world

SMALL = {"updates": 2, "prompts_per_update": 2, "group_size": 2, "steps": 3, "lora_rank": 2, "eval_prompts": 2, "eval_seeds": 2,
         "eval_every": 0, "on_hacking": "ignore", "min_std": 0.0}  # fmt: skip


def test_the_head_learns_what_the_trusted_scorer_says(reward_folder: Path, generator_folder: Path) -> None:
    """Brighter first channels are better: the loss falls below that of a coin, and the backbone stays."""
    model = RewardModel.from_pretrained(reward_folder)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    cond = Generator.load(str(generator_folder), components=("text",), max_sequence_length=1).encode_prompts(
        list(world.captions("train"))[:4]
    )
    x = torch.randn(4, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    x[:, :, 0] += torch.tensor([-2.0, 0.0, 2.0])[None, :, None, None]
    first, last = continue_head(model, x, cond, x[:, :, 0].mean((2, 3)), steps=40, lr=1e-2, seed=0)
    assert first == pytest.approx(0.69, abs=0.1)
    assert last < 0.5
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved and all(name.startswith("head.") for name in moved)
    assert not any(p.requires_grad for p in model.parameters())


def test_what_all_fresh_samples_share_is_told_by_the_older_ones(reward_folder: Path, generator_folder: Path) -> None:
    """The policy's samples are equally bad: nothing is learned from them alone, and that they are worse from those of the start."""
    cond = Generator.load(str(generator_folder), components=("text",), max_sequence_length=1).encode_prompts(["a", "b"])
    rng = torch.Generator().manual_seed(0)
    start, now = (torch.randn(2, 3, 4, 16, 16, generator=rng) for _ in range(2))
    now[:, :, 0] += 2.0
    gaps = []
    for memory in (0, 2):
        model, kept = RewardModel.from_pretrained(reward_folder), Memory(memory)
        kept.add(start, torch.ones(2, 3))
        kept.add(now, torch.zeros(2, 3))
        latents, trusted = kept.joined()
        continue_head(model, latents, cond, trusted, steps=30, lr=1e-2, seed=0, fresh=3)
        with torch.no_grad():
            each = [
                model.score(x.flatten(0, 1), torch.zeros(6), cond[torch.arange(2).repeat_interleave(3)])
                for x in (start, now)
            ]
        gaps.append(float((each[0] - each[1]).mean()))
    assert gaps[1] > gaps[0] + 0.5


def test_memory_keeps_the_start_and_the_newest() -> None:
    kept = Memory(2)
    for i in range(5):
        kept.add(torch.full((1, 1, 1, 1, 1), float(i)), torch.full((1, 1), float(i)))
    assert kept.joined()[1].tolist() == [[0, 3, 4]]
    again = Memory(2)
    again.load(kept.tensors())
    assert again.joined()[1].tolist() == [[0, 3, 4]] and again.joined()[0].shape == (1, 3, 1, 1, 1)
    alone = Memory(0)
    alone.add(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1))
    alone.add(torch.ones(1, 1, 1, 1, 1), torch.ones(1, 1))
    assert alone.joined()[1].tolist() == [[1]]


def test_equal_scores_teach_nothing(reward_folder: Path, generator_folder: Path) -> None:
    model = RewardModel.from_pretrained(reward_folder)
    before = [p.clone() for p in model.head.parameters()]
    cond = Generator.load(str(generator_folder), components=("text",), max_sequence_length=1).encode_prompts(["a", "b"])
    continue_head(model, torch.randn(2, 2, 4, 16, 16), cond, torch.zeros(2, 2), steps=1, lr=0.0, seed=0)
    assert all(torch.equal(p, q) for p, q in zip(model.head.parameters(), before))


def test_a_run_with_refreshes(tmp_path: Path, reward_folder: Path) -> None:
    flags = SMALL | {"out": str(tmp_path / "a"), "reward": str(reward_folder), "refresh_every": 1, "refresh_by": "shapes",
                     "refresh_prompts": 2, "refresh_samples": 2, "refresh_steps": 3}  # fmt: skip
    summary = grpo.run(resolve("grpo", flags=flags), Silent())
    assert [row["refreshes"] for row in summary["history"]] == [0, 1]
    first, last = summary["history"]
    assert "judge_less_best" not in first and last["judge_less_best"] == pytest.approx(last["judge"] - first["judge"])
    evals = read(tmp_path / "a" / "evals").query("update == 2").iloc[0]
    assert (
        evals["judge_less_best_low"]
        <= evals["judge_less_best"]
        == last["judge_less_best"]
        <= evals["judge_less_best_high"]
    )
    assert "learned on" in (tmp_path / "a" / "log.txt").read_text()
    refreshed, start = (RewardModel.from_pretrained(p) for p in (tmp_path / "a" / "reward", reward_folder))
    assert any(not torch.equal(p, q) for p, q in zip(refreshed.head.parameters(), start.head.parameters()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"refresh_every": 2}, "--refresh-by"),
        ({"refresh_by": "shapes"}, "--refresh-every"),
        ({"refresh_every": 2, "refresh_by": "shapes", "judge": "none"}, "needs a judge"),
        ({"algorithm": "direct", "diversity_bonus": 1.0}, "--diversity-bonus"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, reward_folder: Path, flags: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        grpo.run(
            resolve("grpo", flags=SMALL | {"out": str(tmp_path / "a"), "reward": str(reward_folder)} | flags), Silent()
        )


def test_distance_to_others() -> None:
    """Three latents at 0, 1 and 3 in every value: mean distances 2, 1.5 and 2.5."""
    x = torch.tensor([0.0, 1.0, 3.0]).reshape(3, 1, 1, 1).expand(3, 2, 2, 2)
    assert distance_to_others(x, 3).tolist() == [[pytest.approx(2), pytest.approx(1.5), pytest.approx(2.5)]]


@pytest.mark.parametrize("algorithm", ["step-grpo", "nft"])
def test_the_bonus_is_in_the_rewards(tmp_path: Path, reward_folder: Path, algorithm: str) -> None:
    """The same samples with and without: rewards differ by no more and no less than a positive bonus."""
    scores = []
    for bonus in (0.0, 2.0):
        flags = SMALL | {
            "out": str(tmp_path / str(bonus)),
            "reward": str(reward_folder),
            "algorithm": algorithm,
            "updates": 1,
        }
        grpo.run(resolve("grpo", flags=flags | {"diversity_bonus": bonus}), Silent())
        scores.append(read(tmp_path / str(bonus) / "rollouts").query("step == step.min()")["score"].to_numpy())
    assert (scores[1] > scores[0]).all()
