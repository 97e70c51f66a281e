"""Micro-batches of preference pairs: which pairs, sigmas and noise a step has depends on the seed and its number alone.

All is drawn for the global batch and then cut: a resumed run, another split into micro-batches, or another number of processes sees
the same. Dimension letters: N pairs, U pictures, K prompts of a micro-batch, C, H, W latent channels, height, width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drmcli.config import TrainReward
from drmcli.data.cache import Pictures
from drmcli.data.preferences import Preferences
from drmcli.data.sources import PromptSource
from drmcli.errors import InputError
from drmcli.families.base import Conditioning
from drmcli.run import seed_of

GROUP_PAIRS = 12
"""Pairs of one prompt that stay together in a batch, so that their pictures are scored once."""


class IndexedPairs:
    """Preference pairs as arrays [P] of positions."""

    def __init__(self, data: Preferences):
        pairs = data.pairs
        self.data = data
        self.prompt = pairs["prompt"].to_numpy(np.int64)
        self.chosen = pairs["chosen"].to_numpy(np.int64)
        self.rejected = pairs["rejected"].to_numpy(np.int64)
        self.label = pairs["label"].to_numpy(np.float32)
        self.weight = pairs["weight"].to_numpy(np.float32)

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass
class Encoded:
    """A dataset's pictures and prompts as the model takes them, by position in its lists."""

    pictures: Pictures
    source: PromptSource

    def latents(self, index: Sequence[int]) -> Tensor:
        """Clean latents [len(index), C, H, W] of pictures, float32 on the CPU."""
        return self.pictures.latents(index)

    def prompts(self, index: Sequence[int]) -> Conditioning:
        """Conditioning of prompts; on the encoders' device where they are asked live."""
        return self.source.prompts(index)


class EncodedPairs(IndexedPairs):
    """The same with their encoded pictures and prompts."""

    def __init__(self, data: Preferences, encoded: Encoded):
        super().__init__(data)
        self.encoded = encoded


class PairStream:
    """An endless shuffled stream of pair indices; pairs of one prompt come together. Any stretch can be had at any time."""

    def __init__(self, prompt: np.ndarray, seed: int):
        order = np.argsort(prompt, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(prompt[order]) != 0])
        runs = np.diff(np.r_[starts, len(order)])
        pieces = [
            order[s + i : s + min(i + GROUP_PAIRS, n)]
            for s, n in zip(starts, runs)
            for i in range(0, int(n), GROUP_PAIRS)
        ]
        self.pieces = pieces
        self.total = len(prompt)
        self.seed = seed
        self._epoch = -1
        self._pairs = order

    def take(self, start: int, count: int) -> np.ndarray:
        """Pairs start .. start + count of the stream."""
        out = []
        while count > 0:
            epoch, offset = divmod(start, self.total)
            if epoch != self._epoch:
                rng = np.random.default_rng(seed_of("order", self.seed, epoch))
                self._pairs = np.concatenate([self.pieces[i] for i in rng.permutation(len(self.pieces))])
                self._epoch = epoch
            some = self._pairs[offset : offset + count]
            out.append(some)
            start, count = start + len(some), count - len(some)
        return np.concatenate(out)


def micro_batches(config: TrainReward, processes: int) -> tuple[int, int]:
    """(number of forward passes a step and process, pairs in each)."""
    share = config.batch_size // max(1, processes)
    size = min(config.micro_batch_size or share, max(1, share))
    return max(1, share // size), size


def check_sizes(config: TrainReward, processes: int) -> None:
    """Raises InputError for a batch that does not split evenly, and for sigmas from above to below."""
    count, size = micro_batches(config, processes)
    if count * size * processes != config.batch_size:
        raise InputError(
            f"--set batch_size: {config.batch_size} pairs do not split into {processes} processes of whole micro-batches of {size}",
            hint="choose a batch_size that is a multiple of processes x micro_batch_size",
        )
    if config.sigma_min > config.sigma_max:
        raise InputError(f"--set sigma_min: {config.sigma_min} is above sigma_max {config.sigma_max}", hint="swap them")


@dataclass
class Batch:
    """One micro-batch: pictures once each, pairs as positions among them. U pictures, N pairs."""

    latents: Tensor
    """[U, C, H, W] clean."""
    noise: Tensor
    """[U, C, H, W]."""
    sigma: Tensor
    """[U]."""
    cond: Conditioning
    """A row a prompt; there are K."""
    prompt: Tensor
    """[U] positions among the prompts."""
    chosen: Tensor
    """[N] positions among the pictures."""
    rejected: Tensor
    """[N]."""
    label: Tensor
    """[N]."""
    weight: Tensor
    """[N]; the weights of a global batch sum to 1."""

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})

    @property
    def conds(self) -> Conditioning:
        """U rows of conditioning, expanded here and so on the device: a prompt's pictures need it sent only once."""
        return self.cond[self.prompt]


class Batches:
    """Micro-batches of any step, the same whatever came before, and whatever the number of processes."""

    def __init__(self, config: TrainReward, sets: list[EncodedPairs], ratios: list[float]):
        self.config = config
        self.sets = sets
        self.streams = [PairStream(s.prompt, seed_of(config.seed, i)) for i, s in enumerate(sets)]
        shares = np.array(ratios) / sum(ratios)
        counts = np.floor(shares * config.batch_size).astype(int)
        order = np.argsort(counts - shares * config.batch_size, kind="stable")
        counts[order[: config.batch_size - counts.sum()]] += 1
        self.counts = counts.tolist()

    def global_batch(self, step: int) -> list[tuple[int, int]]:
        """(set, pair) of every pair of a step."""
        return [
            (i, int(pair))
            for i, (stream, count) in enumerate(zip(self.streams, self.counts))
            if count
            for pair in stream.take(step * count, count)
        ]

    def micro(self, step: int, processes: int, process: int) -> list[Batch]:
        """The micro-batches of one process. Sigmas and noise are drawn for the global batch and then cut."""
        config = self.config
        members = self.global_batch(step)
        rng = torch.Generator().manual_seed(seed_of("step", config.seed, step))
        groups = {key: g for g, key in enumerate(dict.fromkeys((i, int(self.sets[i].prompt[p])) for i, p in members))}
        sigma = draw_sigmas(config, len(groups), rng)
        pictures = [(i, int(side[p])) for i, p in members for side in (self.sets[i].chosen, self.sets[i].rejected)]
        seeds = {key: g for g, key in enumerate(dict.fromkeys(pictures))} if not config.shared_noise else groups
        shape = self.sets[0].encoded.latents([int(self.sets[0].chosen[0])]).shape[1:]
        noise = torch.randn((len(seeds), *shape), generator=rng)
        total = sum(float(self.sets[i].weight[p]) for i, p in members)
        count, size = micro_batches(config, processes)
        start = process * count * size
        return [
            self._cut(members[start + m * size : start + (m + 1) * size], groups, seeds, sigma, noise, total)
            for m in range(count)
        ]

    def upcoming(self, steps: range, processes: int, process: int, *, ahead: bool) -> Iterator[list[Batch]]:
        """The micro-batches of each step; with `ahead` the next step's are read while one's are computed.

        Not so on the CPU: a second thread's OpenMP team spins beside the first one's and halves the speed.
        """
        if not ahead:
            yield from (self.micro(step, processes, process) for step in steps)
            return
        with ThreadPoolExecutor(1) as reader:
            following = None
            for step in steps:
                micro = following.result() if following else self.micro(step, processes, process)
                following = reader.submit(self.micro, step + 1, processes, process) if step + 1 in steps else None
                yield micro

    def _cut(
        self,
        members: list[tuple[int, int]],
        groups: dict[tuple[int, int], int],
        seeds: dict[tuple[int, int], int],
        sigma: Tensor,
        noise: Tensor,
        total: float,
    ) -> Batch:
        # A picture counts once for each prompt it is judged by.
        place: dict[tuple[int, int, int], int] = {}
        chosen: list[int] = []
        rejected: list[int] = []
        label: list[float] = []
        weight: list[float] = []
        for i, p in members:
            s = self.sets[i]
            prompt = int(s.prompt[p])
            for side, out in ((s.chosen, chosen), (s.rejected, rejected)):
                out.append(place.setdefault((i, prompt, int(side[p])), len(place)))
            label.append(float(s.label[p]))
            weight.append(float(s.weight[p]) / total)
        items = list(place)
        group = torch.tensor([groups[(i, prompt)] for i, prompt, _ in items])
        source = group if self.config.shared_noise else torch.tensor([seeds[(i, image)] for i, _, image in items])
        latents: list[Tensor] = []
        conds: list[Conditioning] = []
        at: list[int] = []
        known = 0
        for i, s in enumerate(self.sets):
            mine = [(prompt, image) for j, prompt, image in items if j == i]
            if mine:
                latents.append(s.encoded.latents([image for _, image in mine]))
                unique = {prompt: known + k for k, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in mine))}
                conds.append(s.encoded.prompts(list(unique)))
                at += [unique[prompt] for prompt, _ in mine]
                known += len(unique)
        return Batch(
            latents=torch.cat(latents),
            noise=noise[source],
            sigma=sigma[group],
            cond=Conditioning.cat(conds),
            prompt=torch.tensor(at),
            chosen=torch.tensor(chosen),
            rejected=torch.tensor(rejected),
            label=torch.tensor(label),
            weight=torch.tensor(weight),
        )


def draw_sigmas(config: TrainReward, count: int, rng: torch.Generator) -> Tensor:
    """Sigmas [count] in [sigma_min, sigma_max] by the config's density."""
    if config.sigma_density == "fixed":
        return torch.full((count,), config.sigma_max)
    if config.sigma_density == "uniform":
        u = torch.rand(count, generator=rng)
    else:
        u = torch.normal(config.logit_mean, config.logit_std, (count,), generator=rng).sigmoid()
    return config.sigma_min + (config.sigma_max - config.sigma_min) * u
