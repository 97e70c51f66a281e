"""What `--dry-run` says of hours: real passes of models with random weights, timed on the run's own device, times how many a run makes.

The models are built from their configs, so that nothing is downloaded and weights that are here are not read. What is not timed:
reading and decoding picture files, loading, scorers and judges that are no reward models of drm, writing.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from drmcli.config import Grpo, TrainReward
from drmcli.data.batches import Batch, draw_sigmas, micro_batches
from drmcli.errors import DrmError, RunError, is_out_of_memory
from drmcli.families.base import Family
from drmcli.fitting import at_once, tile
from drmcli.footprint import read_ids
from drmcli.generator import pick_device, pick_dtype
from drmcli.kernels import PLAIN, Kernels
from drmcli.loading import fill_at_random, skeleton, weightless
from drmcli.memory import blank_states
from drmcli.policy import start_learning
from drmcli.quantize import linears, quantize
from drmcli.recipes.launch import start_accelerator
from drmcli.recipes.learner import Learner, Window
from drmcli.recipes.plan import Known
from drmcli.reward import RewardModel
from drmcli.reward_config import RewardConfig

RUNS = 2
"""Timed ones, after a first that warms up."""
ROUNDS = 4
"""Micro-batches of the timed step at most; longer steps are so many times as long."""


@dataclass
class Row:
    """A kind of work."""

    what: str
    count: int
    seconds: float
    """Each."""

    @property
    def hours(self) -> float:
        return self.count * self.seconds / 3600


def hours(config: Any, rows: Callable[[], list[Row]], *others: str) -> dict[str, Any]:
    """The plan's entry `hours`: a dict with a row a kind of work, or one line that says why there is none; nothing where it is off.

    rows: builds and times. others: scorers that are not timed.
    """
    device = pick_device(config.device)
    if config.timing == "off":
        return {}
    if config.timing == "auto" and device.type != "cuda":
        return {"hours": "not timed, no GPU (ask with --set timing=on)"}
    cuda = device.type == "cuda"
    card = torch.cuda.get_device_name(device) if cuda else f"the {device.type.upper()}"
    random = torch.random.get_rng_state()
    try:
        found = rows()
    except RunError as error:  # of numbers that random weights made
        return {"hours": f"not timed: {error.message}"}
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, DrmError) or not is_out_of_memory(error):
            raise
        return {"hours": f"not timed: out of memory on {card}; the memory plan shows what needs how much"}
    finally:
        torch.random.set_rng_state(random)
        gc.collect()
        torch.cuda.empty_cache() if cuda else None
    listed = [
        {"what": row.what, "count": row.count, "seconds_each": row.seconds, "hours": row.hours}
        for row in found
        if row.count
    ]
    return {
        "hours": {
            "timed_on": f"{card} with random weights",
            "rows": listed,
            "total": sum(row["hours"] for row in listed),
            **({"not_timed": list(dict.fromkeys(others))} if others else {}),
        }
    }


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of some work, after a run that warms up."""
    taken = []
    for _ in range(RUNS + 1):
        _settle(device)
        started = time.perf_counter()
        work()
        _settle(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- models -----------------------------------------------------------------------------------------------------------


def random_reward(
    settings: RewardConfig, dtype: torch.dtype, device: torch.device, kernels: Kernels = PLAIN
) -> RewardModel:
    """A reward model with random weights, what learns of it switched on and in float32; dtype: of the others."""
    model = skeleton(lambda: RewardModel.from_config(settings))
    with weightless():
        model.set_trainable()
    learns = {name for name, p in model.named_parameters() if p.requires_grad or name.startswith("head.")}
    fill_frozen(model.blocks, dtype, device, kernels)
    fill_at_random(model, device=device, dtype=lambda name: torch.float32 if name in learns else dtype)
    kernels.use(model.transformer, model.family, device)
    return model


def random_denoiser(known: Known, dtype: torch.dtype, device: torch.device, kernels: Kernels = PLAIN) -> Any:
    """A generator's denoiser with random weights."""
    kind: Any = known.family.denoiser_class
    model = random_model(
        lambda: kind.from_config(known.transformer), dtype, device, kernels, lambda model: known.family.blocks(model)
    )
    kernels.use(model, known.family, device)
    return model


def random_model(
    make: Callable[[], Any],
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels = PLAIN,
    blocks: Callable[[Any], list[nn.Module]] = lambda model: [model],
) -> Any:
    """What `make` makes with random weights, frozen; blocks: what of it is kept in 8 bits where the kernels say so."""
    model = skeleton(make)
    fill_frozen(blocks(model), dtype, device, kernels)
    fill_at_random(model, device=device, dtype=lambda name: dtype)
    return model.eval().requires_grad_(False)


def fill_frozen(blocks: list[nn.Module], dtype: torch.dtype, device: torch.device, kernels: Kernels) -> None:
    """Random weights where they are to be kept in 8 bits, so at once: the device never holds more than one of them in full."""
    for linear in [m for block in blocks for m in linears(block)] if kernels.quantize != "none" else ():
        fill_at_random(linear, device=device, dtype=lambda name: dtype)
        quantize([linear], kernels.quantize, device)


def velocity(family: Family, model: nn.Module, state: tuple[Any, ...]) -> Tensor:
    """As `Generator.velocity` without a second pass. state: latents, sigma and conditioning, as `states` gives them."""
    latents, sigma, cond = state
    return family.velocity(model(**family.inputs(model, latents, sigma, cond, None), return_dict=False), latents, sigma)


def states(known: Known, count: int, size: tuple[int, int], device: torch.device) -> tuple[Any, ...]:
    """`blank_states` of a generator on a device."""
    made = blank_states(known.family, known.transformer, count, size, known.prompt_tokens)
    return tuple(part.to(device) for part in made)


# --- passes -----------------------------------------------------------------------------------------------------------


def encoding(
    config: Any, known: Known, size: tuple[int, int], *, pictures: int = 0, prompts: int = 0
) -> tuple[float, float]:
    """Seconds a picture in the VAE and a prompt in all text encoders, in batches of so many; 0 of them leaves it out."""
    device = pick_device(config.device)
    dtype, t5 = pick_dtype(config.dtype, device), getattr(config, "text_encoder_3", True)
    per_picture = per_prompt = 0.0
    makers = known.makers()
    if pictures and "vae" in makers:
        with torch.no_grad():
            per_picture = _vae_seconds(known, makers["vae"], size, pictures, dtype, device)
    for name, make in makers.items() if prompts else ():
        if name in known.family.text and (t5 or name != "text_encoder_3"):
            model = random_model(make, dtype, device, Kernels.of(config, device))
            with torch.no_grad():
                per_prompt += seconds(lambda: read_ids(model, prompts, known.max_sequence_length), device) / prompts  # noqa: B023
            del model
    return per_picture, per_prompt


def _vae_seconds(
    known: Known, make: Callable[[], Any], size: tuple[int, int], count: int, dtype: torch.dtype, device: torch.device
) -> float:
    vae = random_model(make, dtype, device)
    height, width = (side * known.vae_factor for side in size)
    tile(vae, "auto", height * width)
    pixels = torch.rand(count, 3, height, width, device=device).to(dtype)
    return seconds(lambda: known.family.encode_images(SimpleNamespace(vae=vae), pixels), device) / count


def decoding(config: Any, known: Known, size: tuple[int, int], count: int) -> float:
    """Seconds a picture that the VAE decodes, so many at once as a run decodes."""
    device = pick_device(config.device)
    vae = random_model(known.makers()["vae"], pick_dtype(config.dtype, device), device)
    pixels = size[0] * size[1] * known.vae_factor**2
    tile(vae, getattr(config, "vae_tiling", "auto"), pixels)
    count = min(count, at_once(pixels))
    latents = torch.randn(count, known.family.channels(known.transformer), *size, device=device)
    with torch.no_grad():
        return seconds(lambda: known.family.decode(SimpleNamespace(vae=vae), latents), device) / count


def scoring(config: Any, known: Known, settings: RewardConfig, count: int, size: tuple[int, int]) -> float:
    """Seconds a latent in a reward model's forward pass, so many at once."""
    device = pick_device(config.device)
    model = random_reward(
        settings, pick_dtype(config.dtype, device), device, Kernels.of(config, device)
    ).requires_grad_(False)
    latents, sigma, cond = states(known, count, size, device)
    with torch.no_grad():
        return seconds(lambda: model.score(latents, sigma, cond), device) / count


def drawing(config: Any, known: Known, count: int, size: tuple[int, int]) -> float:
    """Seconds of one latent in one forward pass of the denoiser, so many of them at once."""
    device = pick_device(config.device)
    model = random_denoiser(known, pick_dtype(config.dtype, device), device, Kernels.of(config, device))
    state = states(known, count, size, device)
    with torch.no_grad():
        return seconds(lambda: velocity(known.family, model, state), device) / count


def training_step(config: TrainReward, known: Known, settings: RewardConfig, pictures: int, side: int) -> float:
    """Seconds of an optimizer step of train-reward with all its micro-batches, of so many pictures each."""
    device = pick_device(config.device)
    rounds, pairs = micro_batches(config, 1)
    stored = torch.float32 if settings.backbone == "full" else pick_dtype(config.dtype, device)
    model = random_reward(settings, stored, device, Kernels.of(config, device))
    some = min(rounds, ROUNDS)
    accelerator = start_accelerator(replace(config, track=[]), rounds=some)
    learner = Learner(replace(config, shard=False), accelerator, model, None)
    micro = [made_up_batch(config, known, pictures, pairs, side) for _ in range(some)]
    return seconds(lambda: learner.learn(micro, Window()), device) * rounds / some


def made_up_batch(config: TrainReward, known: Known, pictures: int, pairs: int, side: int) -> Batch:
    """A micro-batch of noise, a prompt a picture, at sigmas as the config draws them."""
    latents, _, cond = blank_states(known.family, known.transformer, pictures, (side, side), known.prompt_tokens)
    sigma = draw_sigmas(config, pictures, torch.Generator().manual_seed(config.seed))
    first = torch.arange(pairs) % pictures
    return Batch(
        latents=latents, noise=torch.randn_like(latents), sigma=sigma, cond=cond, prompt=torch.arange(pictures), chosen=first,
        rejected=(first + 1) % pictures, label=torch.ones(pairs), weight=torch.full((pairs,), 1 / config.batch_size),
    )  # fmt: skip


def learning(config: Grpo, known: Known, lora: Any, side: int) -> tuple[float, float, float]:
    """Of grpo, seconds: a velocity while drawing, a state's forward and backward pass, an optimizer step. Guidance is in the first two.

    lora: the LoRA that learns; None for all weights.
    """
    device = pick_device(config.device)
    mixed, family = pick_dtype(config.dtype, device), known.family
    model = random_denoiser(known, mixed, device, Kernels.of(config, device))
    trained = start_learning(model, family, lora, seed=config.seed, checkpointing=config.gradient_checkpointing)
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    each = 2 if family.guides(known.transformer, config.guidance_scale) else 1
    group = config.prompts_per_update * (1 if config.algorithm in ("step-grpo", "tempflow") else config.group_size)
    drawn, learned = min(config.max_batch, group), min(config.micro_batch_size, group)
    many, few = (states(known, each * count, (side, side), device) for count in (drawn, learned))

    def autocast() -> Any:
        return torch.autocast(device.type, dtype=mixed, enabled=mixed != torch.float32)

    def draw() -> None:
        with torch.no_grad(), autocast():
            velocity(family, model, many)

    def learn() -> None:
        with autocast():
            found = velocity(family, model, few)
        found.float().square().mean().backward()

    a, b = seconds(draw, device) / drawn, seconds(learn, device) / learned
    return a, b, seconds(optimizer.step, device)
