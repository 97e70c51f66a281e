"""What `--dry-run` says of data: pairs, prompts, pictures, and what encoding them takes on the disk."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from drmcli.config import Bench, TrainReward, dataset_names, package_path
from drmcli.data.cache import cache_root
from drmcli.data.datasets import DATASETS, read
from drmcli.data.sources import where_prompts_go
from drmcli.errors import MissingError
from drmcli.generator import pick_device, pick_dtype
from drmcli.recipes.pairs import MADE, first_pairs, parse_ratio
from drmcli.recipes.plan import Known
from drmcli.tiny.shapes import GROUP

TEXT_WIDTHS = ("joint_attention_dim", "cross_attention_dim", "caption_channels", "cap_feat_dim")
"""Keys of a denoiser's config under which the width of its text is found."""


@dataclass
class Counts:
    """What a command reads. Pictures and prompts that several sets share are counted once a set."""

    pairs: int = 0
    prompts: int = 0
    pictures: int = 0
    missing: list[str] = field(default_factory=list)
    """Why published sets are not counted: they are not on this machine."""

    def add(self, name: str, split: str, config: Any, *, made: int, pairs: int | None = None) -> None:
        """Read a set. made: captions of one that is drawn; pairs: how many are taken, None for all.

        A published set that nothing points to is left out and named. Raises MissingError and InputError for what leads nowhere.
        """
        if name in MADE:
            self.pairs += made * math.comb(GROUP, 2) if pairs is None else min(pairs, made * math.comb(GROUP, 2))
            self.prompts, self.pictures = self.prompts + made, self.pictures + made * GROUP
            return
        try:
            data = read(
                package_path(name), data_dir=config.data_dir, split=split, allow_outside=config.allow_outside,
                max_bad=config.max_bad,
            )  # fmt: skip
        except MissingError as error:
            if name not in DATASETS or config.data_dir is not None:
                raise
            self.missing.append(error.message)
            return
        if pairs is not None:
            data = first_pairs(data, pairs)
        table = data.pairs
        self.pairs += len(table)
        self.prompts += len(np.unique(table["prompt"])) if pairs is not None else len(data.prompts)
        both = (table["chosen"], table["rejected"])
        self.pictures += len(np.unique(np.concatenate(both))) if pairs is not None else len(data.images)

    def facts(self, config: Any, known: Known, side: int) -> dict[str, Any]:
        """In words and gigabytes; side: of a latent. What is cached already is counted too."""
        width = next((int(known.transformer[k]) for k in TEXT_WIDTHS if k in known.transformer), 0)
        number = pick_dtype(config.dtype, pick_device(config.device)).itemsize
        latents = self.pictures * known.family.channels(known.transformer) * side**2 * number
        embeds = self.prompts * known.prompt_tokens * width * (1 if config.cache_dtype == "fp8" else number)
        root = cache_root(config.cache_dir)
        free = shutil.disk_usage(next(p for p in (root, *root.absolute().parents) if p.exists())).free
        live = config.prompt_cache if config.prompt_cache != "auto" else where_prompts_go(embeds, free)
        needed = latents + (embeds if live == "disk" else 0)
        return {
            "pairs, at most": self.pairs,
            "prompts": self.prompts,
            "pictures": self.pictures,
            "cache of pictures, GB": round(latents / 1e9, 3),
            "cache of prompts, GB, at most": round(embeds / 1e9, 3),
            "prompts are": live,
            "free disk there, GB": round(free / 1e9, 1),
            **(
                {"beware": f"the cache takes {needed / 1e9:.0f} GB, more than is free in {root}"}
                if needed > free
                else {}
            ),
            **({"data not here": "; ".join(self.missing)} if self.missing else {}),
        }


def training_data(config: TrainReward) -> Counts:
    """What train-reward learns from and is evaluated on."""
    found = Counts()
    for name, _ in map(parse_ratio, config.data):
        found.add(name, "train", config, made=config.shapes_prompts)
    for name in config.eval_data:
        found.add(name, "test", config, made=-(-config.eval_pairs // 5), pairs=config.eval_pairs)
    return found


def benchmark_data(config: Bench) -> Counts:
    """What bench measures on."""
    found = Counts()
    made = config.shapes_prompts if config.pairs is None else -(-config.pairs // 5)
    for name in dataset_names(config.dataset):
        split = config.split or (DATASETS[name].default_split if name in DATASETS else "test")
        found.add(name, split, config, made=made, pairs=config.pairs)
    return found
