"""Preference pairs in memory, from whatever source: which of two pictures people like better for a prompt.

Rankings become pairs when they are read. Every picture and every prompt is listed once; pairs point at them by index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from drmcli.data.images import MAX_PIXELS, BadImage, ImageSource, decode
from drmcli.errors import InputError

SIDES_SEED = 20230615
"""Draws the sides where a file always lists the preferred picture first."""


@dataclass
class Preferences:
    """Pairs of pictures with the preferred one known."""

    name: str
    split: str
    protocol: str
    """The dataset's own accuracy protocol: `hpdv2`, `strict`, `ties-half` or `pickscore-threshold`."""
    images: list[ImageSource]
    """Unique pictures."""
    prompts: list[str]
    prompt_ids: list[str]
    """One a prompt, unique. A publisher's list is a prompt of its own, even where another list has the same text."""
    pairs: pd.DataFrame
    """One row a pair, index 0..n-1: `pair_id` str, unique; `prompt` int, index into prompts; `chosen` and `rejected`
    int, indices into images; `label` float, the probability that chosen is better: 1, soft, or 0.5 for a tie, never
    below; `weight` float >= 0; `chosen_first` bool, chosen comes first in the data's own order (drawn by a fixed seed
    where the data always lists it first). Where known: `dataset`, `source_chosen` and `source_rejected` (which model
    drew it), `source`, `category`, `agreement` (share of annotators who prefer chosen, ties halved)."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Why pairs of the data are not in `pairs`, and how many."""
    bad_rows: list[str] = field(default_factory=list)
    """Rows of the data that could not be used, each with its place and what is wrong."""

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def is_tie(self) -> np.ndarray:
        """bool [pairs]: people found neither better."""
        return self.pairs["label"].to_numpy() == 0.5

    def subset(self, rows: Sequence[int] | np.ndarray) -> Preferences:
        """The pairs at these positions (indices or a bool mask), in this order, without unused pictures and prompts."""
        index = np.asarray(rows)
        pairs = self.pairs.iloc[np.flatnonzero(index) if index.dtype == bool else index.astype(int)].copy()
        used = np.unique(pairs[["chosen", "rejected"]].to_numpy())
        asked = np.unique(pairs["prompt"].to_numpy())
        for side in ("chosen", "rejected"):
            pairs[side] = np.searchsorted(used, pairs[side].to_numpy())
        pairs["prompt"] = np.searchsorted(asked, pairs["prompt"].to_numpy())
        return replace(
            self,
            images=[self.images[i] for i in used],
            prompts=[self.prompts[i] for i in asked],
            prompt_ids=[self.prompt_ids[i] for i in asked],
            pairs=pairs.reset_index(drop=True),
            dropped=dict(self.dropped),
        )

    def without_images(self, keys: set[str]) -> Preferences:
        """All pairs but those that show one of these pictures; their number is noted in `dropped`."""
        bad = np.array([image.key in keys for image in self.images], dtype=bool)
        hit = bad[self.pairs["chosen"].to_numpy(int)] | bad[self.pairs["rejected"].to_numpy(int)]
        kept = self.subset(~hit)
        return replace(kept, dropped=_added(self.dropped, {"unreadable picture": int(hit.sum())}))

    def split_by_prompt(self, share: float, seed: int) -> tuple[Preferences, Preferences]:
        """(rest, held out): about `share` of the prompt texts, at least one of at least two, with all their pairs.

        The draw depends on the text and the seed alone: it stays when the data grows, and no text is on both sides.
        """
        texts = sorted(set(self.prompts), key=lambda text: hashlib.sha256(f"{seed} {text}".encode()).digest())
        if len(texts) < 2:
            raise InputError(
                f"{self.name}: one prompt cannot be split in two",
                hint="give held-out pairs of their own, or more prompts",
            )
        held = set(texts[: min(max(1, round(share * len(texts))), len(texts) - 1)])
        mask = np.array([text in held for text in self.prompts])[self.pairs["prompt"].to_numpy(int)]
        return self.subset(~mask), self.subset(mask)


def text_id(text: str) -> str:
    """A prompt's id where the data has none: 12 hex digits of the SHA-256 of its text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def assemble(
    name: str,
    split: str,
    protocol: str,
    sources: Mapping[str, ImageSource] | Callable[[str], ImageSource],
    table: pd.DataFrame,
    *,
    draw_sides: bool = False,
    dropped: Mapping[str, int] | None = None,
    bad_rows: Sequence[str] = (),
) -> Preferences:
    """Preferences from one row a comparison.

    `table` has columns prompt, prompt_id, pair_id, first, second (picture keys, in the data's order), label
    (probability that first is better) and may have weight, source_first, source_second, agreement (share that prefers
    first), source, category. `draw_sides`: the order in the data means nothing, so which side came first is drawn by a
    fixed seed.
    """
    same = (table["first"] == table["second"]).to_numpy(bool)
    dropped = _added(dropped or {}, {"same picture on both sides": int(same.sum()), "bad row": len(bad_rows)})
    table = table[~same]
    keys = np.concatenate([table["first"].to_numpy(object), table["second"].to_numpy(object)])
    # Interleaved, so that pictures are numbered in the order of the data: readers are fastest in that order.
    codes, unique = pd.factorize(keys.reshape(2, -1).T.reshape(-1))
    sides = codes.reshape(-1, 2)
    prompt, prompt_ids = pd.factorize(table["prompt_id"].to_numpy(object))
    prompts = table["prompt"].to_numpy(object)[np.unique(prompt, return_index=True)[1]]
    different = np.flatnonzero(prompts[prompt] != table["prompt"].to_numpy(object))
    if len(different):
        raise InputError(
            f"{name}: prompt_id {prompt_ids[prompt[different[0]]]!r} has more than one prompt",
            hint="give each prompt an id of its own, or leave the column prompt_id out",
        )
    label = table["label"].to_numpy(float)
    first_is_better = label >= 0.5
    drawn = np.random.default_rng(SIDES_SEED).random(len(table)) < 0.5
    pairs = pd.DataFrame(
        {
            "pair_id": table["pair_id"].astype(str).to_numpy(object),
            "prompt": prompt.astype(np.int64),
            "chosen": np.where(first_is_better, sides[:, 0], sides[:, 1]),
            "rejected": np.where(first_is_better, sides[:, 1], sides[:, 0]),
            "label": np.where(first_is_better, label, 1 - label),
            "weight": table["weight"].to_numpy(float) if "weight" in table else np.ones(len(table)),
            "chosen_first": drawn if draw_sides else first_is_better,
        }
    )
    if {"source_first", "source_second"} <= set(table.columns):
        first, second = (table[f"source_{side}"].to_numpy(object) for side in ("first", "second"))
        pairs["source_chosen"] = np.where(first_is_better, first, second)
        pairs["source_rejected"] = np.where(first_is_better, second, first)
    if "agreement" in table:
        agreement = table["agreement"].to_numpy(float)
        pairs["agreement"] = np.where(first_is_better, agreement, 1 - agreement)
    for column in ("source", "category"):
        if column in table:
            pairs[column] = table[column].to_numpy(object)
    get = sources if callable(sources) else sources.__getitem__
    images = [get(key) for key in unique]
    return Preferences(
        name, split, protocol, images, [str(p) for p in prompts], [str(i) for i in prompt_ids], pairs, dropped,
        list(bad_rows),
    )  # fmt: skip


def ranked_pairs(ranks: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs i < j of a ranking (1 is best; ties, gaps allowed): i, j, label (1 i is better, 0.5 tied, 0 worse)."""
    rank = np.asarray(ranks, dtype=float)
    i, j = np.triu_indices(len(rank), 1)
    return i, j, 0.5 - 0.5 * np.sign(rank[i] - rank[j])


def mix(
    datasets: Sequence[Preferences],
    ratios: Sequence[float] | None = None,
    *,
    seed: int = 0,
    total: int | None = None,
) -> Preferences:
    """One set of pairs from several, shuffled by `seed`.

    With `ratios`, these are the datasets' shares of the pairs. `total` is the number of pairs; by default all of them,
    or with ratios as many as fit without repeating a pair. A dataset that is asked for more than it has repeats whole
    copies of itself before a part. Without ratios, a `total` cuts in proportion to the sizes. Raises InputError for
    ratios that do not fit.
    """
    if not datasets:
        raise InputError("data: no dataset to mix", hint="name at least one dataset or file")
    for dataset in datasets:
        if not len(dataset):
            raise InputError(f"{dataset.name}: has no pairs to mix", hint="leave it out, or loosen its filter")
    sizes = np.array([len(dataset) for dataset in datasets], dtype=float)
    shares = sizes if ratios is None else np.asarray(ratios, dtype=float)
    if len(shares) != len(datasets) or not np.isfinite(shares).all() or (shares <= 0).any():
        raise InputError(
            f"ratios: {list(shares)} do not fit {len(datasets)} datasets",
            hint="give one number above 0 for each dataset",
        )
    shares = shares / shares.sum()
    wanted = float((sizes / shares).min()) if total is None else float(total)
    counts = np.maximum(np.floor(wanted * shares + 1e-9).astype(int), 1)
    if len({dataset.name for dataset in datasets}) < len(datasets):
        datasets = [replace(dataset, name=f"{i + 1}-{dataset.name}") for i, dataset in enumerate(datasets)]
    rng = np.random.default_rng(seed)
    images: list[ImageSource] = []
    prompts: list[str] = []
    prompt_ids: list[str] = []
    frames: list[pd.DataFrame] = []
    dropped: dict[str, int] = {}
    for dataset, count in zip(datasets, counts, strict=True):
        n = len(dataset)
        rounds = np.arange(count) // n
        rows = np.concatenate([rng.permutation(n) for _ in range(rounds[-1] + 1)])[:count]
        frame = dataset.pairs.iloc[rows].copy()
        again = np.where(rounds == 0, "", [f"#{k + 1}" for k in rounds])
        frame["pair_id"] = [
            f"{dataset.name}/{pair_id}{mark}" for pair_id, mark in zip(frame["pair_id"], again, strict=True)
        ]
        if "dataset" not in frame:
            frame["dataset"] = dataset.name
        for side in ("chosen", "rejected"):
            frame[side] += len(images)
        frame["prompt"] += len(prompts)
        images += [replace(image, key=f"{dataset.name}/{image.key}") for image in dataset.images]
        prompts += dataset.prompts
        prompt_ids += [f"{dataset.name}/{prompt_id}" for prompt_id in dataset.prompt_ids]
        dropped = _added(dropped, dataset.dropped)
        frames.append(frame)
    pairs = pd.concat(frames, ignore_index=True)
    splits, protocols = ({getattr(d, what) for d in datasets} for what in ("split", "protocol"))
    mixed = Preferences(
        "+".join(dataset.name for dataset in datasets),
        splits.pop() if len(splits) == 1 else "mixed",
        protocols.pop() if len(protocols) == 1 else "strict",
        images,
        prompts,
        prompt_ids,
        pairs,
        dropped,
        [row for dataset in datasets for row in dataset.bad_rows],
    )
    return mixed.subset(rng.permutation(len(pairs)))


@dataclass
class CheckReport:
    """What is in a set of pairs, and what is wrong with it."""

    n_images: int
    n_prompts: int
    n_pairs: int
    n_ties: int
    bad: list[tuple[str, str]]
    """(key, reason) of every picture that cannot be read."""
    n_bad_pairs: int
    """Pairs that show one of them."""
    duplicates: list[list[str]]
    """Keys of pictures that are byte for byte the same, a list a group."""
    empty_prompts: list[str]
    """Ids of prompts without text."""
    repeated_prompts: int
    """Prompts whose text another prompt already has."""
    dropped: dict[str, int]
    bad_rows: list[str]
    """Rows that cannot be used, with their places."""
    digests: dict[str, str]
    """SHA-256 of every picture that can be read, by key."""
    prompts: set[str] = field(repr=False)

    @property
    def ok(self) -> bool:
        """Nothing is unreadable and no prompt is empty. Duplicates and ties are facts, not faults."""
        return not self.bad and not self.bad_rows and not self.empty_prompts


def check(
    preferences: Preferences,
    *,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Read and decode every picture once and report. `progress` gets (pictures done, pictures in all)."""
    bad: list[tuple[str, str]] = []
    digests: dict[str, str] = {}
    for done, source in enumerate(preferences.images, 1):
        try:
            data = source.read()
            decode(data, source.key, max_pixels=max_pixels)
            digests[source.key] = hashlib.sha256(data).hexdigest()
        except BadImage as error:
            bad.append((source.key, error.reason))
        if progress is not None:
            progress(done, len(preferences.images))
    groups: dict[str, list[str]] = {}
    for key, digest in digests.items():
        groups.setdefault(digest, []).append(key)
    kept = preferences.without_images({key for key, _ in bad})
    texts = set(preferences.prompts)
    return CheckReport(
        n_images=len(preferences.images),
        n_prompts=len(preferences.prompts),
        n_pairs=len(preferences),
        n_ties=int(preferences.is_tie.sum()),
        bad=bad,
        n_bad_pairs=len(preferences) - len(kept),
        duplicates=[keys for keys in groups.values() if len(keys) > 1],
        empty_prompts=[i for i, p in zip(preferences.prompt_ids, preferences.prompts, strict=True) if not p.strip()],
        repeated_prompts=len(preferences.prompts) - len(texts),
        dropped=dict(preferences.dropped),
        bad_rows=list(preferences.bad_rows),
        digests=digests,
        prompts=texts,
    )


@dataclass
class Overlap:
    """What two sets share: a held-out set should share nothing with what was trained on."""

    images: list[tuple[str, str]]
    """(key in the first, key in the second) of pictures with the same bytes."""
    prompts: list[str]


def overlap(first: CheckReport, second: CheckReport) -> Overlap:
    """Pictures and prompts that are in both sets, by content."""
    by_digest = {digest: key for key, digest in first.digests.items()}
    images = [(by_digest[digest], key) for key, digest in second.digests.items() if digest in by_digest]
    return Overlap(images, sorted(first.prompts & second.prompts))


def _added(one: Mapping[str, Any], other: Mapping[str, int]) -> dict[str, int]:
    """The sum of two counts by reason, without the zeros."""
    total = {key: int(one.get(key, 0)) + int(other.get(key, 0)) for key in [*one, *other]}
    return {key: count for key, count in total.items() if count}
