"""The reward model: what it saves, loads and scores."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drmcli.errors import InputError
from drmcli.families.base import Conditioning
from drmcli.flow import add_noise
from drmcli.generator import Generator
from drmcli.noise import keyed_noise
from drmcli.reward import RewardModel
from drmcli.tiny import world

CAPTIONS = list(world.captions("test"))[:3]


@pytest.fixture(scope="module")
def reward(reward_folder: Path) -> RewardModel:
    return RewardModel.from_pretrained(reward_folder)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.fromarray(p) for p in world.draw(CAPTIONS, np.random.default_rng(0))]


def inputs(batch: int, height: int = 16, width: int = 16) -> tuple[torch.Tensor, Conditioning]:
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 4, height, width, generator=rng)
    embeds, pooled = torch.randn(batch, 17, 128, generator=rng), torch.randn(batch, 128, generator=rng)
    return latents, Conditioning(prompt_embeds=embeds, pooled_prompt_embeds=pooled)


def test_save_and_load_give_the_same_score(reward: RewardModel, tmp_path: Path) -> None:
    latents, cond = inputs(2)
    reward.save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path)
    assert torch.equal(again.score(latents, 0.3, cond), reward.score(latents, 0.3, cond))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "A diffusion-based reward model" in (tmp_path / "README.md").read_text()


def test_a_sigma_a_sample(reward: RewardModel) -> None:
    latents, cond = inputs(3)
    sigma = torch.tensor([0.0, 0.4, 1.0])
    whole = reward.score(latents, sigma, cond)
    alone = torch.cat([reward.score(latents[i : i + 1], sigma[i].item(), cond[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=1e-5)
    assert (whole - reward.score(latents, 0.4, cond))[[0, 2]].abs().min() > 1e-5


def test_the_score_is_differentiable(reward: RewardModel) -> None:
    latents, cond = inputs(1)
    latents.requires_grad_()
    reward.score(latents, 0.5, cond).sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().max() > 0


def test_latents_need_not_be_square(reward: RewardModel) -> None:
    """Turning a wide picture on its side must change its score: the grid is really put back together."""
    latents, cond = inputs(1, 8, 24)
    wide, tall = reward.score(latents, 0.2, cond), reward.score(latents.transpose(2, 3), 0.2, cond)
    assert wide.shape == (1,)
    assert (wide - tall).abs().item() > 1e-6


def test_odd_latents_are_refused(reward: RewardModel) -> None:
    latents, cond = inputs(1, 7, 8)
    with pytest.raises(InputError, match="patch size"):
        reward.score(latents, 0.2, cond)


def test_several_taps(generator_folder: Path) -> None:
    model = RewardModel.from_generator(str(generator_folder), drop_layers=2, tap_layers=[0, 2], head_width=8)
    assert len(model.transformer.transformer_blocks) == 3
    latents, cond = inputs(2)
    assert len(model.features(latents, torch.tensor([0.1, 0.2]), cond)) == 2
    assert model.score(latents, 0.1, cond).shape == (2,)
    with pytest.raises(InputError, match="tap_layers"):
        RewardModel.from_generator(str(generator_folder), drop_layers=2, tap_layers=[4])


@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_pools(generator_folder: Path, pool: str) -> None:
    model = RewardModel.from_generator(str(generator_folder), head_width=8, head_pool=pool)
    assert (model.head.attend is not None) == (pool == "attention")
    latents, cond = inputs(2)
    assert torch.isfinite(model.score(latents, 0.1, cond)).all()


def test_random_start_forgets_the_weights_and_nothing_else(generator_folder: Path) -> None:
    a = RewardModel.from_generator(str(generator_folder), head_width=8)
    b = RewardModel.from_generator(str(generator_folder), head_width=8, init="random")
    c = RewardModel.from_generator(str(generator_folder), head_width=8, init="random")
    for name, tensor in a.head.state_dict().items():
        assert torch.equal(tensor, b.head.state_dict()[name])
    name = "transformer_blocks.0.attn.to_q.weight"
    assert not torch.equal(a.transformer.state_dict()[name], b.transformer.state_dict()[name])
    assert torch.equal(b.transformer.state_dict()[name], c.transformer.state_dict()[name])


def test_features_are_those_of_diffusers(generator_folder: Path) -> None:
    """The tokens after block 2 are what diffusers' own forward pass hands to block 3."""
    generator = Generator.load(str(generator_folder), max_sequence_length=1)
    model = RewardModel.from_generator(str(generator_folder), drop_layers=3, head_width=8)
    latents, cond = inputs(2)
    seen = {}
    block = generator.transformer.transformer_blocks[3]
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    generator.transformer(latents, cond.prompt_embeds, cond.pooled_prompt_embeds, torch.tensor([300.0, 700.0]))
    hook.remove()
    tokens = model.features(latents, torch.tensor([0.3, 0.7]), cond)[0]
    torch.testing.assert_close(tokens, seen["hidden_states"], atol=1e-5, rtol=1e-5)


def test_scores_do_not_depend_on_the_batch(reward: RewardModel, pictures: list[Image.Image]) -> None:
    whole = reward.score_images(pictures, CAPTIONS, sigmas=[0.0, 0.5], noise_samples=2)
    one = reward.score_images(pictures, CAPTIONS, sigmas=[0.0, 0.5], noise_samples=2, batch_size=1)
    turned = reward.score_images(pictures[::-1], CAPTIONS[::-1], sigmas=[0.0, 0.5], noise_samples=2)
    torch.testing.assert_close(whole, one, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole, turned.flip(0), atol=1e-5, rtol=1e-5)


def test_score_images_is_encode_noise_score(reward: RewardModel, pictures: list[Image.Image]) -> None:
    generator = reward.generator()
    latents, cond = generator.encode_images(pictures), generator.encode_prompts(CAPTIONS)
    keys = [hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures]
    by_hand = [
        reward.score(add_noise(latents, keyed_noise(keys, (4, 16, 16), seed=3, draw=draw), 0.4), 0.4, cond)
        for draw in range(2)
    ]
    scores = reward.score_images(pictures, CAPTIONS, sigmas=[0.4], noise_samples=2, seed=3)[:, 0]
    torch.testing.assert_close(scores, torch.stack(by_hand).mean(0), atol=1e-5, rtol=1e-5)


def test_noise_is_the_keys_own() -> None:
    """The same for one key, another for another key, seed or draw, and standard normal."""
    shape = (4, 32, 32)
    a = keyed_noise(["x", "y", "x"], shape, seed=0, draw=0)
    assert torch.equal(a[0], a[2])
    others = [a[1], keyed_noise(["x"], shape, seed=1, draw=0)[0], keyed_noise(["x"], shape, seed=0, draw=1)[0]]
    assert all((a[0] - other).abs().mean() > 0.5 for other in others)
    assert a[0].std().item() == pytest.approx(1, abs=0.05)


def test_one_prompt_an_image(reward: RewardModel, pictures: list[Image.Image]) -> None:
    with pytest.raises(InputError, match="3 images and 1 prompts"):
        reward.score_images(pictures, CAPTIONS[:1])


def test_encode_is_undone_by_decode(reward: RewardModel, pictures: list[Image.Image]) -> None:
    """The VAE gives the picture back: at least 28 dB, 4 / 10^2.8 = 0.0063 of mean squared error in [-1, 1]."""
    generator = reward.generator()
    vae = generator.pipe.vae
    latents = generator.encode_images(pictures)
    assert latents.std().item() == pytest.approx(1, abs=0.4)
    out = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    assert (out - generator.preprocess(pictures)).square().mean().item() < 0.0063


def test_generators_as_people_have_them(generator_folder: Path, tmp_path: Path, reward: RewardModel) -> None:
    """Weights with a variant in their names, and weights in shards with an index, give the same velocities."""
    latents, cond = inputs(1)
    expected = Generator.load(str(generator_folder)).velocity(latents, 0.5, cond)
    for form in ("variant", "shards"):
        folder = tmp_path / form
        if form == "shards":
            whole = Generator.load(str(generator_folder))
            whole.pipe.save_pretrained(folder, max_shard_size="200KB")
            assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
        else:
            shutil.copytree(generator_folder, folder)
            for file in list(folder.rglob("*.safetensors")):
                file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
        found = Generator.load(str(folder)).velocity(latents, 0.5, cond)
        torch.testing.assert_close(found, expected)


def test_a_single_file_checkpoint_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="a file, not a folder") as refused:
        Generator.load(str(tmp_path / "model.safetensors"))
    assert "from_single_file(FILE).save_pretrained(FOLDER)" in str(refused.value.hint)
