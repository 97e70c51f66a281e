"""Figures of the embedded world as literals: what a change of structure must not move.

Scores, one sample by search, one small bench, one alignment update and one resumed training, computed in float32 on the CPU.
Whoever changes the arithmetic on purpose puts the new figures here and says so.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drmcli.config import package_path, resolve
from drmcli.errors import Interrupted
from drmcli.generator import Generator
from drmcli.recipes import bench, grpo, train_reward
from drmcli.results import read
from drmcli.reward import RewardModel
from drmcli.run import Silent
from drmcli.sampling import Search, sample
from drmcli.tiny import world

CAPTIONS = list(world.captions("test"))[:10]
SHIPPED = "{package}/tiny/weights/reward"

SCORES = [
    [0.156619385, -2.13136983, -4.96586895],
    [1.29382432, 0.26138407, -4.68010426],
    [-7.59238482, -9.57431602, -10.0650845],
    [-2.53061604, -5.40663576, -9.15056038],
    [0.316009253, -2.52374887, -5.0893259],
    [-8.61724472, -10.3693047, -13.3052549],
    [-2.1881628, -5.22966194, -8.26253414],
    [2.13519859, -0.643149018, -6.61030197],
    [0.609553933, -0.090698041, -0.624982893],
    [0.632224977, -1.92392635, -4.18570852],
]
"""[picture, sigma]."""
SAMPLE = {
    "score": [0.930342972, 2.30308533],
    "mean": [-0.136820195, 0.262108507],
    "square": [1.14381452, 1.07661805],
    "pixels": [
        [-0.483804137, 0.190639541, 0.57670629, 0.803513944],
        [0.254378736, 0.414247036, 0.400624216, 0.445370555],
    ],
}
BENCH = {
    "accuracy": [95.833333333, 41.666666667],
    "scores": [[-5.64676359, 4.9717184], [-8.10763823, 4.4425642]],
}
UPDATE = {
    "loss": 0.017160356,
    "ratio": 0.823098719,
    "clip_fraction": 0.5,
    "kl": 160.317932,
    "grad_norm": 1.50173998,
    "reward_mean": -8.48989296,
    "group_std": 0.772018611,
}
ALIGNED = [-3.5116806, -6.26976585]
LOSSES = [0.693206489, 0.693214893, 0.693249047, 0.693107307]
HEAD = 19.5935584


@pytest.fixture(scope="module")
def reward() -> RewardModel:
    return RewardModel.from_pretrained(package_path(SHIPPED))


def close(values: object, expected: object, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(np.asarray(values, dtype=float), np.asarray(expected), atol=tolerance, rtol=tolerance)


def test_scores(reward: RewardModel) -> None:
    pictures = [Image.fromarray(p) for p in world.draw(CAPTIONS, np.random.default_rng(0), flawed=0.5)]
    scores = reward.score_images(pictures, CAPTIONS, sigmas=[0.0, 0.25, 0.75], noise_samples=2)
    close(scores, SCORES)


def test_a_sample(reward: RewardModel, generator_folder: Path) -> None:
    """Guided step-wise search: each kept candidate is an argmax, so a wrong choice shows at once."""
    generator = Generator.load(str(generator_folder), max_sequence_length=1)
    cond, negative = generator.encode_prompts(CAPTIONS[:2]), generator.encode_prompts([""])
    search = Search(mode="stepwise", num_inference_steps=6, beams=3, guidance_scale=3.0)
    drawn = sample(generator, reward, cond, cond, [0, 1], search, negative=negative, shape=(4, 16, 16))
    close(drawn.score, SAMPLE["score"], 1e-5)
    x = drawn.latents.double()
    close(x.flatten(1).mean(1), SAMPLE["mean"])
    close(x.square().mean((1, 2, 3)), SAMPLE["square"])
    close(x[:, 0, 3, 5:9], SAMPLE["pixels"], 1e-5)


def test_a_bench(tmp_path: Path) -> None:
    flags = {"reward": SHIPPED, "out": str(tmp_path), "pairs": 24, "shapes_generated": 0.0, "sigmas": [0.25, 0.75]}
    summary = bench.run(resolve("bench", flags=flags), Silent())
    close([row["accuracy"] for row in summary["by_sigma"]], BENCH["accuracy"])
    scores = read(tmp_path / "scores.parquet")
    close(scores.groupby("sigma")["score"].agg(["mean", "std"]), BENCH["scores"])


def test_an_update(tmp_path: Path) -> None:
    flags = {
        "reward": SHIPPED, "out": str(tmp_path), "updates": 1, "prompts_per_update": 2, "group_size": 3, "steps": 4,
        "lora_rank": 2, "eval_prompts": 2, "eval_seeds": 1, "kl_beta": 1e-4, "inner_epochs": 2, "on_hacking": "ignore",
    }  # fmt: skip
    summary = grpo.run(resolve("grpo", flags=flags), Silent())
    row = read(tmp_path / "metrics").iloc[0]
    close(row[list(UPDATE)], list(UPDATE.values()))
    close([row["reward"] for row in summary["history"]], ALIGNED, 1e-5)


class StopAfter(Silent):
    def progress(self, task: str, done: int, total: int, **fields: object) -> None:
        if task == "train" and done == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_resumed_run(tmp_path: Path) -> None:
    config = resolve("train-reward", flags={
        "out": str(tmp_path), "shapes_prompts": 10, "shapes_generated": 0.0, "eval_pairs": 12, "batch_size": 12,
        "head_width": 16, "drop_layers": 4, "steps": 4, "save_every": 2, "log_every": 1, "eval_sigmas": [0.25],
    })  # fmt: skip
    with pytest.raises(Interrupted):
        train_reward.run(config, StopAfter())
    train_reward.run(config, Silent())
    close(read(tmp_path / "metrics")["loss"], LOSSES)
    weights = RewardModel.from_pretrained(tmp_path / "reward").head.state_dict()
    close(
        torch.stack([t.double().norm() for t in weights.values()]).sum(), HEAD, 1e-5
    )  # AdamW makes much of the last bits, which depend on encoding batches
