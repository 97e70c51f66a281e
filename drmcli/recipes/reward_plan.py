"""What `drm train-reward --dry-run` prints."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drmcli.config import TrainReward
from drmcli.data.batches import check_sizes, micro_batches
from drmcli.generator import pick_device, pick_dtype
from drmcli.memory import plan_training
from drmcli.recipes.data_plan import training_data
from drmcli.recipes.footprints import encoders
from drmcli.recipes.hours import of_train_reward
from drmcli.recipes.initial import check_frozen, learns
from drmcli.recipes.pairs import MADE, parse_ratio
from drmcli.recipes.plan import Known, describe_generator
from drmcli.reward_config import RewardConfig
from drmcli.tiny.shapes import GROUP


def pictures_in(config: TrainReward, pairs: int) -> int:
    """Pictures in a micro-batch of so many pairs: two a pair, but rankings share theirs, as those of `shapes` surely do."""
    if all(parse_ratio(item)[0] in MADE for item in config.data):
        return math.ceil(pairs * GROUP / math.comb(GROUP, 2))
    return 2 * pairs


def reward_settings(config: TrainReward, known: Known) -> RewardConfig:
    """The reward model that a run would make."""
    return RewardConfig(
        base_model=config.generator,
        transformer=known.transformer,
        family=known.family.name,
        drop_layers=config.drop_layers,
        tap_layers=config.tap_layers,
        head_width=config.head_width,
        head_pool=config.head_pool,
        backbone=learns(config),
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        max_sequence_length=config.max_sequence_length,
        text_encoder_3=config.text_encoder_3,
    )


def planned_reward(config: TrainReward, known: Known, folder: Path) -> str:
    """A folder with the config of the reward model that a run would make, for the plans of what uses it. Returns its path."""
    settings = json.dumps(asdict(reward_settings(config, known)))
    (folder / "config.json").write_text(settings, encoding="utf-8")
    return str(folder)


def text_encoders(config: TrainReward, known: Known, side: int) -> dict[str, int]:
    """Bytes of the text encoders by name, which stay on the device where prompts are encoded live."""
    dtype = pick_dtype(config.dtype, pick_device(config.device))
    found = encoders(
        known, dtype, prompts=1, encode=0, decode=0, size=(side, side), t5=config.text_encoder_3, bits=config.quantize
    ).models
    return {name: size for name, size in found.items() if name in known.family.text}


def plan(config: TrainReward) -> dict[str, Any]:
    """What `--dry-run` prints: sizes, memory with and without gradient checkpointing, what would be downloaded."""
    check_sizes(config, 1)
    check_frozen(config)
    known = describe_generator(config)
    rounds, pairs = micro_batches(config, 1)
    settings = reward_settings(config, known)
    device = pick_device(config.device)
    side = known.latent_side(config.resolution)
    memory = plan_training(
        settings,
        images=pictures_in(config, pairs),
        latent_side=side,
        tokens=known.prompt_tokens,
        mixed=pick_dtype(config.dtype, device),
        ema=config.ema_decay > 0,
        bits=config.quantize,
    )
    facts = training_data(config).facts(config, known, side)
    beside = text_encoders(config, known, side) if facts["prompts are"] == "live" else {}
    return {
        "steps": config.steps,
        "pairs a step": config.batch_size,
        "micro-batches a step": rounds,
        "pictures a micro-batch, at most": pictures_in(config, pairs),
        "image tokens": math.prod(known.family.grid(known.transformer, (side, side))),
        "blocks kept": known.family.depth(known.transformer) - config.drop_layers,
        "memory": memory.to_dict()
        | {"beside": beside}
        | {
            name: memory.total(checkpointed=checkpointed, cuda=device.type == "cuda") + sum(beside.values())
            for name, checkpointed in (("total", False), ("total_checkpointed", True))
        },
        "download": known.download,
        **facts,
        **of_train_reward(config, known, settings, facts, pictures_in(config, pairs)),
    }
