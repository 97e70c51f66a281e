"""What `drm grpo --dry-run` says: the work of an update, and the bytes that it needs."""

from __future__ import annotations

from typing import Any

import torch

from drmcli.algorithms.nft import training_steps
from drmcli.config import Grpo
from drmcli.flow import schedule
from drmcli.footprint import generator_pass, reward_pass
from drmcli.generator import pick_device, pick_dtype
from drmcli.memory import plan_policy
from drmcli.recipes.alignment import check_config, lora_config, read_prompts, rollout_plan
from drmcli.recipes.footprints import describe_reward, described_rewards, encoders, lent, own_encoders
from drmcli.recipes.hours import of_grpo
from drmcli.recipes.plan import Known, describe_generator
from drmcli.rollout import trained


def plan(config: Grpo) -> dict[str, Any]:
    """What `--dry-run` prints."""
    check_config(config)
    for ref, flag in ((config.judge, "--judge"), (config.refresh_by, "--refresh-by")):
        if ref and ref != "none":
            describe_reward(ref, flag)
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
        **of_grpo(
            config, known, lora_config(config, known.family) if config.train == "lora" else None, prompts,
            {"velocities": velocities(config), "rewards": rewards, "states": states},
        ),
    }  # fmt: skip


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


def velocities(config: Grpo) -> int:
    """Velocities without a gradient of an update: while it draws, of clean latents that are scored or compared, and of other policies."""
    _, states, rewards = work(config)
    sigmas, drawn = schedule(config.steps), config.prompts_per_update * config.group_size
    plan = rollout_plan(config)
    steps = [i for i in range(config.steps) if trained(plan, sigmas, i)]
    if config.algorithm == "direct":
        low, high = config.window
        stops = [i for i, sigma in enumerate(sigmas[:-1].tolist()) if low <= sigma <= high + 1e-6]
        draft = config.direct_form == "draft"
        first = config.steps - min(config.direct_steps, config.steps) if draft else sum(stops) // max(1, len(stops))
        count = first * drawn
    elif config.algorithm in ("step-grpo", "tempflow"):
        count = config.steps * config.prompts_per_update
        if config.algorithm == "tempflow":
            count += drawn * sum(config.steps - 1 - i for i in steps)
        elif config.diversity_bonus:
            count += rewards
    else:
        count = config.steps * drawn
    if config.score_at == "clean" and config.algorithm in ("step-grpo", "nft-step"):
        count += rewards
    others = (config.kl_beta > 0) + config.algorithm.startswith("nft")
    return count + others * states * config.inner_epochs


def memory_plan(config: Grpo, known: Known, device: torch.device) -> dict[str, Any]:
    """Bytes of an update's tensors, of the largest pass while pictures are drawn and scored, and of the frozen models beside the policy."""
    mixed, side = pick_dtype(config.dtype, device), known.latent_side(config.resolution)
    guided = known.family.guides(known.transformer, config.guidance_scale)
    policy = plan_policy(
        known.family,
        known.transformer,
        lora=lora_config(config, known.family) if config.train == "lora" else None,
        states=min(config.micro_batch_size, config.prompts_per_update),
        latent_side=side,
        tokens=known.prompt_tokens,
        mixed=mixed,
        ema=config.ema_decay > 0,
        guided=guided,
        bits=config.quantize,
    )
    shared: dict[str, Any] = {"size": (side, side), "dtype": mixed, "bits": config.quantize}
    many = max(config.prompts_per_update * config.group_size, config.eval_prompts * config.eval_seeds)
    count = min(config.max_batch, many)
    other = encoders(
        known, mixed, prompts=1, encode=0, decode=count, size=(side, side), t5=config.text_encoder_3,
        tiling=config.vae_tiling, bits=config.quantize,
    )  # fmt: skip
    beside, drawing = other.models, other.passes
    _, drawing["velocity"] = generator_pass(
        known.family, known.transformer, count=count * (2 if guided else 1), tokens=known.prompt_tokens, **shared
    )
    rewards, others = described_rewards(config, needed=True)
    for name, reward in rewards.items():
        beside[name], one = reward_pass(
            reward, count=count, tokens=known.prompt_tokens, lent=config.train == "lora" and lent(reward, config, known), **shared
        )  # fmt: skip
        drawing["score"] = max(drawing.get("score", 0), one)
        beside |= {f"{name}: {part}": size for part, size in own_encoders(reward, config, known, mixed).items()}
    if config.train == "full" and config.kl_beta:
        beside["reference policy"] = policy.parameters * mixed.itemsize
    cuda = device.type == "cuda"
    total = {c: policy.total(checkpointed=c, cuda=cuda) + sum(beside.values()) for c in (False, True)}
    idle = total[False] - policy.activations
    return (
        policy.to_dict()
        | {"beside": beside, "total": total[False], "total_checkpointed": total[True]}
        | {"drawing": drawing, "total_drawing": idle + max(drawing.values())}
        | ({"not counted": others} if others else {})
    )
