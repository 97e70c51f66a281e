"""The embedded world: its captions, its judge, its dataset and the pipeline that ships in the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from drmcli.cards import reward_card
from drmcli.config import resolve
from drmcli.errors import InputError
from drmcli.generator import Generator
from drmcli.recipes.pairs import LazyGenerator
from drmcli.run import Silent
from drmcli.tiny import shapes, world
from drmcli.tiny.judge import judge

PACKAGE = Path(world.__file__).parent


def test_splits_are_disjoint_and_cover_the_vocabulary() -> None:
    parts = [set(world.captions(split)) for split in world.SPLITS]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert all(len(part) >= 400 for part in parts)
    assert sum(map(len, parts)) == 36 * 5 + 36 * 30 * 4  # one thing in 5 places; two of unlike colours in 4 relations
    with pytest.raises(InputError, match="not a split"):
        world.captions("dev")


def test_captions_round_trip() -> None:
    for split in world.SPLITS:
        for caption in world.captions(split):
            assert str(world.parse(caption)) == caption
    assert world.parse("A red circle").place is None
    with pytest.raises(InputError, match="no words for"):
        world.parse("a photo of a cat")


def test_judge_knows_good_from_bad() -> None:
    captions = list(world.captions("val"))[:200]
    rng = np.random.default_rng(0)
    clean = world.draw(captions, rng)
    assert judge(clean, captions).score.mean() > 0.95
    assert judge(clean, captions[::-1]).score.mean() < 0.3
    assert judge(np.full_like(clean, round(255 * world.BACKGROUND)), captions).score.max() == 0
    assert judge(rng.integers(0, 255, clean.shape).astype(np.uint8), captions).score.mean() < 0.3


@pytest.mark.parametrize("name", ["reward", "reward-own"])
def test_cards_of_the_embedded_reward_models(name: str) -> None:
    folder = PACKAGE / "weights" / name
    assert (folder / "README.md").read_text(encoding="utf-8") == reward_card(
        json.loads((folder / "config.json").read_text())
    )


@pytest.mark.parametrize("flaw", world.FLAWS)
def test_each_flaw_costs_something(flaw: str) -> None:
    captions = list(world.captions("val"))[:150]
    rng = np.random.default_rng(0)
    flaws = np.zeros((150, len(world.FLAWS)), dtype=bool)
    flaws[:, world.FLAWS.index(flaw)] = True
    spoilt = world.render(world.add_flaws(world.clean_scene(captions, rng), flaws, rng), rng)
    gap = judge(world.draw(captions, rng), captions).score - judge(spoilt, captions).score
    assert gap.mean() > 0.05


def test_judge_names_the_part_that_is_wrong() -> None:
    """Swapping two things keeps the objects and spoils the position; another shape spoils the shape part."""
    caption = "a large red circle above a large blue square"
    rng = np.random.default_rng(0)
    swapped = world.draw(["a large blue square above a large red circle"], rng)
    verdict = judge(swapped, [caption])
    assert verdict.position[0] < 0.05
    assert verdict.objects[0] > 0.9
    other = judge(world.draw(["a large red triangle above a large blue square"], rng), [caption])
    assert other.shape[0] < 0.6
    assert other.position[0] > 0.9


def load(split: str, root: Path, seed: int = 0):
    return shapes.load_shapes(
        split, prompts=12, generated=0.0, seed=seed, load_generator=lambda: None, root=root, reporter=Silent()
    )  # type: ignore[arg-type,return-value]


def test_shapes_come_from_the_seed(tmp_path: Path) -> None:
    a, b, c = load("train", tmp_path / "a"), load("train", tmp_path / "b"), load("train", tmp_path / "c", seed=1)
    assert [i.read() for i in a.images] == [i.read() for i in b.images]
    assert a.pairs.equals(b.pairs)
    assert a.prompts != c.prompts
    assert set(a.prompts) <= set(world.captions("train"))
    assert len(a) == 12 * 6


def test_held_out_pairs_are_in_the_judges_order(tmp_path: Path) -> None:
    from drmcli.data.images import load_image

    data = load("test", tmp_path)
    pixels = np.stack([np.asarray(load_image(i)) for i in data.images])
    prompt_of = dict(zip(data.pairs["chosen"], data.pairs["prompt"])) | dict(
        zip(data.pairs["rejected"], data.pairs["prompt"])
    )
    score = judge(pixels, [data.prompts[prompt_of.get(i, 0)] for i in range(len(pixels))]).score
    gap = score[data.pairs["chosen"]] - score[data.pairs["rejected"]]
    assert gap.min() > shapes.MIN_GAP
    assert set(data.prompts) <= set(world.captions("test"))
    assert 0.3 < data.pairs["chosen_first"].mean() < 0.7


def test_shapes_can_be_the_generators_own(tmp_path: Path) -> None:
    config = resolve("bench")
    lazy = LazyGenerator.of(config, torch.device("cpu"))
    data = shapes.load_shapes(
        "train", prompts=4, generated=0.5, seed=0, load_generator=lazy.full, root=tmp_path, reporter=Silent()
    )
    assert data.pairs["source"].tolist() == ["generated"] * 12 + ["rendered"] * 12


def test_the_package_holds_a_plain_pipeline() -> None:
    """It loads in diffusers with no help of ours, and draws what is asked: judge 0.75, shape part 0.6 at guidance 4."""
    from diffusers import StableDiffusion3Pipeline

    folder = PACKAGE / "weights" / "generator"
    pipe = StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None, image_encoder=None, feature_extractor=None
    )
    pipe.set_progress_bar_config(disable=True)
    captions = list(world.captions("val"))[:32]
    out = pipe(
        captions,
        num_inference_steps=10,
        guidance_scale=4.0,
        max_sequence_length=1,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    verdict = judge((out * 255 + 0.5).astype(np.uint8), captions)
    assert verdict.score.mean() >= 0.75
    assert verdict.shape.mean() >= 0.6


def test_the_same_seed_builds_the_same_weights(tmp_path: Path) -> None:
    """A few steps of everything, twice: byte for byte the same files."""
    from drmcli.tiny.build import build

    for name in "ab":
        build(
            tmp_path / name, seed=0, text_steps=5, vae_steps=4, steps=4, pictures=100, width=32, compiled=False,
            log=lambda line: None,
        )  # fmt: skip
    files = sorted(f.relative_to(tmp_path / "a") for f in (tmp_path / "a").rglob("*.safetensors"))
    assert len(files) == 4
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_the_package_is_small_and_safe() -> None:
    files = [f for f in (PACKAGE / "weights").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 12e6
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".txt", ".md"}


def test_the_tokenizer_spells_every_word(generator_folder: Path) -> None:
    generator = Generator.load(str(generator_folder), components=("text",), max_sequence_length=1)
    words = {word for caption in world.captions("train") for word in caption.split()}
    assert all(len(generator.pipe.tokenizer(word).input_ids) == 3 for word in words)
    assert not any(generator.truncated(caption) for caption in list(world.captions("train"))[:200])
    assert generator.truncated("an ocean with clouds and birds, day time, low depth field effect")


def test_the_shipped_reward_model_knows_the_world() -> None:
    from PIL import Image

    from drmcli.reward import RewardModel

    reward = RewardModel.from_pretrained(resolve("score").reward)
    captions = list(world.captions("test"))[:40]
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(p) for p in world.draw(captions, rng)]
    right = reward.score_images(pictures, captions, sigmas=[0.25])
    wrong = reward.score_images(pictures, captions[::-1], sigmas=[0.25])
    assert (right > wrong).float().mean() > 0.9
