"""What `drm train-reward --dry-run` prints."""

from __future__ import annotations

import math
import shutil
from typing import Any

from drmcli.config import TrainReward, package_path
from drmcli.data.batches import check_sizes, micro_batches
from drmcli.data.cache import cache_root
from drmcli.data.datasets import read
from drmcli.data.sources import where_prompts_go
from drmcli.errors import MissingError
from drmcli.generator import pick_device, pick_dtype
from drmcli.memory import plan_training
from drmcli.recipes.initial import learns
from drmcli.recipes.pairs import MADE, parse_ratio
from drmcli.recipes.plan import Known, describe_generator
from drmcli.reward_config import RewardConfig
from drmcli.tiny.shapes import GROUP

TEXT_WIDTHS = ("joint_attention_dim", "cross_attention_dim", "caption_channels", "cap_feat_dim")
"""Keys of a denoiser's config under which the width of its text is found."""


def pictures_in(config: TrainReward, pairs: int) -> int:
    """Pictures in a micro-batch of so many pairs: two a pair, but rankings share theirs, as those of `shapes` surely do."""
    if all(parse_ratio(item)[0] in MADE for item in config.data):
        return math.ceil(pairs * GROUP / math.comb(GROUP, 2))
    return 2 * pairs


def plan(config: TrainReward) -> dict[str, Any]:
    """What `--dry-run` prints: sizes, memory with and without gradient checkpointing, what would be downloaded."""
    check_sizes(config, 1)
    known = describe_generator(config)
    rounds, pairs = micro_batches(config, 1)
    settings = RewardConfig(
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
    )
    device = pick_device(config.device)
    side = (config.resolution or known.image_size) // known.vae_factor
    memory = plan_training(
        settings,
        images=pictures_in(config, pairs),
        latent_side=side,
        tokens=known.prompt_tokens,
        mixed=pick_dtype(config.dtype, device),
        ema=config.ema_decay > 0,
        device_type=device.type,
    )
    return {
        "steps": config.steps,
        "pairs a step": config.batch_size,
        "micro-batches a step": rounds,
        "pictures a micro-batch, at most": pictures_in(config, pairs),
        "image tokens": math.prod(known.family.grid(known.transformer, (side, side))),
        "blocks kept": known.family.depth(known.transformer) - config.drop_layers,
        "memory": memory.to_dict()
        | {
            "total": memory.total(checkpointed=False, cuda=device.type == "cuda"),
            "total_checkpointed": memory.total(checkpointed=True, cuda=device.type == "cuda"),
        },
        "download": known.download,
    } | data_facts(config, known, side)


def data_facts(config: TrainReward, known: Known, side: int) -> dict[str, Any]:
    """What the training data are and what encoding them takes on the disk, as far as they are on this machine.

    side: of a latent. Pictures and prompts that several sets share are counted once a set; what is cached already is counted too.
    """
    pairs = prompts = pictures = 0
    missing = []
    for name, _ in map(parse_ratio, config.data):
        if name in MADE:
            drawn = config.shapes_prompts
            pairs, prompts, pictures = pairs + drawn * math.comb(GROUP, 2), prompts + drawn, pictures + drawn * GROUP
            continue
        try:
            data = read(
                package_path(name),
                data_dir=config.data_dir,
                split="train",
                allow_outside=config.allow_outside,
                max_bad=config.max_bad,
            )
        except MissingError as error:
            missing.append(error.message)
            continue
        pairs, prompts, pictures = pairs + len(data), prompts + len(data.prompts), pictures + len(data.images)
    width = next((int(known.transformer[k]) for k in TEXT_WIDTHS if k in known.transformer), 0)
    number = pick_dtype(config.dtype, pick_device(config.device)).itemsize
    latents = pictures * known.family.channels(known.transformer) * side**2 * number
    embeds = prompts * known.prompt_tokens * width * (1 if config.cache_dtype == "fp8" else number)
    root = cache_root(config.cache_dir)
    free = shutil.disk_usage(next(p for p in (root, *root.absolute().parents) if p.exists())).free
    return {
        "pairs, at most": pairs,
        "prompts": prompts,
        "pictures": pictures,
        "cache of pictures, GB": round(latents / 1e9, 3),
        "cache of prompts, GB, at most": round(embeds / 1e9, 3),
        "prompts are": config.prompt_cache if config.prompt_cache != "auto" else where_prompts_go(embeds, free),
        "free disk there, GB": round(free / 1e9, 1),
        **({"data not here": "; ".join(missing)} if missing else {}),
    }
