"""Every family against its own pipeline, on a tiny random one: velocities, schedules, features, gradients, LoRAs, and all commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_lumina2
import tiny_qwen_image
import tiny_sana
import tiny_z_image
import torch
from safetensors.torch import load_file
from tiny_pipelines import PIPELINES, Tiny, packed
from torch import Tensor

from drmcli.errors import InputError
from drmcli.families.base import Conditioning, joined, rows_of
from drmcli.footprint import alive_in, bytes_of, generator_pass, reward_pass, text_pass, vae_passes
from drmcli.generator import Generator
from drmcli.memory import SavedBytes, plan_training
from drmcli.recipes.plan import describe
from drmcli.reward import RewardModel
from drmcli.sampling import Search, sample
from drmcli.scheduler import StepwiseScheduler

PIPELINES = PIPELINES | {
    "qwen_image": tiny_qwen_image.TINY,
    "z_image": tiny_z_image.TINY,
    "sana": tiny_sana.TINY,
    "lumina2": tiny_lumina2.TINY,
}
PROMPTS = ["a red circle", "a large blue square at the top"]


@pytest.fixture(scope="module", params=PIPELINES)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return PIPELINES[request.param]


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pipeline")
    tiny.build().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def generator(tiny: Tiny, folder: Path) -> Generator:
    return Generator.load(str(folder), max_sequence_length=tiny.length)


def reward_on(folder: Path, tiny: Tiny, **settings: Any) -> RewardModel:
    options = {"drop_layers": 1, "head_width": 8, "max_sequence_length": tiny.length} | settings
    return RewardModel.from_generator(str(folder), **options)


def states(generator: Generator, tiny: Tiny) -> tuple[Tensor, Tensor, Conditioning]:
    shape = generator.latent_shape(*tiny.size)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.3, 0.8]), generator.encode_prompts(PROMPTS)


def pipeline_run(generator: Generator, tiny: Tiny, steps: int, guided: bool) -> tuple[list, Tensor]:
    """What the stock pipeline's steps saw and said, (velocity, time, latents) each, and its latents at the end."""
    pipe, seen = generator.pipe, []
    step = pipe.scheduler.step

    def spy(output: Tensor, time: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((output.clone(), time, x.clone()))
        return step(output, time, x, *args, **kwargs)

    pipe.scheduler.step = spy
    try:
        height, width = tiny.size
        out = pipe(
            prompt=PROMPTS[0], height=height, width=width, num_inference_steps=steps, output_type="latent",
            generator=torch.Generator().manual_seed(5), **tiny.call, **(tiny.guided if guided else tiny.plain),
        )  # fmt: skip
    finally:
        pipe.scheduler.step = step
    return seen, out.images


@pytest.mark.parametrize("guided", [False, True])
def test_velocity_and_schedule_are_the_pipelines(generator: Generator, tiny: Tiny, guided: bool) -> None:
    """At each of 3 steps the velocity is what the pipeline hands its scheduler, and the ODE ends at its latents within 1e-4."""
    seen, end = pipeline_run(generator, tiny, 3, guided)
    shape = generator.latent_shape(*tiny.size)
    size = shape[1], shape[2]
    scale = tiny.scales[guided]
    cond, negative = generator.encode_prompts(PROMPTS[:1]), generator.encode_negative("", scale)
    sigmas = generator.sigmas(3, size)
    for (output, _, x), sigma in zip(seen, sigmas):
        level = float(sigma)
        state = tiny.state(x, size, level) if tiny.state else tiny.canonical(x, size)
        theirs = tiny.velocity(output, state, level) if tiny.velocity else tiny.canonical(output, size)
        mine = generator.velocity(state, level, cond, negative, scale)
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    search = Search(num_inference_steps=3, guidance_scale=scale, step_rule="ode")
    drawn = sample(generator, None, cond, None, [5], search, negative=negative, shape=shape)
    torch.testing.assert_close(drawn.latents, tiny.canonical(end, size), atol=1e-4, rtol=1e-4)


def test_a_second_pass_beside_guidance_that_is_an_input(generator: Generator, tiny: Tiny) -> None:
    """FLUX.1 with `true_cfg_scale` and a negative prompt; others say that there is none."""
    if generator.family.name != "flux":
        with pytest.raises(InputError, match="--true-cfg-scale: this generator takes no second pass"):
            generator.family.with_true_cfg(2.0)
        return
    with pytest.raises(InputError, match="--negative-prompt: --guidance-scale 3 makes no second pass"):
        generator.encode_negative(PROMPTS[1], 3.0)
    both = {"guidance_scale": 3.0, "true_cfg_scale": 2.5, "negative_prompt": PROMPTS[1]}
    seen, end = pipeline_run(generator, replace(tiny, guided=both), 3, True)
    other = Generator(generator.pipe, generator.ref, revision=None, max_sequence_length=tiny.length)
    other.family = generator.family.with_true_cfg(2.5)
    shape = other.latent_shape(*tiny.size)
    cond, negative = other.encode_prompts(PROMPTS[:1]), other.encode_negative(PROMPTS[1], 3.0)
    output, _, x = seen[0]
    mine = other.velocity(packed(x, shape[1:]), 1.0, cond, negative, 3.0)
    torch.testing.assert_close(mine, packed(output, shape[1:]), atol=1e-4, rtol=1e-4)
    assert (mine - generator.velocity(packed(x, shape[1:]), 1.0, cond, None, 3.0)).abs().max() > 1e-3
    search = Search(num_inference_steps=3, guidance_scale=3.0, step_rule="ode")
    drawn = sample(other, None, cond, None, [5], search, negative=negative, shape=shape)
    torch.testing.assert_close(drawn.latents, packed(end, shape[1:]), atol=1e-4, rtol=1e-4)
    assert drawn.calls.generator == 2 * 3


def test_guidance_and_prompts_matter(generator: Generator, tiny: Tiny) -> None:
    """Else the test above would hold for a family that ignores them."""
    x, sigma, cond = states(generator, tiny)
    plain, scale = tiny.scales
    v = generator.velocity(x, sigma, cond, generator.encode_negative("", plain), plain)
    guided = generator.velocity(x, sigma, cond, generator.encode_negative("", scale), scale)
    assert (v - guided).abs().max() > 1e-4
    assert (v - generator.velocity(x, sigma, cond[[1, 0]], None, plain)).abs().max() > 1e-4


def test_a_row_does_not_depend_on_its_batch(generator: Generator, tiny: Tiny) -> None:
    x, sigma, cond = states(generator, tiny)
    whole = generator.velocity(x, sigma, cond)
    for i in range(2):
        alone = generator.velocity(x[i : i + 1], sigma[i : i + 1], generator.encode_prompts(PROMPTS[i : i + 1]))
        torch.testing.assert_close(whole[i : i + 1], alone, atol=2e-5, rtol=1e-4)


def test_pictures_come_back(generator: Generator, tiny: Tiny) -> None:
    """Decoding is the inverse of encoding's scaling: the VAE's own mode, decoded, is the same picture."""
    pixels = torch.rand(1, 3, *tiny.size, generator=torch.Generator().manual_seed(2)) * 2 - 1
    latents = generator.family.encode_images(generator.pipe, pixels)
    assert latents.shape[1:] == generator.latent_shape(*tiny.size)
    direct = tiny.through_vae(generator.pipe, pixels)
    torch.testing.assert_close(generator.family.decode(generator.pipe, latents), direct, atol=1e-4, rtol=1e-4)


def test_a_pixel_moves_its_own_token(generator: Generator, folder: Path, tiny: Tiny) -> None:
    """Of the first block's tokens the one whose place in the grid is the pixel's changes most."""
    depth = generator.family.depth(generator.model_config)
    model = reward_on(folder, tiny, drop_layers=depth - 1)
    x, sigma, cond = states(generator, tiny)
    patch = generator.family.patch(generator.model_config)
    h, w = generator.family.grid(generator.model_config, (x.shape[2], x.shape[3]))
    for row, column in ((0, 1), (h - 1, 0), (1, w - 1)):
        moved = x.clone()
        moved[:, :, row * patch, column * patch] += 3
        change = model.features(moved, sigma, cond)[0] - model.features(x, sigma, cond)[0]
        assert change.shape[1] == h * w
        assert (
            int(change.norm(dim=-1).sum(0).argmax()) == row * w + column
        )  # over both states: convolutions move neighbours too


def test_every_cut_is_the_whole_models_block(generator: Generator, folder: Path, tiny: Tiny) -> None:
    x, sigma, cond = states(generator, tiny)
    family, whole = generator.family, generator.transformer
    depth = family.depth(generator.model_config)
    heard: dict[int, Any] = {}
    hooks = [
        block.register_forward_hook(lambda m, a, out, i=i: heard.update({i: out}))
        for i, block in enumerate(family.blocks(whole))
    ]
    model = reward_on(folder, tiny, drop_layers=1, tap_layers=list(range(depth - 1)))
    v = model.family.inputs(whole, x, sigma, cond, model.guidance)
    whole(**v, return_dict=False)
    for hook in hooks:
        hook.remove()
    grid = family.grid(generator.model_config, (x.shape[2], x.shape[3]))
    for keep in range(1, depth):
        model = reward_on(folder, tiny, drop_layers=depth - keep, tap_layers=list(range(keep)))
        for i, tokens in enumerate(model.features(x, sigma, cond)):
            torch.testing.assert_close(tokens, family.tokens(heard[i], v, grid), atol=1e-5, rtol=1e-5)


def test_gradients_with_and_without_checkpointing(folder: Path, generator: Generator, tiny: Tiny) -> None:
    x, sigma, cond = states(generator, tiny)
    model = reward_on(folder, tiny, backbone="lora", lora_rank=2, tap_layers=[0, 1]).train()
    found = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model.score(x, sigma, cond).sum().backward()
        lost = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert lost == []
        found.append([p.grad.clone() for n, p in model.named_parameters() if p.requires_grad])
    assert any(g.abs().max() > 0 for g in found[0])
    loras = [p.grad.abs().max() for n, p in model.named_parameters() if "lora_B" in n and p.grad is not None]
    assert max(loras) > 0
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", ["full", "lora"])
def test_saved_and_loaded_scores_are_equal(
    folder: Path, generator: Generator, tiny: Tiny, tmp_path: Path, backbone: str
) -> None:
    x, sigma, cond = states(generator, tiny)
    model = reward_on(folder, tiny, backbone=backbone, lora_rank=2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["family"] == generator.family.name
    again = RewardModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again.score(x, sigma, cond), model.score(x, sigma, cond), atol=1e-6, rtol=1e-6)


def test_going_on_from_any_block(generator: Generator, folder: Path, tiny: Tiny) -> None:
    family = generator.family
    if not family.shares_blocks:
        pytest.skip("this family's blocks do not go on")
    x, sigma, cond = states(generator, tiny)
    scale = tiny.scales[0]
    whole = generator.velocity(x, sigma, cond, None, scale)
    depth = family.depth(generator.model_config)
    for keep in range(1, depth):
        model = reward_on(folder, tiny, drop_layers=depth - keep, backbone="frozen", guidance=scale)
        model.share_blocks(generator)
        parts: list[Any] = []
        for i in range(2):
            model.score(x[i : i + 1], sigma[i : i + 1], cond[i : i + 1], states=parts)
        for rows in torch.tensor([1, 0]), torch.tensor([0]):  # the first prompt is the shorter one
            known = rows_of(joined(parts), rows)
            v = generator.velocity_from(known, keep, x[rows], sigma[rows], cond[rows], scale)
            torch.testing.assert_close(v, whole[rows], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(generator.velocity(x, sigma, cond, None, scale), whole)


def test_the_scheduler_in_the_stock_pipeline(
    folder: Path, generator: Generator, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step-wise search by the stock pipeline is that of drm; a pipeline whose scheduler cannot be swapped is told so."""
    reward, pipe, (height, width) = reward_on(folder, tiny), generator.pipe, tiny.size
    make = partial(StepwiseScheduler.from_pipe, pipe, reward, prompt=PROMPTS[0], beams=2, seed=5)
    if not generator.family.steps_in_scheduler:
        with pytest.raises(InputError, match="StepwiseScheduler: .* does not take"):
            make()
        return
    search = Search(num_inference_steps=3, guidance_scale=tiny.scales[0], mode="stepwise", beams=2)
    cond = generator.encode_prompts(PROMPTS[:1])
    ours = sample(generator, reward, cond, cond, [5], search, shape=generator.latent_shape(*tiny.size))
    monkeypatch.setattr(pipe, "scheduler", make())
    theirs = pipe(
        PROMPTS[0], height=height, width=width, num_inference_steps=3, output_type="latent",
        generator=torch.Generator().manual_seed(5), **tiny.call, **tiny.plain,
    ).images  # fmt: skip
    torch.testing.assert_close(tiny.canonical(theirs, ours.latents.shape[2:]), ours.latents, atol=1e-4, rtol=1e-4)


def test_the_memory_plan_is_what_a_step_keeps(generator: Generator, folder: Path, tiny: Tiny) -> None:
    """Bytes that real tensors keep for the backward pass, against the plan from the config. Two prompts of one length, as planned."""
    model = reward_on(folder, tiny, backbone="lora", lora_rank=2).train()
    cond = generator.encode_prompts(PROMPTS[:1] * 2)
    side, channels = 8, generator.family.channels(generator.model_config)
    tokens = cond.prompt_embeds.shape[1]
    planned = plan_training(model.config, images=2, latent_side=side, tokens=tokens, mixed=torch.float32, ema=False)
    with SavedBytes(model) as kept:
        model.score(torch.randn(2, channels, side, side), torch.tensor([0.3, 0.8]), cond)
    assert planned.activations == pytest.approx(kept.total, rel=0.05)


def test_the_footprint_is_what_passes_use(folder: Path, tiny: Tiny) -> None:
    """Bytes that are alive at once in real passes, and real weights, against what is counted from the configs.

    In a generator that has not been used: some denoisers keep the positions of their first pass.
    """
    generator = Generator.load(str(folder), max_sequence_length=tiny.length)
    pipe, family, config = generator.pipe, generator.family, generator.model_config
    cond = generator.encode_prompts(PROMPTS[:1] * 2)
    channels = family.channels(config)
    shared = {"count": 2, "size": (8, 8), "tokens": cond.prompt_embeds.shape[1], "dtype": torch.float32}
    latents, sigma = torch.randn(2, channels, 8, 8), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        used = bytes_of(generator.transformer), alive_in(lambda: generator.velocity(latents, sigma, cond))
        assert generator_pass(family, config, **shared) == pytest.approx(used, rel=0.01)
        model = reward_on(folder, tiny)
        used = bytes_of(model), alive_in(lambda: model.score(latents, sigma, cond))
        assert reward_pass(model.config, **shared) == pytest.approx(used, rel=0.01)
        known = describe(str(folder), None, tiny.length)
        parts = known.parts(torch.float32)
        assert {n: bytes_of(p) for n, p in parts.items()} == {n: bytes_of(getattr(pipe, n)) for n in parts}
        planned = vae_passes(family, parts["vae"], channels, encode=2, decode=2, size=(8, 8), factor=known.vae_factor)
        side = 8 * known.vae_factor
        assert planned["decode pictures"] == pytest.approx(alive_in(lambda: family.decode(pipe, latents)), rel=0.01)
        used = alive_in(lambda: family.encode_images(pipe, torch.randn(2, 3, side, side)))
        assert planned["encode pictures"] == pytest.approx(used, rel=0.01)
    for name in family.text:
        if name in parts:
            assert text_pass(parts[name], prompts=2, tokens=tiny.length) > 0


def run(drm: Callable, *args: object) -> dict:
    outcome = drm(*args, "--json")
    assert outcome.code == 0, outcome.err
    return outcome.json


def test_every_command(folder: Path, tiny: Tiny, tmp_path: Path, drm: Callable) -> None:
    """train-reward, bench, score, sample --stepwise, grpo; its LoRA, loaded by stock diffusers, changes the picture."""
    side = tiny.size[0]
    common = ["--generator", folder, "--set", f"max_sequence_length={tiny.length}"]
    small = ["--set", "shapes_prompts=4", "--set", "shapes_generated=0", "--set", f"resolution={side}"]
    run(drm, "train-reward", *common, *small, "--set", "drop_layers=1", "--set", "head_width=8", "--backbone", "lora",
        "--set", "eval_pairs=6", "--steps", 2, "--batch-size", 6, "--out", tmp_path / "train")  # fmt: skip
    reward = tmp_path / "train" / "reward"
    assert run(drm, "bench", "--reward", reward, *small[2:4], "--pairs", 6, "--out", tmp_path / "bench")["n_pairs"] >= 6
    drawn = run(drm, "sample", PROMPTS[0], *common, "--reward", reward, "--stepwise", "--beams", 2, "--steps", 3,
                "--height", side, "--width", side, "--out", tmp_path / "sample")  # fmt: skip
    assert run(drm, "score", "--reward", reward, drawn["images"][0]["path"], "--prompt", PROMPTS[0])
    run(drm, "grpo", *common, "--reward", reward, "--updates", 1, "--set", "prompts_per_update=2", "--set", "group_size=2",
        "--steps", 3, "--set", "lora_rank=2", "--set", "min_std=0", "--lr", 0.01,
        "--set", "eval_prompts=2", "--set", "eval_seeds=1", "--judge", "none",
        "--set", f"resolution={side}", "--guidance-scale", tiny.scales[0], "--out", tmp_path / "grpo")  # fmt: skip
    layers = load_file(tmp_path / "grpo" / "lora-last" / "pytorch_lora_weights.safetensors")
    assert all(name.startswith(Generator.load(str(folder), components=()).family.denoiser) for name in layers)
    stock = Generator.load(str(folder)).pipe
    options = (
        {"height": side, "width": side, "num_inference_steps": 2, "output_type": "latent"} | tiny.call | tiny.plain
    )
    before = stock(prompt=PROMPTS[0], generator=torch.Generator().manual_seed(0), **options).images
    stock.load_lora_weights(tmp_path / "grpo" / "lora-last")
    after = stock(prompt=PROMPTS[0], generator=torch.Generator().manual_seed(0), **options).images
    assert (before - after).abs().max() > 1e-6
