"""train-reward: equivalences between ways to run the same training, what is saved, and what stops it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL, write_pairs
from safetensors.torch import load_file

from drmcli.config import resolve
from drmcli.data.batches import draw_sigmas
from drmcli.errors import InputError, Interrupted, RunError
from drmcli.families.base import Conditioning
from drmcli.flow import add_noise
from drmcli.losses import bradley_terry
from drmcli.memory import SavedBytes
from drmcli.recipes import learner, train_reward
from drmcli.results import read
from drmcli.reward import RewardModel
from drmcli.run import Interruptions, Silent

TINY = {
    "shapes_prompts": 10,
    "shapes_generated": 0.0,
    "eval_pairs": 12,
    "batch_size": 12,
    "head_width": 16,
    "drop_layers": 4,
    "steps": 6,
    "save_every": 2,
    "log_every": 1,
    "eval_sigmas": [0.25],
}


def config(out: Path, **flags: object):
    return resolve("train-reward", flags=TINY | {"out": str(out)} | flags)


def train(out: Path, **flags: object) -> dict:
    return train_reward.run(config(out, **flags), Silent())


def digest(out: Path) -> str:
    return hashlib.sha256((out / "reward" / "model.safetensors").read_bytes()).hexdigest()


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "reward" / "model.safetensors")


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=name)


class InterruptAfter(Silent):
    """Sends this process SIGTERM once a step is reached."""

    def __init__(self, step: int):
        self.step = step

    def progress(self, task: str, done: int, total: int, **fields: object) -> None:
        if task == "train" and done == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("extra", [{}, {"ema_decay": 0.9, "warmup_steps": 3}, {"backbone": "lora", "lora_rank": 4}])
def test_resumed_is_unbroken_bit_for_bit(tmp_path: Path, extra: dict) -> None:
    train(tmp_path / "whole", **extra)
    for step in (1, 3):
        with pytest.raises(Interrupted) as stopped:
            train_reward.run(config(tmp_path / "parts", **extra), InterruptAfter(step))
        assert stopped.value.exit_code == 130
        assert not (tmp_path / "parts" / "summary.json").exists()
    train(tmp_path / "parts", **extra)
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")
    for table in ("metrics", "evals"):
        steps = read(tmp_path / "parts" / table)["step"].tolist()
        assert steps == read(tmp_path / "whole" / table)["step"].tolist()
    assert (
        read(tmp_path / "parts" / "metrics")["loss"].tolist() == read(tmp_path / "whole" / "metrics")["loss"].tolist()
    )


def test_killed_is_unbroken_bit_for_bit(tmp_path: Path) -> None:
    """SIGKILL leaves no time to save: the run goes on from the newest complete checkpoint."""
    train(tmp_path / "whole", steps=12)
    command = [sys.executable, "-m", "drmcli", "train-reward", "--out", str(tmp_path / "parts"), "--quiet"]
    for key, value in (TINY | {"steps": 12}).items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "parts" / "checkpoints"
    deadline = time.monotonic() + 120
    while not any(checkpoints.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "parts" / "summary.json").exists(), "it was done before the blow"
    train(tmp_path / "parts", steps=12)
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


def test_accumulation_is_one_batch(tmp_path: Path) -> None:
    """4 x 3 pairs and 1 x 12 give the same gradients but for rounding; AdamW turns 1e-8 into at most 2 lr a step."""
    train(tmp_path / "one", steps=3, lr=1e-5, head_lr=1e-5)
    train(tmp_path / "four", steps=3, lr=1e-5, head_lr=1e-5, micro_batch_size=3)
    a, b = read(tmp_path / "one" / "metrics"), read(tmp_path / "four" / "metrics")
    assert a["loss"].tolist() == pytest.approx(b["loss"].tolist(), abs=1e-5)
    assert a["grad_norm"].tolist() == pytest.approx(b["grad_norm"].tolist(), rel=1e-3)
    assert_close(weights(tmp_path / "one"), weights(tmp_path / "four"), atol=1e-4)


def test_lora_saves_what_was_trained(tmp_path: Path, generator_folder: Path) -> None:
    train(tmp_path, backbone="lora", lora_rank=4)
    saved = weights(tmp_path)
    assert all(name.startswith("head.") or ".lora_" in name for name in saved)
    assert sum(t.numel() for n, t in saved.items() if ".lora_B" in n and t.abs().max() > 0) > 0
    assert sum(t.numel() for t in saved.values()) < 60_000
    whole = RewardModel.from_generator(str(generator_folder), drop_layers=4, head_width=16).transformer.state_dict()
    loaded = RewardModel.from_pretrained(tmp_path / "reward").transformer.state_dict()
    name = "transformer_blocks.0.attn.to_q"
    torch.testing.assert_close(loaded[f"{name}.base_layer.weight"], whole[f"{name}.weight"])


def test_frozen_backbone_only_trains_the_head(tmp_path: Path) -> None:
    train(tmp_path, backbone="frozen")
    assert all(name.startswith("head.") for name in weights(tmp_path))


def test_ema_is_what_is_saved(tmp_path: Path) -> None:
    """With a decay near 1 the average stays near the start, so it must differ from the last weights."""
    train(tmp_path / "plain")
    train(tmp_path / "averaged", ema_decay=0.99)
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "averaged")
    assert max((a[n] - b[n]).abs().max().item() for n in a) > 1e-4


@pytest.mark.parametrize(
    "flags", [{"loss": "thurstone"}, {"margin": 0.5}, {"shared_noise": False}, {"sigma_density": "logit-normal"}]
)
def test_options_change_the_training(tmp_path: Path, flags: dict) -> None:
    train(tmp_path / "plain", steps=2)
    train(tmp_path / "other", steps=2, **flags)
    a, b = read(tmp_path / "plain" / "metrics")["loss"], read(tmp_path / "other" / "metrics")["loss"]
    assert (a - b).abs().max() > 1e-6


def test_sigma_range_is_kept(tmp_path: Path) -> None:
    for density in ("uniform", "logit-normal"):
        c = config(tmp_path, sigma_density=density, sigma_min=0.2, sigma_max=0.6)
        drawn = draw_sigmas(c, 500, torch.Generator().manual_seed(0))
        assert 0.2 <= drawn.min() < 0.3
        assert 0.5 < drawn.max() <= 0.6
    assert draw_sigmas(config(tmp_path, sigma_density="fixed", sigma_max=0.4), 3, torch.Generator()).tolist() == (
        pytest.approx([0.4] * 3)
    )


def test_own_pairs_with_ties_and_weights(tmp_path: Path) -> None:
    """A pair of weight 0 has no say: the file with and without it trains the same model."""
    label = [1.0] * 10 + [0.5, 1.0]
    with_it = write_pairs(tmp_path / "a", 12, label=label, weight=[1.0] * 11 + [0.0])
    lines = with_it.read_text().splitlines()
    without = with_it.with_name("less.jsonl")
    without.write_text("\n".join(lines[:11]) + "\n")
    flags = {"eval_data": [str(with_it)], "batch_size": 11, "steps": 2}
    train(tmp_path / "with", data=[str(with_it)], **flags)
    train(tmp_path / "without", data=[str(without)], **flags)
    assert digest(tmp_path / "with") == digest(tmp_path / "without")


def test_live_prompts_train_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded for each batch or kept: the weights differ by rounding alone. And without a cache nothing is left of one."""
    monkeypatch.setenv("DRM_CACHE", str(tmp_path / "cache"))
    slow = {"steps": 2, "lr": 1e-5, "head_lr": 1e-5}
    train(tmp_path / "live", **slow, prompt_cache="live", no_cache=True)
    assert not (tmp_path / "cache").exists()
    train(tmp_path / "disk", **slow)
    assert_close(weights(tmp_path / "disk"), weights(tmp_path / "live"), atol=1e-4)
    assert read(tmp_path / "disk" / "metrics")["loss"].tolist() == pytest.approx(
        read(tmp_path / "live" / "metrics")["loss"].tolist(), abs=1e-5
    )


def test_the_plan_counts_the_data(tmp_path: Path) -> None:
    """Pairs, prompts, pictures, and what their cache takes; a batch that does not split is refused before anything is read."""
    file = write_pairs(tmp_path / "a", 5)
    plan = train_reward.plan(config(tmp_path / "run", data=["shapes=1", f"{file}=1"]))
    assert (plan["pairs, at most"], plan["prompts"], plan["pictures"]) == (10 * 6 + 5, 15, 50)
    assert plan["cache of pictures, GB"] == round(50 * 4 * 16 * 16 * 4 / 1e9, 3)
    assert plan["prompts are"] == "disk"
    with pytest.raises(InputError, match="micro-batches of 5"):
        train_reward.plan(config(tmp_path / "run", micro_batch_size=5))


def test_nothing_to_learn_from_is_said_with_the_reason(tmp_path: Path) -> None:
    ties = write_pairs(tmp_path / "a", 4, label=[0.5] * 4, weight=[0.0] * 4)
    with pytest.raises(InputError, match="have the weight 0"):
        train(tmp_path / "run", data=[str(ties)])


def test_mixing_takes_the_asked_shares(tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "a", 12)
    c = config(tmp_path / "run", data=["shapes=3", f"{file}=1"], steps=1)
    train_reward.run(c, Silent())
    seen = []
    original = train_reward.Batches.global_batch

    def spy(self: train_reward.Batches, step: int) -> list[tuple[int, int]]:
        seen.append(original(self, step))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_reward.Batches, "global_batch", spy)
        train_reward.run(config(tmp_path / "again", data=["shapes=3", f"{file}=1"], steps=1), Silent())
    assert [sum(i == k for i, _ in seen[0]) for k in (0, 1)] == [9, 3]


def test_loss_that_is_not_finite_names_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        return bradley_terry(*args, **kwargs) * (float("nan") if len(calls) == 3 else 1)  # type: ignore[arg-type]

    monkeypatch.setattr(learner, "bradley_terry", broken)
    with pytest.raises(RunError, match="step 2: the loss is not finite"):
        train(tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == ["step-000002"]


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six checkpoints; the evaluation after step 2 is the best; two newest are kept beside it."""
    values = iter([90.0, 50.0, 60.0, 70.0, 40.0, 30.0])
    monkeypatch.setattr(train_reward, "headline_accuracy", lambda *_: next(values))
    train(tmp_path, save_every=1, eval_every=1, keep_checkpoints=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == [
        "step-000001",
        "step-000005",
        "step-000006",
    ]


def test_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = train(tmp_path)
    before = (tmp_path / "reward" / "model.safetensors").stat().st_mtime_ns
    assert train(tmp_path) == first
    assert (tmp_path / "reward" / "model.safetensors").stat().st_mtime_ns == before


def test_unfinished_run_is_found_without_out(tmp_path: Path, drm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command, typed again without --out, goes on in the folder that it began."""
    flags = [*SMALL, "--steps", "3", "--save-every", "1"]
    enter = Interruptions.__enter__

    def asked(self: Interruptions) -> Interruptions:
        entered = enter(self)
        entered.asked = True
        return entered

    with monkeypatch.context() as patch:
        patch.setattr(Interruptions, "__enter__", asked)
        stopped = drm("train-reward", *flags)
    assert stopped.code == 130
    assert "step 1 of 3 is saved" in stopped.err
    result = drm("train-reward", *flags)
    assert result.code == 0, result.err
    assert "going on with the unfinished run" in result.err
    assert len(list(Path("runs").iterdir())) == 1


def test_every_trained_weight_gets_a_gradient(generator_folder: Path) -> None:
    """Several processes wait for every gradient: one that never comes would hang them."""
    for settings in (
        {"backbone": "full"},
        {"backbone": "lora", "lora_rank": 4},
        {"backbone": "full", "tap_layers": [0, 2]},
    ):
        model = RewardModel.from_generator(str(generator_folder), drop_layers=3, head_width=16, **settings).train()
        model.score(torch.randn(2, 4, 16, 16), torch.tensor([0.1, 0.9]), cond(2)).sum().backward()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []


def cond(batch: int) -> Conditioning:
    rng = torch.Generator().manual_seed(1)
    embeds, pooled = torch.randn(batch, 17, 128, generator=rng), torch.randn(batch, 128, generator=rng)
    return Conditioning(prompt_embeds=embeds, pooled_prompt_embeds=pooled)


def test_gradient_checkpointing_gives_the_same_gradients(generator_folder: Path) -> None:
    model = RewardModel.from_generator(str(generator_folder), drop_layers=3, head_width=16).train()
    grads = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model.score(torch.ones(2, 4, 16, 16), 0.5, cond(2)).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("flags", [{"backbone": "full"}, {"backbone": "lora", "lora_rank": 8, "ema_decay": 0.9}])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_memory_plan_is_what_a_step_uses(
    tmp_path: Path, flags: dict, checkpointed: bool, generator_folder: Path
) -> None:
    """Bytes of real weights, gradients, AdamW moments and tensors kept for the backward pass, against the plan from the config."""
    c = config(tmp_path, **flags, gradient_checkpointing=checkpointed, batch_size=24)
    memory = train_reward.plan(c)["memory"]
    model = train_reward.make_model(c).train()
    model.gradient_checkpointing = checkpointed
    images = train_reward.pictures_in(c, 24)
    latents = add_noise(torch.randn(images, 4, 16, 16), torch.randn(images, 4, 16, 16), 0.5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with SavedBytes(model) as kept:
        score = model.score(latents, 0.5, cond(images))
    activations = kept.total
    score.sum().backward()
    optimizer.step()

    def size(tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    trained = [p for p in model.parameters() if p.requires_grad]
    used = size(model.parameters()) + size(model.buffers()) + size(p.grad for p in trained if p.grad is not None)
    used += size(t for s in optimizer.state.values() for t in s.values()) + (size(trained) if c.ema_decay else 0)
    if checkpointed:  # one block's activations live again while it is recomputed
        with torch.enable_grad(), SavedBytes(model) as block:
            hidden = torch.randn(images, 64, 64, requires_grad=True)
            model.transformer.transformer_blocks[0](
                hidden_states=hidden,
                encoder_hidden_states=torch.randn(images, 17, 64, requires_grad=True),
                temb=torch.randn(images, 64),
            )
        activations += block.total
    planned = memory["total_checkpointed"] if checkpointed else memory["total"]
    assert planned == pytest.approx(used + activations, rel=0.2)


def test_learns_from_the_embedded_world(tmp_path: Path) -> None:
    """60 small steps are enough to be clearly above chance (50 %) on held-out captions."""
    summary = train(
        tmp_path,
        steps=60,
        shapes_prompts=150,
        batch_size=48,
        eval_pairs=200,
        drop_layers=2,
        head_width=64,
        save_every=0,
    )
    assert summary["eval_accuracy"] > 60
