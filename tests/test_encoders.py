"""A reward model is asked through the text encoders that it was trained with, shared where they are the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drmcli import encoders
from drmcli.fingerprints import of_folder
from drmcli.generator import Generator
from drmcli.reward import RewardModel
from drmcli.scorers.combine import Rewards


def rewrite(folder: Path, to: Path, **values: object) -> Path:
    """A copy of a saved reward model with another config."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | values))
    return to


@pytest.fixture(scope="module")
def generator(generator_folder: Path) -> Generator:
    return Generator.load(str(generator_folder), max_sequence_length=1)


@pytest.fixture(scope="module")
def other(generator_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pipeline with one text encoder changed, and only in the middle of its file."""
    folder = tmp_path_factory.mktemp("other") / "generator"
    shutil.copytree(generator_folder, folder)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "embedding" not in name:
            tensors[name] = tensors[name] * 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_a_copy_of_the_base_shares_its_encoders(
    generator: Generator, reward_folder: Path, generator_folder: Path, tmp_path: Path
) -> None:
    """Folders and ids say nothing: an equal copy elsewhere is the same."""
    copy = shutil.copytree(generator_folder, tmp_path / "copy")
    reward = RewardModel.from_pretrained(rewrite(reward_folder, tmp_path / "reward", base_model=str(copy)))
    assert encoders.share(reward, generator) is None
    assert reward.generator() is generator


def test_another_length_is_encoded_apart_with_the_same_weights(
    generator: Generator, reward_folder: Path, tmp_path: Path
) -> None:
    """The old code gave the generator's embeddings to every model with the same name of the base."""
    longer = rewrite(reward_folder, tmp_path / "reward", max_sequence_length=3)
    rewards = Rewards([(str(longer), 1.0)], device=torch.device("cpu"), dtype=torch.float32)
    warnings = rewards.share_encoders(generator)
    assert len(warnings) == 1 and "3 tokens, not 1" in warnings[0]
    own = generator.encode_prompts(["a large red circle"])
    (cond,) = rewards.encode(["a large red circle"], own, generator)
    assert cond.prompt_embeds.shape[1] == own.prompt_embeds.shape[1] + 2
    assert rewards.models[0].generator().pipe.text_encoder is generator.pipe.text_encoder, "loaded a second time"
    assert rewards.models[0].generator().pipe.vae is generator.pipe.vae


def test_other_weights_are_loaded_beside(
    generator: Generator, reward_folder: Path, other: Path, tmp_path: Path
) -> None:
    reward = RewardModel.from_pretrained(rewrite(reward_folder, tmp_path / "reward", base_model=str(other)))
    warning = encoders.share(reward, generator)
    assert warning is not None and f"encoders of {other}" in warning
    pipe = reward.generator().pipe
    assert pipe.text_encoder is not generator.pipe.text_encoder
    assert pipe.text_encoder_2 is generator.pipe.text_encoder_2
    prompt = ["a large red circle"]
    apart = Generator.load(str(other), components=("text", "vae"), max_sequence_length=1).encode_prompts(prompt)
    assert torch.equal(reward.generator().encode_prompts(prompt).prompt_embeds, apart.prompt_embeds)
    assert not torch.equal(apart.prompt_embeds, generator.encode_prompts(prompt).prompt_embeds)


def test_t5_in_training_and_not_in_the_generator_is_seen(
    generator: Generator, reward_folder: Path, tmp_path: Path
) -> None:
    reward = RewardModel.from_pretrained(reward_folder)
    prints = generator.prints()
    assert encoders.differences(reward, prints | {"text_encoder_3": "a", "tokenizer_3": "b"}, 1) == ["without T5"]


def test_encoders_that_are_gone_are_said(generator: Generator, reward_folder: Path, tmp_path: Path) -> None:
    full = RewardModel.from_pretrained(rewrite(reward_folder, tmp_path / "reward", base_model=str(tmp_path / "gone")))
    warning = encoders.share(full, generator)
    assert warning is not None and "cannot be had" in warning and "gone" in warning
    assert full.generator() is generator


def test_a_run_warns_and_goes_on(drm, reward_folder: Path, tmp_path: Path) -> None:
    """The warning reaches the log of a run."""
    longer = rewrite(reward_folder, tmp_path / "reward", max_sequence_length=3)
    done = drm(
        "sample",
        "a large red circle",
        "--reward",
        longer,
        "--stepwise",
        "--beams",
        2,
        "--steps",
        2,
        "--out",
        tmp_path / "out",
    )
    assert done.code == 0, done.err
    assert "3 tokens, not 1" in (tmp_path / "out" / "log.txt").read_text()


def test_weights_with_a_variant_in_their_names_are_told_apart(generator_folder: Path, tmp_path: Path) -> None:
    prints = []
    for name, scale in (("a", 1.0), ("b", 2.0)):
        shutil.copytree(generator_folder / "text_encoder", tmp_path / name)
        tensors = {k: v * scale for k, v in load_file(tmp_path / name / "model.safetensors").items()}
        (tmp_path / name / "model.safetensors").unlink()
        save_file(tensors, tmp_path / name / "model.fp16.safetensors")
        prints.append(of_folder(tmp_path / name))
    assert prints[0] != prints[1]


def test_the_scale_of_an_older_file_is_read(reward_folder: Path, tmp_path: Path) -> None:
    """Its shape was [], which no sharded training takes; now it is [1]."""
    old = shutil.copytree(reward_folder, tmp_path / "old")
    tensors = load_file(old / "model.safetensors")
    assert tensors["head.log_scale"].shape == (1,)
    tensors["head.log_scale"] = torch.tensor(0.5)
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    assert RewardModel.from_pretrained(old).head.log_scale.tolist() == [0.5]
