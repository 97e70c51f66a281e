"""What `drm grpo --dry-run` says: the work of an update, and the bytes that it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from drmcli.algorithms.nft import training_steps
from drmcli.config import Grpo, package_path
from drmcli.flow import schedule
from drmcli.generator import pick_device, pick_dtype
from drmcli.memory import plan_policy
from drmcli.recipes.alignment import lora_config, read_prompts, rollout_plan
from drmcli.recipes.plan import Known, describe_generator
from drmcli.reward import RewardModel
from drmcli.reward_config import read_config
from drmcli.rollout import trained
from drmcli.scorers import parse_term


def plan(config: Grpo) -> dict[str, Any]:
    """What `--dry-run` prints."""
    known = describe_generator(config)
    prompts = read_prompts(config)
    steps, states, rewards = work(config)
    device = pick_device(config.device)
    return {
        "updates": config.updates,
        "prompts": {split: len(texts) for split, texts in prompts.items()},
        "trained steps of a trajectory": steps,
        "states an update (a forward and a backward pass each)": states,
        "rewards an update": rewards,
        "memory": memory_plan(config, known, device),
        "download": known.download,
    }


def work(config: Grpo) -> tuple[int, int, int]:
    """(trained steps or levels of a trajectory, states with a loss, rewards) of an update."""
    drawn = config.prompts_per_update * config.group_size
    if config.algorithm == "direct":
        steps = 1 if config.direct_form == "refl" else min(config.direct_steps, config.steps)
        return steps, steps * drawn, drawn
    sigmas = schedule(config.steps)
    if config.algorithm.startswith("nft"):
        window, stepwise = (config.window[0], config.window[1]), config.algorithm == "nft-step"
        levels = min(config.nft_levels, len(training_steps(sigmas, window, stepwise=stepwise)))
        return levels, levels * drawn, drawn * (levels if config.algorithm == "nft-step" else 1)
    steps = sum(trained(rollout_plan(config), sigmas, i) for i in range(config.steps))
    if config.algorithm == "flow-grpo":
        return steps, steps * drawn, drawn
    return steps, steps * config.prompts_per_update, steps * drawn


def memory_plan(config: Grpo, known: Known, device: torch.device) -> dict[str, Any]:
    """Bytes of an update's tensors, and the frozen models beside the policy."""
    mixed = pick_dtype(config.dtype, device)
    policy = plan_policy(
        known.family,
        known.transformer,
        lora=lora_config(config, known.family) if config.train == "lora" else None,
        states=min(config.micro_batch_size, config.prompts_per_update),
        latent_side=(config.resolution or known.image_size) // known.vae_factor,
        tokens=known.prompt_tokens,
        mixed=mixed,
        ema=config.ema_decay > 0,
        guided=known.family.guides(known.transformer, config.guidance_scale),
    )
    beside = dict(known.beside(mixed))
    if not config.text_encoder_3:
        beside.pop("text_encoder_3", None)
    where = Path(package_path(parse_term(config.reward)[0]))
    if where.is_dir():
        reward = read_config(where, f"--reward {config.reward}")
        with torch.device("meta"):
            model = RewardModel.from_config(reward)
        beside["reward model"] = sum(p.numel() for p in model.parameters()) * mixed.itemsize
    if config.train == "full" and config.kl_beta:
        beside["reference policy"] = policy.parameters * mixed.itemsize
    cuda = device.type == "cuda"
    total = {c: policy.total(checkpointed=c, cuda=cuda) + sum(beside.values()) for c in (False, True)}
    return policy.to_dict() | {"beside": beside, "total": total[False], "total_checkpointed": total[True]}
