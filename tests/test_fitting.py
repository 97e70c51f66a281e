"""Batches are halved where memory does not suffice, say so once, and give the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from drmcli.config import resolve
from drmcli.errors import DrmWarning, RunError
from drmcli.fitting import Batch
from drmcli.generator import Generator
from drmcli.recipes import bench, grpo, sample, score
from drmcli.reward import RewardModel
from drmcli.run import Silent

CAPTION = "a large red circle above a small blue square"


def full(size: int, room: int) -> None:
    """As CUDA's allocator fails."""
    if size > room:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """No pass of any model takes more than so many rows."""

    def limited(kind: type, name: str, room: int) -> None:
        original = getattr(kind, name)

        def guarded(self, first, *args, **kwargs):
            full(len(first), room)
            return original(self, first, *args, **kwargs)

        monkeypatch.setattr(kind, name, guarded)

    def limit(room: int) -> None:
        family = type(Generator.load(resolve("sample").generator, components=()).family)
        limited(RewardModel, "features", room)
        limited(Generator, "_pass", room)
        for name in ("encode_images", "decode", "encode_prompts"):
            original = getattr(family, name)

            def guarded(self, pipe, rows, *args, original=original):
                full(len(rows), room)
                return original(self, pipe, rows, *args)

            monkeypatch.setattr(family, name, guarded)

    return limit


def test_halving() -> None:
    tried = []

    def work(at: slice) -> list[int]:
        tried.append(at.stop - at.start)
        full(at.stop - at.start, 3)
        return list(range(at.start, at.stop))

    batch = Batch(16, "pictures", flag="--batch-size")
    with pytest.warns(DrmWarning) as said:
        parts = batch.each(work, 10) + batch.each(work, 3)
    assert [i for part in parts for i in part] == [*range(10), *range(3)]
    assert tried == [10, 5, 2, 2, 2, 2, 2, 2, 1]
    assert len(said) == 1 and "10 pictures at once (--batch-size): going on with 5" in str(said[0].message)


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MemoryError()]
)
def test_one_that_does_not_fit(error: Exception) -> None:
    def work(at: slice) -> None:
        raise error

    with pytest.warns(DrmWarning), pytest.raises(RunError, match="one of the latents") as told:
        Batch(2, "latents", flag="--set max_batch", hint="a smaller --resolution").each(work, 2)
    assert "--set max_batch" in told.value.message and "a smaller --resolution" in told.value.hint


def test_other_errors_are_told_at_once() -> None:
    def work(at: slice) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="shapes"):
        warnings.simplefilter("error")
        Batch(4).each(work, 4)


def test_a_smaller_batch_gives_the_same_scores(tmp_path: Path, reward_folder: Path, little_memory: Callable) -> None:
    for i in range(6):
        Image.new("RGB", (32, 32), (30 * i, 90, 200)).save(tmp_path / f"{i}.png")
    flags = {"reward": str(reward_folder), "images": [str(tmp_path / f"{i}.png") for i in range(6)],
             "prompts": [f"{CAPTION} {i}" for i in range(6)]}  # fmt: skip
    asked = [score.run(resolve("score", flags=flags | {"out": str(tmp_path / "a")}), Silent())]
    little_memory(2)
    with pytest.warns(DrmWarning) as said:
        asked.append(score.run(resolve("score", flags=flags | {"out": str(tmp_path / "b")}), Silent()))
    a, b = ([row["score"] for row in found["scores"]] for found in asked)
    assert a == pytest.approx(b, abs=1e-5)
    kinds = [str(w.message).split(" for ")[1].split(" ")[1:3] for w in said]
    assert len(kinds) == len({tuple(k) for k in kinds})  # each once


def test_a_smaller_batch_gives_the_same_benchmark(tmp_path: Path, reward_folder: Path, little_memory: Callable) -> None:
    flags = {"reward": str(reward_folder), "pairs": 12, "shapes_prompts": 4, "shapes_generated": 0.0, "sigmas": [0.0, 0.5],
             "no_cache": True}  # fmt: skip
    bench.run(resolve("bench", flags=flags | {"out": str(tmp_path / "a")}), Silent())
    little_memory(3)
    with pytest.warns(DrmWarning, match="pictures at once"):
        bench.run(
            resolve("bench", flags=flags | {"out": str(tmp_path / "b"), "cache_dir": str(tmp_path / "c")}), Silent()
        )
    a, b = (pd.read_parquet(tmp_path / name / "scores.parquet")["score"].to_numpy() for name in "ab")
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("way", [{"guidance_scale": 3.0}, {"share_score": True}])
def test_a_smaller_batch_draws_the_same(
    tmp_path: Path, generator_folder: Path, little_memory: Callable, way: dict
) -> None:
    """With guidance two latents a state go through, so one state needs room for two."""
    model = RewardModel.from_generator(
        str(generator_folder), drop_layers=3, head_width=16, backbone="frozen", max_sequence_length=1
    )
    model.save_pretrained(tmp_path / "reward")
    flags = {"reward": str(tmp_path / "reward"), "prompts": [CAPTION, "a small green triangle"], "mode": "stepwise",
             "beams": 3, "steps": 3, "max_sequence_length": 1} | way  # fmt: skip
    sample.run(resolve("sample", flags=flags | {"out": str(tmp_path / "a")}), Silent())
    little_memory(2)
    with pytest.warns(DrmWarning):
        sample.run(resolve("sample", flags=flags | {"out": str(tmp_path / "b")}), Silent())
    a, b = (pd.read_parquet(tmp_path / name / "candidates.parquet") for name in "ab")
    np.testing.assert_allclose(a["score"], b["score"], atol=1e-4)
    assert (a["kept"] == b["kept"]).all()


def test_one_latent_that_does_not_fit_is_told_with_what_helps(
    tmp_path: Path, drm: Callable, little_memory: Callable
) -> None:
    little_memory(1)
    told = drm("sample", CAPTION, "--steps", 2, "--guidance-scale", 3, "--out", tmp_path / "a")
    assert told.code == 1
    assert told.err.splitlines()[-2:] == [
        "error: out of memory with one of the latents at a time: --set max_batch",
        "hint: a smaller --resolution (of drm sample --height and --width), or --dtype bf16; --dry-run shows what needs how much",
    ]


def test_a_smaller_batch_aligns_the_same(tmp_path: Path, reward_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What draws and scores finds its batch; the optimizer's micro-batch is not touched."""
    flags = {"reward": str(reward_folder), "updates": 1, "prompts_per_update": 2, "group_size": 4, "steps": 3, "lora_rank": 2,
             "min_std": 0.0, "eval_prompts": 2, "eval_seeds": 2, "judge": "none", "max_sequence_length": 1}  # fmt: skip
    done = [grpo.run(resolve("grpo", flags=flags | {"out": str(tmp_path / "a")}), Silent())]
    features = RewardModel.features

    def guarded(self, latents, *args, **kwargs):
        full(len(latents), 2)
        return features(self, latents, *args, **kwargs)

    monkeypatch.setattr(RewardModel, "features", guarded)
    with pytest.warns(DrmWarning, match="latents at once") as said:
        done.append(grpo.run(resolve("grpo", flags=flags | {"out": str(tmp_path / "b")}), Silent()))
    assert len([w for w in said if issubclass(w.category, DrmWarning)]) == 1
    for name in ("reward_before", "reward_after"):
        assert done[0][name] == pytest.approx(done[1][name], abs=1e-4)


def test_large_pictures_are_decoded_in_tiles(generator_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On when asked, off when not, and by size; what comes out is nearly the same."""
    generator = Generator.load(str(generator_folder), components=("vae",), max_sequence_length=1)
    vae, tiled = generator.pipe.vae, []
    vae.tile_sample_min_size = vae.tile_latent_min_size * generator.factor
    original = vae.tiled_decode if hasattr(vae, "tiled_decode") else vae._tiled_decode
    name = original.__name__
    monkeypatch.setattr(vae, name, lambda *a, **k: tiled.append(1) or original(*a, **k))
    latents = torch.randn(1, 4, 4 * vae.tile_latent_min_size, 4 * vae.tile_latent_min_size)
    shown = {}
    for asked in ("off", "on", "auto"):
        generator.vae_tiling = asked
        shown[asked] = np.asarray(generator.decode(latents)[0], float)
        assert bool(tiled) == (asked == "on"), asked
        tiled.clear()
    monkeypatch.setattr("drmcli.fitting.TILED_PIXELS", 16)
    generator.decode(latents)
    assert tiled
    assert np.abs(shown["off"] - shown["auto"]).max() == 0
    assert np.abs(shown["off"] - shown["on"]).mean() < 12


def test_pictures_are_decoded_a_few_at_a_time(generator_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator.load(str(generator_folder), components=("vae",), max_sequence_length=1)
    latents = torch.randn(5, 4, 16, 16)
    whole, counts = generator.decode(latents), []
    decode = type(generator.family).decode
    monkeypatch.setattr(type(generator.family), "decode", lambda s, p, x: counts.append(len(x)) or decode(s, p, x))
    monkeypatch.setattr("drmcli.fitting.DECODED_PIXELS", 2 * (16 * generator.factor) ** 2)
    parts = generator.decode(latents)
    assert counts == [2, 2, 1]
    for a, b in zip(whole, parts):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1
