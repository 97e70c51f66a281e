"""The dataset `shapes`: pictures of the embedded world, ranked by its judge, made from a seed.

Four pictures a caption: rendered with random flaws, or sampled by a generator. In the train split each pair's label is
drawn as people's are, P(a over b) = sigmoid(16 x judge gap); in val and test the judge's own order is the label, pairs closer
than 0.03 being left out. The captions of the three splits are disjoint.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from drmcli.data.images import BytesImage
from drmcli.data.parquet import read_table
from drmcli.data.preferences import Preferences
from drmcli.files import make_folder
from drmcli.generator import Generator
from drmcli.run import Reporter, seed_of, write_bytes
from drmcli.tiny import world
from drmcli.tiny.judge import judge

GROUP = 4
"""Pictures a caption."""
SHARPNESS = 16.0
"""Slope of the Bradley-Terry noise of train labels."""
MIN_GAP = 0.03
"""Judge difference below which a held-out pair is left out."""
SAMPLE_STEPS = 8
VERSION = 6


def load_shapes(
    split: str,
    *,
    prompts: int,
    generated: float,
    seed: int,
    load_generator: Callable[[], Generator],
    root: Path,
    reporter: Reporter,
) -> Preferences:
    """Pairs of `prompts` captions of a split. Drawn once and kept under `root`; the same arguments give the same pairs.

    generated: share of the captions whose pictures are the generator's samples, at guidance scales 1 to 4.
    """
    make_folder(root)
    texts = list(world.captions(split))
    rng = np.random.default_rng(seed_of("shapes", split, seed))
    order = [texts[i] for i in rng.permutation(len(texts))]
    chosen = (order * -(-prompts // len(order)))[:prompts]
    sampled = round(generated * prompts)
    generator_print = "none"
    generator = None
    if sampled:
        generator = load_generator()
        prints = generator.prints((*generator.family.text, "vae", "transformer"))
        generator_print = hashlib.sha256(repr(sorted(prints.items())).encode()).hexdigest()[:16]
    name = f"{split}-{prompts}-{sampled}-{seed}-{generator_print}-v{VERSION}.parquet"
    file = root / "shapes" / name
    if not file.is_file():
        pictures = _render(chosen[sampled:], rng)
        if generator is not None:
            ours = _sample(chosen[:sampled], generator, seed, reporter)
            pictures = np.concatenate([ours, pictures])
        captions = [text for text in chosen for _ in range(GROUP)]
        write_bytes(file, _pack(captions, pictures, sampled))
    return _pairs(read_table(file), split, seed)


def _render(texts: list[str], rng: np.random.Generator) -> np.ndarray:
    """uint8 [len(texts) * GROUP, 32, 32, 3], three in four of them flawed."""
    return world.draw([text for text in texts for _ in range(GROUP)], rng, flawed=0.75)


def _sample(texts: list[str], generator: Generator, seed: int, reporter: Reporter, batch: int = 16) -> np.ndarray:
    """uint8 [len(texts) * GROUP, 32, 32, 3]: plain samples, the guidance scale rising from 1 to 4 with the batch."""
    out = []
    scales = np.linspace(1.0, 4.0, max(1, -(-len(texts) // batch)))
    for i, scale in zip(range(0, len(texts), batch), scales):
        some = [text for text in texts[i : i + batch] for _ in range(GROUP)]
        rng = torch.Generator().manual_seed(seed_of("shapes-sample", seed, i))
        images = generator.pipe(
            some,
            num_inference_steps=SAMPLE_STEPS,
            guidance_scale=float(scale),
            max_sequence_length=generator.max_sequence_length,
            generator=rng,
        ).images
        out += [np.asarray(image.convert("RGB").resize((world.SIZE, world.SIZE))) for image in images]
        reporter.progress("draw shapes", min(i + batch, len(texts)), len(texts))
    return np.stack(out)


def _pack(captions: list[str], pictures: np.ndarray, sampled: int) -> bytes:
    """Pictures with their judge's scores as a Parquet file."""
    verdict = judge(pictures, captions)
    png = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        png.append(buffer.getvalue())
    source = ["generated"] * (sampled * GROUP) + ["rendered"] * (len(captions) - sampled * GROUP)
    table = pa.table({"prompt": captions, "source": source, "judge": verdict.score.astype(float), "image": png})
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"shapes": json.dumps({"version": VERSION})}), buffer)
    return buffer.getvalue()


def _pairs(table: pa.Table, split: str, seed: int) -> Preferences:
    """All pairs of each caption's pictures with their labels."""
    prompts = table.column("prompt").to_pylist()[::GROUP]
    source = np.array(table.column("source").to_pylist())
    score = table.column("judge").to_numpy()
    images = [
        BytesImage(f"{split}-{i // GROUP:05d}-{i % GROUP}.png", data)
        for i, data in enumerate(table.column("image").to_pylist())
    ]
    sides = np.array(list(combinations(range(GROUP), 2)))  # [6, 2]
    first, second = ((np.arange(len(prompts))[:, None] * GROUP + sides[None, :, side]).ravel() for side in (0, 1))
    prompt = np.repeat(np.arange(len(prompts)), len(sides))
    gap = score[first] - score[second]
    if split == "train":
        rng = np.random.default_rng(seed_of("shapes-labels", seed))
        first_wins = rng.random(len(gap)) < 1 / (1 + np.exp(-SHARPNESS * gap))
        keep = np.ones(len(gap), dtype=bool)
    else:
        first_wins, keep = gap > 0, np.abs(gap) > MIN_GAP
    pairs = pd.DataFrame(
        {
            "pair_id": [f"{split}-{p:05d}-{a % GROUP}{b % GROUP}" for p, a, b in zip(prompt, first, second)],
            "prompt": prompt,
            "chosen": np.where(first_wins, first, second),
            "rejected": np.where(first_wins, second, first),
            "label": 1.0,
            "weight": 1.0,
            "chosen_first": first_wins,
            "source": source[first],
        }
    )[keep]
    return Preferences(
        name="shapes",
        split=split,
        protocol="strict",
        images=list(images),
        prompts=prompts,
        prompt_ids=[f"{split}-{i:05d}" for i in range(len(prompts))],
        pairs=pairs.reset_index(drop=True),
    )
