"""One protocol for everything that scores, whichever flag names it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drmcli.errors import DrmError, InputError, MissingError
from drmcli.reward import RewardModel
from drmcli.scorers import StateScorer, load_scorer, read_reference
from drmcli.tiny import world
from drmcli.tiny.judge import judge

CAPTIONS = list(world.captions("test"))[:3]
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.fromarray(p) for p in world.draw(CAPTIONS, np.random.default_rng(0), flawed=0.5)]


@pytest.mark.parametrize(
    ("text", "kind"),
    [("pickscore", "named"), ("hpsv2=/models/hps", "named"), ("mine:score", "function"), ("owner/name", "model")],
)
def test_what_a_reference_means(text: str, kind: str) -> None:
    assert read_reference(text).kind == kind


def test_a_folder_is_a_reward_model_whatever_its_name(reward_folder: Path) -> None:
    Path("clip").symlink_to(reward_folder)
    assert read_reference("clip").kind == "model"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", InputError),
        ("pickscor", InputError),
        ("shapes=x", InputError),
        ("clip=", InputError),
        ("./gone", MissingError),
        ("a/b/c", MissingError),
    ],
)
@pytest.mark.parametrize("flag", ["--reward", "--judge"])
def test_references_that_mean_nothing(text: str, error: type[DrmError], flag: str) -> None:
    with pytest.raises(error) as caught:
        read_reference(text, flag)
    assert caught.value.message.startswith(flag)


def test_a_reward_model_judges_pictures_and_states(reward_folder: Path, pictures: list[Image.Image]) -> None:
    scorer = load_scorer(str(reward_folder), sigma=0.5, noise_samples=2, seed=3, **CPU)  # type: ignore[arg-type]
    assert isinstance(scorer, StateScorer)
    model = RewardModel.from_pretrained(reward_folder)
    want = model.score_images(pictures, CAPTIONS, sigmas=[0.5], noise_samples=2, seed=3)[:, 0]
    assert torch.equal(scorer.score_images(pictures, CAPTIONS), want)
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scorer.score(x, 0.5, scorer.encode(CAPTIONS)), model.score(x, 0.5, scorer.encode(CAPTIONS)))


def test_a_scorer_of_pictures_judges_no_states(pictures: list[Image.Image]) -> None:
    scorer = load_scorer("shapes", **CPU)  # type: ignore[arg-type]
    assert not isinstance(scorer, StateScorer)
    want = judge(np.stack([np.asarray(p) for p in pictures]), CAPTIONS).score
    np.testing.assert_allclose(scorer.score_images(pictures, CAPTIONS), want, rtol=1e-6)
    with pytest.raises(InputError):
        scorer.check_prompts([CAPTIONS[0], "an ocean at dawn"])


def test_score_takes_every_scorer(drm, tmp_path: Path, pictures: list[Image.Image]) -> None:
    """`drm score --reward shapes`: one score a picture at noise level 0, and latents are refused."""
    for i, picture in enumerate(pictures):
        picture.save(f"{i}.png")
    flags = ["--prompts", "prompts.txt", "--reward", "shapes", "--out", tmp_path / "run", "--json"]
    Path("prompts.txt").write_text("\n".join(CAPTIONS))
    rows = drm("score", "0.png", "1.png", "2.png", *flags).json["scores"]
    assert [row["sigma"] for row in rows] == [0.0] * 3
    want = judge(np.stack([np.asarray(p) for p in pictures]), CAPTIONS).score
    np.testing.assert_allclose([row["score"] for row in rows], want, rtol=1e-5)
    from safetensors.torch import save_file

    save_file({"latents": torch.zeros(4, 16, 16)}, "x.safetensors")
    refused = drm("score", "x.safetensors", "--prompt", CAPTIONS[0], "--reward", "shapes", "--out", tmp_path / "b")
    assert refused.code == 2
    assert "--reward shapes: judges pictures, and x.safetensors holds latents" in refused.err
