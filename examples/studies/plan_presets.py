"""What every preset needs on one GPU, from the published configs of its model: no weights, no download, no GPU.

    python examples/studies/plan_presets.py              # all presets: some 10 minutes
    python examples/studies/plan_presets.py sdxl z-image

Prints a Markdown table of gigabytes (1e9 bytes) in bf16, as each command's own `--dry-run` counts them: of tensors; fragmentation and
libraries' workspaces come on top. A preset whose name ends in -48gb is meant to fit 48 GB, and so on; what does not is marked with `!`.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from drmcli.config import preset_names, resolve
from drmcli.memory import FIXED
from drmcli.recipes import bench, grpo, sample, train_reward
from drmcli.recipes.footprints import encoders
from drmcli.recipes.plan import Known, describe_generator, published_configs
from drmcli.reward_config import RewardConfig

NOT_SIZED = ("tiny", "paper")
"""Presets without a GPU in mind, and for many."""


def room(preset: str) -> float | None:
    """Bytes of the GPU that a preset's name promises to fit."""
    found = re.search(r"-(\d+)gb$", preset)
    return float(found[1]) * 1e9 if found else None


def write_reward(config: Any, known: Known, folder: Path) -> str:
    """The config of the reward model that a train-reward config makes."""
    made = RewardConfig(
        base_model=config.generator, transformer=known.transformer, family=known.family.name, drop_layers=config.drop_layers,
        head_width=config.head_width, backbone=config.backbone, max_sequence_length=config.max_sequence_length,
        text_encoder_3=config.text_encoder_3,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(asdict(made)))
    return str(folder)


def training(preset: str, flags: dict[str, Any]) -> tuple[Any, Known, int]:
    """The config of train-reward, what is known of its generator, and bytes: while prompts and pictures are encoded, or after."""
    config = resolve("train-reward", preset=preset, flags=flags)
    known = describe_generator(config)
    side = known.latent_side(config.resolution)
    encoding = encoders(
        known, torch.bfloat16, prompts=config.encode_batch_size, encode=config.encode_batch_size, decode=0, size=(side, side),
        t5=config.text_encoder_3,
    ).total(cuda=True)  # fmt: skip
    return config, known, max(encoding, as_set(config, train_reward.plan(config)["memory"]))


def as_set(config: Any, memory: dict[str, int]) -> int:
    """The bytes of a plan with the config's gradient checkpointing, or while pictures are drawn."""
    kept = memory["total_checkpointed" if config.gradient_checkpointing else "total"]
    return int(max(kept, memory.get("total_drawing", 0)) + FIXED)


def plan(preset: str, folder: Path) -> dict[str, int]:
    """Bytes by command."""
    model = resolve("train-reward", preset=preset).generator
    flags: dict[str, Any] = {"generator": published_configs(model), "dtype": "bf16", "device": "cpu"}
    config, known, needed = training(preset, flags)
    reward = {"reward": write_reward(config, known, folder)}
    drawing = {"mode": "stepwise", "beams": 4, "prompts": ["a prompt"], "num_images": 64}
    scoring = bench.plan(resolve("bench", preset=preset, flags=flags | reward | {"dataset": "shapes"}))["memory"]
    searching = sample.plan(resolve("sample", preset=preset, flags=flags | reward | drawing))["memory"]
    aligning = resolve("grpo", preset=preset, flags=flags | reward | {"prompts": "shapes"})
    return {
        "train-reward": needed,
        "bench": int(scoring["total"] + FIXED),
        "sample": int(searching["total"] + FIXED),
        "grpo": as_set(aligning, grpo.plan(aligning)["memory"]),
    }


def micro_batches(preset: str) -> str:
    """Pairs and states of train-reward's and grpo's micro-batches; c: with gradient checkpointing."""
    configs = [resolve(command, preset=preset) for command in ("train-reward", "grpo")]
    return ", ".join(f"{c.micro_batch_size}{' c' if c.gradient_checkpointing else ''}" for c in configs)


def main(names: list[str]) -> None:
    chosen = names or [name for name in preset_names() if name not in NOT_SIZED]
    print("| preset | micro-batches | train-reward | bench | sample --stepwise | grpo |")
    print("|---|---|---|---|---|---|")
    for preset in chosen:
        with tempfile.TemporaryDirectory() as folder:
            found = plan(preset, Path(folder))
        limit = room(preset)
        cells = [f"{size / 1e9:.1f}" + (" !" if limit and size > limit else "") for size in found.values()]
        print("| " + " | ".join([f"`{preset}`", micro_batches(preset), *cells]) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
