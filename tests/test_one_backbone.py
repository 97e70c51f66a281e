"""A reward model on the generator's own base uses its weights: one copy in memory, the same results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_pipelines import PIPELINES

from drmcli.config import resolve
from drmcli.generator import Generator
from drmcli.loading import base_weights
from drmcli.policy import Policy
from drmcli.recipes import alignment
from drmcli.recipes.alignment_plan import plan
from drmcli.results import read
from drmcli.reward import RewardModel
from drmcli.sampling import Search, sample

PROMPTS = ["a large red circle above a small blue square", "a small green triangle in the center"]


@pytest.fixture(scope="module", params=["sd3", "flux"])
def base(request: pytest.FixtureRequest, generator_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "sd3":
        return generator_folder
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("flux")
    PIPELINES["flux"].build().save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["lora", "frozen"])
def saved(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model on the base, whose LoRA does something."""
    made = RewardModel.from_generator(
        str(base), backbone=request.param, drop_layers=2, head_width=8, lora_rank=2, max_sequence_length=1
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.3)
    path = tmp_path_factory.mktemp("reward")
    made.save_pretrained(path)
    return path


def own_bytes(model: RewardModel, generator: Generator) -> int:
    """Of a model's weights those that are not the generator's own."""
    lent = {t.data_ptr() for t in generator.transformer.state_dict().values()}
    return sum(t.nbytes for t in model.transformer.state_dict().values() if t.data_ptr() not in lent)


def test_the_same_from_one_copy(base: Path, saved: Path) -> None:
    generator = Generator.load(str(base), max_sequence_length=1)
    apart, shared = (RewardModel.from_pretrained(saved, beside=b) for b in (None, generator))
    loras = sum(t.nbytes for n, t in apart.transformer.state_dict().items() if ".lora_" in n)
    assert own_bytes(apart, generator) > loras and own_bytes(shared, generator) == loras

    # Each with a LoRA of its own, and gradient checkpointing for one of them.
    before = generator.transformer.state_dict().keys()
    policy = Policy(generator, lora=LoraConfig(r=2, target_modules=list(generator.family.lora_targets)), seed=0)
    with torch.no_grad():
        for parameter in policy.trained:
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    assert before < {n.replace(".base_layer.", ".") for n in generator.transformer.state_dict()}
    cond = generator.encode_prompts(PROMPTS)
    x = torch.randn(2, *generator.latent_shape(16, 16), generator=torch.Generator().manual_seed(2))
    found = []
    for model in (apart, shared):
        model.gradient_checkpointing = model is shared
        model.train(model is shared)  # blocks are computed again in the backward pass of a model that trains
        latents = x.clone().requires_grad_()
        scores = model.score(latents, 0.4, cond)
        (gradient,) = torch.autograd.grad(scores.sum(), latents)
        model.eval()
        search = Search(mode="stepwise", beams=2, num_inference_steps=3)
        drawn = sample(generator, model, cond, cond, [3, 4], search, shape=tuple(x.shape[1:])).latents
        found.append((scores.detach(), gradient, drawn, policy.velocity(x, 0.4, cond).detach()))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not generator.transformer.is_gradient_checkpointing


def test_lent_afterwards(base: Path, saved: Path) -> None:
    generator = Generator.load(str(base), max_sequence_length=1)
    model = RewardModel.from_pretrained(saved)
    cond, x = generator.encode_prompts(PROMPTS), torch.randn(2, *generator.latent_shape(16, 16))
    before, own = model.score(x, 0.4, cond), own_bytes(model, generator)
    freed = model.borrow_weights(generator.transformer)
    assert freed == own - own_bytes(model, generator) > 0
    assert torch.equal(model.score(x, 0.4, cond), before)
    assert model.borrow_weights(generator.transformer) == 0

    other = RewardModel.from_pretrained(saved)  # weights that differ stay its own
    with torch.no_grad():
        for tensor in base_weights(generator.transformer).values():
            tensor.add_(1.0)
    assert other.borrow_weights(generator.transformer) == 0


def test_other_weights_or_formats_are_loaded(generator_folder: Path, saved: Path, base: Path, tmp_path: Path) -> None:
    half = Generator.load(str(base), max_sequence_length=1, dtype=torch.bfloat16)
    assert own_bytes(model := RewardModel.from_pretrained(saved, beside=half), half) == sum(
        t.nbytes for t in model.transformer.state_dict().values()
    )
    without = Generator.load(str(base), max_sequence_length=1, components=("text", "vae"))
    assert all(not p.is_meta for p in RewardModel.from_pretrained(saved, beside=without).parameters())


def aligned(drm: Callable, base: Path, saved: Path, out: Path, *more: object) -> tuple[dict, list]:
    result = drm(
        "grpo", "--generator", base, "--reward", saved, "--updates", 1, "--steps", 3, "--judge", "none", "--lr", 0.01,
        "--set", "prompts_per_update=2", "--set", "group_size=2", "--set", "lora_rank=2", "--set", "min_std=0", "--resolution", 16,
        "--set", "eval_prompts=2", "--set", "eval_seeds=1", "--set", "max_sequence_length=1", "--set", "ema_decay=0.5",
        "--set", "kl_beta=0.1", "--set", "gradient_checkpointing=true", "--guidance-scale", 1, "--out", out, *more,
    )  # fmt: skip
    assert result.code == 0, result.err
    weights = load_file(out / "lora-last" / "pytorch_lora_weights.safetensors")
    return weights, list(read(out / "rollouts")["score"])


def test_an_update_is_the_same(
    base: Path, saved: Path, tmp_path: Path, drm: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent: list[bool] = []
    lends = Generator.lends
    monkeypatch.setattr(Generator, "lends", lambda *a: lent.append(lends(*a)) or lent[-1])
    weights, rewards = aligned(drm, base, saved, tmp_path / "one")
    assert lent == [True]
    monkeypatch.setattr(Generator, "lends", lambda *a: False)
    separate, theirs = aligned(drm, base, saved, tmp_path / "two")
    assert rewards == pytest.approx(theirs, abs=1e-5)
    assert weights.keys() == separate.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, separate[name], rtol=1e-5, atol=1e-5)
    rank = {min(t.shape) for t in weights.values()}
    assert rank == {2} and any(t.abs().max() > 1e-4 for n, t in weights.items() if "lora_B" in n)


def test_all_weights_trained_are_not_lent(generator_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    def stand_in(*args: object, beside: Generator | None, **options: object) -> None:
        raise Seen(beside)

    monkeypatch.setattr(alignment, "Rewards", stand_in)
    generator = Generator.load(str(generator_folder), max_sequence_length=1, components=())
    for train, lent in (("full", None), ("lora", generator)):
        config = resolve("grpo", flags={"train": train})
        with pytest.raises(Seen) as seen:
            alignment.load_rewards(config, generator, torch.device("cpu"), torch.float32)
        assert seen.value.args == (lent,)


def test_the_plan_counts_it_once(generator_folder: Path, tmp_path: Path) -> None:
    sizes = {}
    for backbone in ("full", "lora"):
        made = RewardModel.from_generator(str(generator_folder), backbone=backbone, head_width=8, lora_rank=2)
        made.save_pretrained(tmp_path / backbone)
        for train in ("lora", "full"):
            config = resolve("grpo", flags={"reward": str(tmp_path / backbone), "train": train})
            sizes[backbone, train] = plan(config)["memory"]["beside"]["reward model"]
    assert sizes["lora", "lora"] < sizes["full", "lora"] / 5
    assert sizes["lora", "full"] >= sizes["full", "full"]
