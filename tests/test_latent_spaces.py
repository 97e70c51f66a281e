"""Where a reward model of one family may judge another family's states, and where it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_pipelines
import tiny_qwen_image
import tiny_z_image
import torch

from drmcli.generator import Generator
from drmcli.reward import RewardModel

TINY = {
    "flux": tiny_pipelines.PIPELINES["flux"],
    "z_image": tiny_z_image.TINY,
    "qwen_image": tiny_qwen_image.TINY,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines of three families, and a reward model on FLUX.1."""
    torch.manual_seed(0)
    made = {name: tmp_path_factory.mktemp(name) for name in (*TINY, "reward")}
    for name, tiny in TINY.items():
        tiny.build().save_pretrained(made[name])
    settings = {"drop_layers": 1, "head_width": 8, "max_sequence_length": 24, "resolution": 32}
    RewardModel.from_generator(str(made["flux"]), **settings).save_pretrained(made["reward"])
    return made


def test_one_space_and_another(folders: dict[str, Path]) -> None:
    """FLUX.1 and Z-Image share a VAE; Qwen-Image, with as many channels here, has its own."""
    spaces = {name: Generator.load(str(folders[name]), components=()).latent_space for name in TINY}
    assert spaces["flux"] == spaces["z_image"] == ("FLUX.1", 4)
    assert spaces["qwen_image"] == ("qwen_image", 4)


def sample(folders: dict[str, Path], generator: str, out: Path, drm: Callable):
    return drm(
        "sample", "a red circle", "--generator", folders[generator], "--reward", folders["reward"], "--stepwise",
        "--beams", 2, "--steps", 3, "--height", 32, "--width", 32, "--set", "max_sequence_length=40", "--trace",
        "--json", "--out", out,
    )  # fmt: skip


def test_a_reward_model_across_families(folders: dict[str, Path], tmp_path: Path, drm: Callable) -> None:
    """It reads the prompt by its own encoders, and the latents are the generator's."""
    done = sample(folders, "z_image", tmp_path / "run", drm)
    assert done.code == 0, done.err
    scores = torch.tensor([image["score"] for image in done.json["images"]])
    assert len(scores) == 1
    assert scores.isfinite().all()


def test_a_reward_model_of_another_space_is_refused(folders: dict[str, Path], tmp_path: Path, drm: Callable) -> None:
    refused = sample(folders, "qwen_image", tmp_path / "run", drm)
    assert refused.code == 2
    assert f"--reward {folders['reward']}: made for FLUX.1 latents of 4 channels, not qwen_image" in refused.err
    assert refused.err.count("error:") == 1
    assert "hint:" in refused.err
