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
PATHS = {
    "out", "cache_dir", "data_dir", "images", "data", "eval_data", "dataset", "datasets", "prompts", "eval_prompts", "tune", "methods",
    "generator", "reward", "rewards", "add_rewards", "scorers", "against", "judge", "refresh_by", "init", "lora", "label", "active",
    "detector", "color_model", "folder", "run", "to",
}  # fmt: skip
"""Keys whose texts are paths, or may be."""
TEXTS = {("sample", "prompts"), ("score", "prompts")}
"""Where such a key holds what is to be drawn or seen instead."""
