"""Where the training of a reward model starts: a generator's transformer with a fresh head, or a saved reward model.

A saved model keeps its architecture; how its backbone is stored (whole, as a LoRA, as the base's own) decides what of it can still
learn. The head always learns.
"""

from __future__ import annotations

from typing import Any

import torch

from drmcli.config import TrainReward
from drmcli.errors import InputError
from drmcli.quantize import refuse_learning
from drmcli.reward import RewardModel
from drmcli.reward_config import Backbone

FRESH = ("pretrained", "random")
"""Values of `init` that are no reward model."""
STORED: dict[tuple[Backbone, Backbone], Backbone] = {
    ("full", "full"): "full",
    ("full", "frozen"): "full",
    ("lora", "lora"): "lora",
    ("lora", "frozen"): "lora",
    ("frozen", "full"): "full",
    ("frozen", "lora"): "lora",
    ("frozen", "frozen"): "frozen",
}
"""How a model's backbone is stored after training: by how it was, and by what of it is to learn. What is missing cannot be."""


def learns(config: TrainReward) -> Backbone:
    """What of the backbone learns: full, lora or frozen; `head` is another word for the last."""
    return "frozen" if config.backbone == "head" else config.backbone


def check_frozen(config: TrainReward) -> None:
    """Raises InputError where weights that learn, or that are split over processes, are to be kept in 8 bits."""
    if learns(config) == "full":
        refuse_learning(config.quantize, "--backbone full")
    if config.shard and config.quantize != "none":
        raise InputError(
            f"--quantize {config.quantize}: weights in 8 bits cannot be split over processes (--set shard=true)",
            hint="use one of the two",
        )


def make_model(config: TrainReward, frozen: torch.dtype = torch.float32) -> RewardModel:
    """The model that training starts from, on the CPU, with what is to learn switched on and in float32.

    frozen: number format of the base's weights where they do not learn.
    """
    base_dtype = torch.float32 if learns(config) == "full" else frozen
    if config.init not in FRESH:
        return saved_model(config, base_dtype)
    if config.init == "random" and learns(config) != "full":
        raise InputError(
            f"--init random: with --backbone {config.backbone} only the base's own weights would be saved",
            hint="use --backbone full",
        )
    return RewardModel.from_generator(
        config.generator,
        revision=config.revision,
        init=config.init,
        seed=config.seed,
        dtype=base_dtype,
        drop_layers=config.drop_layers,
        tap_layers=config.tap_layers,
        head_width=config.head_width,
        head_pool=config.head_pool,
        backbone=learns(config),
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        max_sequence_length=config.max_sequence_length,
        text_encoder_3=config.text_encoder_3,
        resolution=config.resolution,
    )


def saved_model(config: TrainReward, base_dtype: torch.dtype) -> RewardModel:
    """A saved reward model, ready to learn. Raises InputError where it does not fit the data's encoders or cannot learn as asked."""
    model = RewardModel.from_pretrained(config.init, base_dtype=base_dtype, flag="--init")
    mine = model.config
    for key, has, asked in (
        ("--generator", mine.base_model, config.generator),
        ("--set revision", mine.base_revision, config.revision),
        ("--set max_sequence_length", mine.max_sequence_length, config.max_sequence_length),
        ("--set text_encoder_3", mine.text_encoder_3, config.text_encoder_3),
        ("--resolution", mine.resolution, config.resolution),
    ):
        if has != asked:
            raise InputError(
                f"--init {config.init}: was trained with {key} {_said(has)}, not {_said(asked)}",
                hint=f"give {key} {_said(has)}" if has is not None else f"leave {key} out",
            )
    wanted = learns(config)
    stored = STORED.get((mine.backbone, wanted))
    if stored is None:
        raise InputError(
            f"--backbone {config.backbone}: the backbone of --init {config.init} is stored as {mine.backbone}",
            hint=f"use --backbone {mine.backbone} or head",
        )
    if mine.backbone != "lora":  # an adapter that is there keeps its shape
        mine.lora_rank, mine.lora_alpha = config.lora_rank, config.lora_alpha
    mine.backbone = stored
    model.set_trainable()
    if wanted == "frozen":
        model.transformer.requires_grad_(False)
    return model


def _said(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
