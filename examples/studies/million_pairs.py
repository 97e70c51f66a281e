"""A data set of real size on this machine: how long reading, the first start, a restart and a step's data take, and how much memory.

    python examples/studies/million_pairs.py --folder /tmp/million

An index in HPDv3's layout with stand-in pictures (hard links to a few small ones) and a stand-in encoder, so that what is measured is
everything but the models. Each stage runs in a process of its own; memory is what it takes beyond the libraries.
`--pairs 2000 --prompts 500 --pictures 1500` makes it small.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from drmcli.config import resolve
from drmcli.data.batches import Batches, Encoded, EncodedPairs
from drmcli.data.cache import encode_pictures
from drmcli.data.datasets import read
from drmcli.data.sources import open_prompts
from drmcli.data.store import SHARD_BYTES, Store, Writer
from drmcli.families.base import Conditioning
from drmcli.run import Silent

LIMITS = {"read": (60, 2.0), "restart": (30, None), "shard": (None, 1.0)}
"""Seconds and GiB of memory, None where there is no limit."""
SIDE = 32
"""Pixels of a stand-in picture."""
PROMPT = (333, 4096)
"""Tokens and width of a prompt of SD3.5 with T5."""


def make(folder: Path, pairs: int, prompts: int, pictures: int) -> None:
    """train.json and images/ in HPDv3's layout."""
    rng = np.random.default_rng(0)
    originals = []
    for i in range(max(1, -(-pictures // 50_000))):  # a file system allows some 65,000 links to a file
        originals.append(folder / f"original-{i}.png")
        Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(originals[-1])
    names = [f"images/{i % 1000:03d}/{i:07d}.png" for i in range(pictures)]
    for i in range(min(1000, pictures)):
        (folder / f"images/{i:03d}").mkdir(parents=True)
    for i, name in enumerate(names):
        os.link(originals[i % len(originals)], folder / name)
    sides = rng.integers(0, pictures, (pairs, 2))
    sides[:, 1] = np.where(sides[:, 0] == sides[:, 1], (sides[:, 1] + 1) % pictures, sides[:, 1])
    with (folder / "train.json").open("w") as file:
        for i, (one, other) in enumerate(sides.tolist()):
            prompt = f"prompt {i % prompts}: a photograph of several things beside each other, in a style of its own, number {i % prompts}"
            row = {
                "prompt": prompt, "path1": names[one], "path2": names[other], "model1": "one", "model2": "two",
                "confidence": 0.99, "choice_dist": [12, 3],
            }  # fmt: skip
            file.write(("[" if i == 0 else ",\n") + json.dumps(row))
        file.write("]\n")


class StandIn:
    """Encoders that cost nothing: latents from a mean, embeddings of a few numbers. `loaded` counts how often they were needed."""

    def __init__(self) -> None:
        self.loaded = 0
        self.pipe = SimpleNamespace(vae=SimpleNamespace(dtype=torch.bfloat16))

    def prints(self) -> tuple[str, str]:
        return "stand-in", "stand-in"

    def image_size(self) -> int:
        return SIDE

    def encoders(self) -> Any:
        self.loaded += 1
        return self

    def encode_images(self, images: list[Image.Image], side: int) -> torch.Tensor:
        return torch.tensor([float(np.asarray(i)[0, 0, 0]) for i in images])[:, None, None, None].expand(-1, 16, 4, 4)

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        return Conditioning(
            prompt_embeds=torch.ones(len(prompts), 4, 8), pooled_prompt_embeds=torch.ones(len(prompts), 8)
        )

    def truncated(self, prompt: str) -> bool:
        return len(prompt) > 400


def encoded(folder: Path, encoders: StandIn) -> EncodedPairs:
    """What train-reward does before its first step."""
    data = read("hpdv3", data_dir=str(folder), split="train")
    shared: dict[str, Any] = {"root": folder / "cache", "batch_size": 64, "reporter": Silent()}
    prompts = open_prompts(data.prompts, encoders, where="disk", dtype="auto", note=print, **shared)
    pictures = encode_pictures(data.images, encoders, resolution=None, **shared)
    return EncodedPairs(data, Encoded(pictures, prompts))


def stage_read(folder: Path) -> dict[str, Any]:
    """Pairs from the publisher's layout."""
    return {"pairs": len(read("hpdv3", data_dir=str(folder), split="train"))}


def stage_start(folder: Path) -> dict[str, Any]:
    """The first start: everything is hashed, cut, resized and stored."""
    pairs = encoded(folder, StandIn())
    return {"pictures": len(pairs.data.images), "prompts": len(pairs.data.prompts)}


def stage_restart(folder: Path) -> dict[str, Any]:
    """A start with a full cache, after the pairs are read: no encoder is loaded."""
    data = read("hpdv3", data_dir=str(folder), split="train")
    encoders, began = StandIn(), time.monotonic()
    shared: dict[str, Any] = {"root": folder / "cache", "batch_size": 64, "reporter": Silent()}
    open_prompts(data.prompts, encoders, where="disk", dtype="auto", note=print, **shared)
    encode_pictures(data.images, encoders, resolution=None, **shared)
    return {"seconds": time.monotonic() - began, "encoders loaded": encoders.loaded}


def stage_step(folder: Path) -> dict[str, Any]:
    """The data of a step of 128 pairs."""
    config = resolve("train-reward", flags={"batch_size": 128})
    batches = Batches(config, [encoded(folder, StandIn())], [1.0])
    batches.micro(0, 1, 0)
    began = time.monotonic()
    for step in range(1, 11):
        batches.micro(step, 1, 0)
    return {"seconds": (time.monotonic() - began) / 10}


def stage_shard(folder: Path) -> dict[str, Any]:
    """Prompts of full size until a shard is written."""
    writer, count = Writer(Store(folder / "shard")), 0
    row = torch.ones(PROMPT, dtype=torch.bfloat16)
    row[:77, PROMPT[1] // 2 :] = 0
    while count * row.nbytes < 1.2 * SHARD_BYTES:
        batch = row.expand(8, *PROMPT).clone()
        writer.add([(count + i).to_bytes(32, "big") for i in range(8)], [{"prompt_embeds": one} for one in batch])
        count += 8
    return {"prompts": count}


STAGES = {"read": stage_read, "start": stage_start, "restart": stage_restart, "step": stage_step, "shard": stage_shard}


def measured(stage: str, folder: Path) -> dict[str, Any]:
    """A stage in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--folder", str(folder), "--stage", stage], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def run_stage(stage: str, folder: Path) -> None:
    """Print a stage's figures as JSON."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    found = STAGES[stage](folder)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    gib = (after.ru_maxrss - before.ru_maxrss) / 2**20
    print(json.dumps({"seconds": time.monotonic() - began, "cpu": cpu, "gib": gib} | found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the index, the pictures and the cache go")
    parser.add_argument("--pairs", type=int, default=1_200_000)
    parser.add_argument("--prompts", type=int, default=300_000)
    parser.add_argument("--pictures", type=int, default=900_000)
    parser.add_argument("--stage", choices=STAGES, help="one stage, in this process")
    args = parser.parse_args()
    if args.stage:
        run_stage(args.stage, args.folder)
        return 0
    if not (args.folder / "train.json").exists():
        args.folder.mkdir(parents=True, exist_ok=True)
        make(args.folder, args.pairs, args.prompts, args.pictures)
    print(f"{args.pairs} pairs, {args.prompts} prompts, {args.pictures} pictures")
    missed = 0
    for stage in STAGES:
        found = measured(stage, args.folder)
        seconds, gib = LIMITS.get(stage, (None, None))
        over = [
            f"{name} above {limit}"
            for name, limit, value in (("seconds", seconds, found["seconds"]), ("GiB", gib, found["gib"]))
            if limit is not None and value > limit
        ]
        missed += bool(over)
        rest = ", ".join(f"{k} {v}" for k, v in found.items() if k not in ("seconds", "gib", "cpu"))
        verdict = f"MISSED: {', '.join(over)}" if over else "within its limits" if stage in LIMITS else "no limit"
        print(
            f"{stage:8} {found['seconds']:9.2f} s  {found['cpu']:8.1f} s cpu  {found['gib']:6.2f} GiB  {verdict}  {rest}",
            flush=True,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
