"""From what the user names (`shapes`, a published dataset, a file, mixed by ratios) to encoded preference pairs."""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drmcli.config import local_or_hub, package_path, split_ratio
from drmcli.data import cache
from drmcli.data.batches import Encoded, EncodedPairs, IndexedPairs
from drmcli.data.datasets import read
from drmcli.data.preferences import Preferences
from drmcli.data.sources import open_prompts
from drmcli.errors import DrmError, InputError, RunError
from drmcli.families import family_of
from drmcli.families.base import Family, check_side
from drmcli.fingerprints import of_parts
from drmcli.fitting import SMALLER, Batch
from drmcli.generator import Generator, PromptEmbeds, pick_dtype
from drmcli.hub import explained
from drmcli.kernels import PLAIN, Kernels
from drmcli.noise import score_clean
from drmcli.parts import denoiser_config, part_class, quiet_libraries, read_index
from drmcli.reward import RewardModel
from drmcli.run import Reporter, Run, write_text
from drmcli.tiny.shapes import load_shapes

MADE: dict[str, Callable[..., Preferences]] = {"shapes": load_shapes}
"""Sets of preferences that are drawn, not read; each has splits train and test."""


class LazyGenerator:
    """A pipeline that is loaded when first asked for: its VAE and text encoders, or all of it."""

    def __init__(self, ref: str, *, flag: str, **options: Any):
        self.ref = ref
        self.flag = flag
        self.options = options
        self._loaded: Generator | None = None

    @classmethod
    def of(cls, config: Any, device: torch.device) -> LazyGenerator:
        """The generator of a command's config."""
        return cls(
            config.generator,
            flag="--generator",
            revision=config.revision,
            device=device,
            dtype=pick_dtype(config.dtype, device),
            text_encoder_3=config.text_encoder_3,
            max_sequence_length=config.max_sequence_length,
            kernels=Kernels.of(config, device),
            vae_tiling=config.vae_tiling,
        )

    @classmethod
    def of_reward(cls, reward: RewardModel, dtype: torch.dtype, device: torch.device) -> LazyGenerator:
        """The pipeline that a reward model was cut from; what comes with the model itself is taken as it is."""
        c = reward.config
        made = cls(
            c.base_model,
            flag="base model of --reward",
            revision=c.base_revision,
            device=device,
            dtype=dtype,
            text_encoder_3=c.text_encoder_3,
            max_sequence_length=c.max_sequence_length,
            kernels=PLAIN if reward.own_encoders else reward.kernels,
        )
        if reward.own_encoders:
            made._loaded = reward.generator()
        return made

    def encoders(self) -> Generator:
        """At least the VAE and the text encoders."""
        return self._loaded or self._load(("text", "vae"))

    def full(self) -> Generator:
        """The transformer too."""
        if self._loaded is None or self._loaded.transformer.device.type == "meta":
            return self._load(("text", "vae", "transformer"))
        return self._loaded

    def prints(self) -> tuple[str, str]:
        """Short hashes of what the VAE and the text encoders compute, number format and prompt length included; nothing is loaded."""
        text = [name for name in self._family().text if self.options["text_encoder_3"] or not name.endswith("_3")]
        kind = str(self.options["dtype"])
        facts = [
            (of_parts(self.ref, self.options["revision"], ["vae"], flag=self.flag), kind),
            (
                of_parts(
                    self.ref, self.options["revision"], text, flag=self.flag, bits=self.options["kernels"].quantize
                ),
                kind,
                self.options["max_sequence_length"],
            ),
        ]
        vae, words = (hashlib.sha256(repr(fact).encode()).hexdigest()[:16] for fact in facts)
        return vae, words

    def image_size(self) -> int:
        """Side in pixels of the pictures that the model was made for; nothing is loaded."""
        family, config, factor = self._configs()
        return family.image_size(config, factor)

    def check_resolution(self, resolution: int | None) -> None:
        """Raises InputError for a side in pixels that the model cannot take, before anything is loaded or encoded."""
        if resolution is not None:
            check_side("--resolution", resolution, *self._configs())

    def _configs(self) -> tuple[Family, dict[str, Any], int]:
        """The family, its denoiser's config, and the pixels on a latent pixel's side."""
        where, revision, family = local_or_hub(self.ref, self.flag), self.options["revision"], self._family()
        with explained(self.ref, self.flag), quiet_libraries():
            kind: Any = part_class("vae", read_index(where, revision).get("vae"), f"{self.flag} {self.ref}")
            vae = kind.load_config(where, subfolder="vae", revision=revision)
            return family, denoiser_config(family, where, revision), family.vae_factor(vae)

    def _family(self) -> Family:
        with explained(self.ref, self.flag), quiet_libraries():
            index = read_index(local_or_hub(self.ref, self.flag), self.options["revision"])
        return family_of(str(index.get("_class_name")), f"{self.flag} {self.ref}")

    def free(self, *, keep_text: bool = False) -> None:
        """Let go of the weights, or of all but the text encoders."""
        if self._loaded is not None and keep_text:
            self._loaded.pipe.vae = None
        elif self._loaded is not None:
            self._loaded.free()
            self._loaded = None

    def _load(self, components: tuple[str, ...]) -> Generator:
        self._loaded = Generator.load(self.ref, components=components, flag=self.flag, **self.options)
        return self._loaded


def parse_ratio(item: str) -> tuple[str, float]:
    """`NAME=0.3` as name and ratio; a ratio that is not given is 1."""
    name, value = split_ratio(item)
    if value is None:
        return name, 1.0
    if not value > 0 or value == float("inf"):
        raise InputError(
            f"--data {item}: the ratio must be above 0", hint="for example --data hpdv3=0.8 --data my.parquet=0.2"
        )
    return name, value


def load_preferences(
    name: str,
    split: str,
    config: Any,
    generator: LazyGenerator,
    reporter: Reporter,
    *,
    flag: str,
    prompts: int | None = None,
) -> Preferences:
    """A dataset by name, or a file by path. `prompts` is how many captions of a set that is made to draw."""
    if name in MADE:
        return MADE[name](
            split,
            prompts=prompts or config.shapes_prompts,
            generated=config.shapes_generated,
            seed=config.seed if split == "train" else 0,
            load_generator=generator.full,
            root=cache_folder(config),
            reporter=reporter,
        )
    path = package_path(name)
    try:
        found = read(
            path, data_dir=config.data_dir, split=split, allow_outside=config.allow_outside, max_bad=config.max_bad
        )
    except DrmError as error:
        if not error.message.startswith(flag):
            error.message = f"{flag} {error.message}"
        raise
    if found.bad_rows:
        reporter.warn(f"{found.name}: left out {len(found.bad_rows)} bad rows, the first: {found.bad_rows[0]}")
    return found


def cache_folder(config: Any) -> Path:
    """Where what is encoded is kept; with --no-cache a folder that is gone when the process ends."""
    return _for_now() if config.no_cache else cache.cache_root(config.cache_dir)


@lru_cache(1)
def _for_now() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="drmcli-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def strict(data: Preferences) -> Preferences:
    """The pairs that are no ties."""
    return data.subset(~data.is_tie) if data.is_tie.any() else data


def first_pairs(data: Preferences, count: int) -> Preferences:
    """The first whole prompts, in the data's order, that make up at least `count` pairs."""
    if len(data) <= count:
        return data
    prompt = data.pairs["prompt"].to_numpy()
    ends = np.flatnonzero(np.r_[prompt[1:] != prompt[:-1], True])
    return data.subset(np.arange(ends[np.searchsorted(ends, count - 1)] + 1))


def encode_pairs(
    data: Preferences,
    config: Any,
    generator: LazyGenerator,
    run: Run,
    *,
    resolution: int | None,
    workers: cache.Workers = cache.ALONE,
) -> tuple[EncodedPairs, list[str], list[str]]:
    """Encode what is not cached. Bad pictures are named, counted and left out with their pairs.

    Returns the pairs that remain, the bad pictures as "key: reason", and warnings about prompts that were cut. Raises
    RunError when more than `max_bad` percent are bad, after writing the list to bad_images.txt.
    """
    generator.check_resolution(resolution)
    root = cache_folder(config)
    shared: dict[str, Any] = {
        "root": root,
        "batch_size": config.encode_batch_size,
        "reporter": run.reporter,
        "workers": workers,
    }
    prompts = open_prompts(
        data.prompts, generator, where=config.prompt_cache, dtype=config.cache_dtype, note=run.note, **shared
    )
    pictures = cache.encode_pictures(data.images, generator, resolution=resolution, **shared)
    encoded = Encoded(pictures, prompts)
    lost = [f"{data.images[i].key}: {reason}" for i, reason in sorted(pictures.bad.items())]
    if lost:
        if workers.rank == 0:
            write_text(run.path("bad_images.txt"), "".join(line + "\n" for line in lost))
        share = 100 * len(lost) / len(data.images)
        if share > config.max_bad:
            raise RunError(
                f"{data.name}: {len(lost)} of {len(data.images)} images ({share:.1f} %) cannot be read, the first is {lost[0]}",
                hint=f"see {run.folder / 'bad_images.txt'}; mend them, or raise --max-bad",
            )
        run.warn(f"{data.name}: left out {len(lost)} images that cannot be read, the first is {lost[0]}")
        bad = np.zeros(len(data.images), bool)
        bad[list(pictures.bad)] = True
        pairs = data.pairs
        fine = ~(bad[pairs["chosen"].to_numpy()] | bad[pairs["rejected"].to_numpy()])
        data = Preferences(**{**vars(data), "pairs": pairs[fine].reset_index(drop=True)})
    weightless = int((data.pairs["weight"] <= 0).sum())
    if weightless:  # says nothing about which is better, and a batch of them would have no mean
        data = Preferences(**{**vars(data), "pairs": data.pairs[data.pairs["weight"] > 0].reset_index(drop=True)})
    if not len(data.pairs):
        raise InputError(
            f"{data.name}: no usable pair is left: "
            + " and ".join(
                [f"{weightless} have the weight 0"] * (weightless > 0)
                + [f"{len(lost)} images cannot be read"] * (len(lost) > 0)
            ),
            hint=f"see {run.folder / 'bad_images.txt'}" if lost else "give pairs a weight above 0, or leave weight out",
        )
    cut = prompts.cut
    warnings = [
        f"{data.name}: {cut} of {len(data.prompts)} prompts are longer than the text encoders read; their ends are cut"
    ]
    return EncodedPairs(data, encoded), lost, warnings if cut else []


class PairScorer:
    """Scores every picture of a set of pairs once at each sigma, however many pairs it is in."""

    def __init__(self, pairs: IndexedPairs):
        both = np.stack([np.r_[pairs.prompt, pairs.prompt], np.r_[pairs.chosen, pairs.rejected]], axis=1)
        self.items, inverse = np.unique(both, axis=0, return_inverse=True)  # [N, 2] prompt, image
        inverse = inverse.reshape(-1)
        self.left, self.right = inverse[: len(pairs)], inverse[len(pairs) :]
        self.pairs = pairs
        self.batch = Batch(hint=SMALLER)

    def score(
        self,
        model: Callable[[Tensor, float, PromptEmbeds], Tensor],
        index: np.ndarray,
        sigmas: list[float],
        *,
        noise_samples: int,
        seed: int,
        device: torch.device,
        shared_noise: bool = False,
    ) -> Tensor:
        """Scores [len(index), len(sigmas)] of these items. shared_noise: the pictures of a prompt have one noise."""
        assert isinstance(self.pairs, EncodedPairs)
        encoded, data = self.pairs.encoded, self.pairs.data

        def some(at: slice) -> Tensor:
            prompt, image = self.items[index[at], 0], self.items[index[at], 1]
            unique, where = np.unique(prompt, return_inverse=True)
            cond = encoded.prompts(unique.tolist()).to(device)[torch.from_numpy(where.reshape(-1)).to(device)]
            latents = encoded.latents(image.tolist()).to(device)
            if shared_noise:
                keys = [data.prompts[i] for i in prompt]
            else:
                keys = [encoded.pictures.key(i) or "" for i in image]
            return score_clean(model, latents, cond, keys, sigmas, noise_samples=noise_samples, seed=seed)

        return torch.cat(self.batch.each(some, len(index)))
