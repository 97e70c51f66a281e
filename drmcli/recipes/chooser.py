"""What chooses in a search: scorers by name, and a reward model that shares the generator's own blocks."""

from __future__ import annotations

import torch

from drmcli.config import Sample
from drmcli.errors import InputError
from drmcli.fingerprints import of_parts
from drmcli.generator import Generator
from drmcli.kernels import Kernels
from drmcli.scorers import load_scorer, parse_term
from drmcli.scorers.combine import Term
from drmcli.scorers.drm import RewardScorer


def load_scorers(config: Sample, device: torch.device, dtype: torch.dtype, generator: Generator) -> list[Term]:
    """What `--reward` names, REF or REF=WEIGHT; none for `none`."""
    terms = []
    for text in [] if config.reward == "none" else [config.reward, *config.add_rewards]:
        ref, weight = parse_term(text)
        scorer = load_scorer(
            ref, device=device, dtype=dtype, flag="--reward", kernels=Kernels.of(config, device), beside=generator
        )
        if isinstance(scorer, RewardScorer):
            scorer.check_latents(generator, "--reward")
        terms.append(Term(scorer, weight))
    return terms


def share_blocks(config: Sample, generator: Generator, scorers: list[Term]) -> None:
    """Let a frozen reward model use the generator's blocks themselves. Raises InputError where they are not the same."""
    why, reward = "", None
    if len(scorers) != 1 or not isinstance(scorers[0].scorer, RewardScorer) or scorers[0].weight != 1.0:
        why = "one reward model alone can share the generator's blocks"
    else:
        scorer = scorers[0].scorer
        reward = scorer.model
        if reward.config.backbone != "frozen":
            why = "the reward model's backbone was trained, so it is not the generator's"
        elif reward.generator() is not generator or of_parts(
            reward.config.base_model,
            reward.config.base_revision,
            ["transformer"],
            flag="base_model",
            bits=reward.kernels.quantize,
        ) != generator.prints(["transformer"]):
            why = f"the reward model was cut from {reward.config.base_model}"
        elif config.lora:
            why = "a LoRA changes the generator's blocks"
        elif config.score_at == "clean":
            why = "clean latents are not the state that the generator goes on from"
        elif not generator.family.shares_blocks:
            why = f"a {type(generator.pipe).__name__} cannot go on from what its first blocks computed"
        elif generator.family.takes_guidance(generator.model_config) and reward.guidance != config.guidance_scale:
            why = f"the reward model sees guidance {reward.guidance:g} as an input, the generator {config.guidance_scale:g}"
    if why or reward is None:
        raise InputError(
            f"--share-score: {why}", hint="leave it out, or train with `drm train-reward --set backbone=frozen`"
        )
    reward.share_blocks(generator)
