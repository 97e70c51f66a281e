"""From Python: the embedded model by its name, pictures and texts as people have them, and errors that say what was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import drmcli
from drmcli import DrmError, RewardModel
from drmcli.tiny import world

CAPTION = "a large red circle above a small blue square"


@pytest.fixture(scope="module")
def tiny() -> RewardModel:
    return RewardModel.tiny()


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """A picture as the reward model knows them: uint8 [32, 32, 3]."""
    return world.draw([CAPTION], np.random.default_rng(0))[0]


def test_the_embedded_model_is_that_of_the_preset(tiny: RewardModel) -> None:
    from drmcli.config import resolve

    named = RewardModel.from_pretrained(resolve("score").reward)
    assert all(torch.equal(a, b) for a, b in zip(tiny.state_dict().values(), named.state_dict().values()))


def test_a_name_that_is_not_there() -> None:
    assert "RewardModel" in dir(drmcli)
    with pytest.raises(AttributeError, match="no attribute 'Rewardmodel'"):
        drmcli.Rewardmodel  # noqa: B018


def test_one_picture_in_every_form(tiny: RewardModel, pixels: np.ndarray, tmp_path: Path) -> None:
    """PIL, a path, an array and a tensor, alone or in a list, of bytes or of floats: the same number."""
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.png")
    want = tiny.score_images([picture], [CAPTION])
    assert want.shape == (1, 1)
    channels_first = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    forms: list[Any] = [
        picture, tmp_path / "a.png", str(tmp_path / "a.png"), pixels, pixels / 255, channels_first, channels_first / 255,
        picture.convert("RGBA"), np.dstack([pixels, pixels[:, :, :1]]), [pixels], (picture,), pixels[None], channels_first[None],
        iter([picture]), np.array([str(tmp_path / "a.png")]),
    ]  # fmt: skip
    for form in forms:
        assert torch.equal(tiny.score_images(form, CAPTION), want), type(form)
    grey = Image.fromarray(pixels).convert("L")
    assert torch.equal(tiny.score_images(np.asarray(grey), CAPTION), tiny.score_images(grey, CAPTION))


def test_a_file_is_turned_as_drm_score_turns_it(tiny: RewardModel, pixels: np.ndarray, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels[::-1, ::-1].copy()).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(tiny.score_images(tmp_path / "turned.png", CAPTION), tiny.score_images(pixels, CAPTION))


def test_one_text_for_all_and_one_sigma(tiny: RewardModel, pixels: np.ndarray) -> None:
    two = [pixels, pixels[::-1].copy()]
    whole = tiny.score_images(two, [CAPTION, CAPTION], sigmas=[0.5, 0.0])
    assert torch.equal(tiny.score_images(two, CAPTION, sigmas=(0.5, 0.0)), whole)
    for sigma in (0.5, np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])):
        assert torch.equal(tiny.score_images(two, CAPTION, sigmas=sigma), whole[:, :1])


@pytest.mark.parametrize(
    ("images", "prompts", "options", "says"),
    [
        ("no.png", CAPTION, {}, "images: no.png: missing"),
        (["ok", "no.png"], CAPTION, {}, "images: entry 2: no.png: missing"),
        ("folder", CAPTION, {}, "images: folder: not a file"),
        ([], CAPTION, {}, "images: there is none"),
        (None, CAPTION, {}, "images: None"),
        (7, CAPTION, {}, "images: an int (7)"),
        ([{"a": 1}], CAPTION, {}, "images: entry 1: a dict, not a picture"),
        (np.zeros((4, 4, 5), np.uint8), CAPTION, {}, "images: ndarray of shape [4, 4, 5]"),
        (np.zeros((3, 8, 8), np.uint8), CAPTION, {}, "images: ndarray of shape [3, 8, 8]"),
        (torch.zeros(8, 8), CAPTION, {}, "images: Tensor of shape [8, 8]"),
        (torch.zeros(8, 8, 3), CAPTION, {}, "images: Tensor of shape [8, 8, 3]"),
        (np.full((8, 8, 3), 2.0), CAPTION, {}, "images: floats from 2 to 2"),
        (np.full((8, 8, 3), np.nan), CAPTION, {}, "images: floats from nan to nan"),
        (np.zeros((8, 8, 3), np.int64), CAPTION, {}, "images: pixels of int64"),
        (Image.new("I", (8, 8)), CAPTION, {}, "images: pixels of more than 16 bits (mode I)"),
        ("ok", None, {}, "prompts: None"),
        ("ok", Path("a"), {}, "prompts: a PosixPath"),
        (CAPTION, Image.new("RGB", (8, 8)), {}, "prompts: an Image"),
        ("ok", [3], {}, "prompts: entry 1: an int (3), not text"),
        ("ok", "  ", {}, "prompts: is empty"),
        ("ok", "caf\udce9", {}, "prompts: not UTF-8 text"),
        (["ok", "ok"], [CAPTION], {}, "2 images and 1 prompts"),
        ("ok", [CAPTION, CAPTION], {}, "1 images and 2 prompts"),
        ("ok", CAPTION, {"sigmas": 2.0}, "sigmas: 2.0 is no sigma"),
        ("ok", CAPTION, {"sigmas": [0.5, float("nan")]}, "sigmas: nan is no sigma"),
        ("ok", CAPTION, {"sigmas": []}, "sigmas: there is none"),
        ("ok", CAPTION, {"sigmas": "0.5"}, "sigmas: a str ('0.5')"),
        ("ok", CAPTION, {"sigmas": None}, "sigmas: None"),
        ("ok", CAPTION, {"noise_samples": 0}, "noise_samples: 0"),
        ("ok", CAPTION, {"batch_size": 1.5}, "batch_size: 1.5"),
        ("ok", CAPTION, {"seed": -1}, "seed: -1"),
    ],
)  # fmt: skip
def test_what_was_given_is_said(
    tiny: RewardModel, pixels: np.ndarray, tmp_path: Path, images: Any, prompts: Any, options: dict, says: str
) -> None:
    """`ok` stands for a sound picture; the error names the argument, the entry and what was there."""
    (tmp_path / "folder").mkdir()
    if isinstance(images, list):
        images = [pixels if isinstance(x, str) and x == "ok" else x for x in images]
    elif isinstance(images, str) and images == "ok":
        images = pixels
    with pytest.raises(DrmError) as error:
        tiny.score_images(images, prompts, **options)
    assert error.value.message.startswith(says)
    assert error.value.exit_code == 2
    assert error.value.hint


def test_a_recipe_needs_no_reporter(pixels: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    """`run(config)` returns what --json prints, and prints nothing."""
    from drmcli.config import resolve
    from drmcli.recipes import score

    Image.fromarray(pixels).save("a.png")
    summary = score.run(resolve("score", flags={"images": ["a.png"], "prompts": [CAPTION], "out": "run"}))
    assert summary["scores"][0]["image"] == "a.png"
    assert capsys.readouterr() == ("", "")
