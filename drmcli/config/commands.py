"""The config of each command."""

from __future__ import annotations

from drmcli.config.aligning import Grpo
from drmcli.config.exporting import Export
from drmcli.config.making import DataLabel, DataMake
from drmcli.config.reproducing import Reproduce
from drmcli.config.schema import Bench, Demo, Sample, Score, TrainReward
from drmcli.config.serving import Serve

COMMANDS: dict[str, type] = {
    "train-reward": TrainReward,
    "bench": Bench,
    "score": Score,
    "sample": Sample,
    "grpo": Grpo,
    "demo": Demo,
    "serve": Serve,
    "export": Export,
    "data-make": DataMake,
    "data-label": DataLabel,
    "reproduce": Reproduce,
}
SINGULAR = {
    ("bench", "sigmas"): "sigma",
    ("bench", "scorers"): "scorer",
    ("grpo", "add_rewards"): "add_reward",
    ("sample", "add_rewards"): "add_reward",
    ("score", "prompts"): "prompt",
    ("score", "sigmas"): "sigma",
    ("serve", "scorers"): "scorer",
}
"""Flags that are repeated to fill a list, and so are named for one of it."""
