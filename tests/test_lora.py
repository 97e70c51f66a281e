"""LoRAs in every form that people have them, and their strength."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from drmcli.config import resolve
from drmcli.errors import InputError
from drmcli.generator import Generator
from drmcli.recipes import grpo
from drmcli.run import Silent
from drmcli.sampling import Search, sample

BLOCK = "transformer_blocks.0.attn.to_q"
SEARCH = Search(num_inference_steps=2, step_rule="ode")


def latents(generator: Generator) -> torch.Tensor:
    cond = generator.encode_prompts(["a large red circle above a small blue square"])
    return sample(generator, None, cond, None, [0], SEARCH, shape=(4, 16, 16)).latents


def load(folder: Path) -> Generator:
    return Generator.load(str(folder), max_sequence_length=1)


def stock(folder: Path) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)


def stock_latents(pipe: StableDiffusion3Pipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a large red circle above a small blue square", num_inference_steps=2, guidance_scale=1.0, max_sequence_length=1,
        output_type="latent", generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


@pytest.fixture(scope="module")
def plain(generator_folder: Path) -> torch.Tensor:
    return latents(load(generator_folder))


def factors(rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    return torch.randn(rank, 64, generator=rng) * 0.2, torch.randn(64, rank, generator=rng) * 0.2


@pytest.fixture(scope="module")
def doubled(generator_folder: Path) -> torch.Tensor:
    """Latents with the factors merged at strength 2, which every form of them below must give."""
    generator = load(generator_folder)
    down, up = factors()
    with torch.no_grad():
        generator.transformer.get_submodule(BLOCK).weight.add_(2 * up @ down)
    return latents(generator)


def peft_folder(folder: Path) -> Path:
    down, up = factors()
    save_file(
        {f"base_model.model.{BLOCK}.lora_A.weight": down, f"base_model.model.{BLOCK}.lora_B.weight": up},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["attn.to_q"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def kohya_file(folder: Path) -> Path:
    down, up = factors()
    name = "lora_unet_" + BLOCK.replace(".", "_")
    file = folder / "style.safetensors"
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(8.0)}, file
    )
    return file


def old_run(folder: Path) -> Path:
    """A run of an older drm: no metadata, the alpha in config.yaml beside."""
    (folder / "lora").mkdir()
    down, up = factors()
    save_file(
        {f"transformer.{BLOCK}.lora_A.weight": down, f"transformer.{BLOCK}.lora_B.weight": up},
        folder / "lora" / "pytorch_lora_weights.safetensors",
    )
    (folder / "config.yaml").write_text("lora_rank: 4\nlora_alpha: 8\n")
    return folder / "lora"


def old_lora_with_a_card(folder: Path) -> Path:
    moved = old_run(folder)
    (folder / "config.yaml").unlink()
    (moved / "README.md").write_text("A LoRA of rank 4, alpha 8: step-grpo, update 3.\n")
    return moved


@pytest.mark.parametrize("form", [peft_folder, kohya_file, old_run, old_lora_with_a_card])
def test_every_form_has_its_strength(
    generator_folder: Path, doubled: torch.Tensor, tmp_path: Path, form: Callable
) -> None:
    generator = load(generator_folder)
    generator.load_lora(str(form(tmp_path)))
    torch.testing.assert_close(latents(generator), doubled, atol=1e-4, rtol=1e-4)


def test_without_a_word_alpha_is_the_rank(generator_folder: Path, tmp_path: Path) -> None:
    folder = old_run(tmp_path)
    (tmp_path / "config.yaml").unlink()
    generator, pipe = load(generator_folder), stock(generator_folder)
    generator.load_lora(str(folder / "pytorch_lora_weights.safetensors"))
    pipe.load_lora_weights(folder)
    torch.testing.assert_close(latents(generator), stock_latents(pipe), atol=1e-5, rtol=1e-5)


def test_what_grpo_saves_stock_diffusers_draws(
    generator_folder: Path, reward_folder: Path, tmp_path: Path, plain: torch.Tensor
) -> None:
    """The latents of plain diffusers with the saved LoRA are those of the policy as the run evaluated it, to 1e-5."""
    flags = {
        "out": str(tmp_path), "reward": str(reward_folder), "updates": 1, "prompts_per_update": 2, "group_size": 2, "steps": 3,
        "lora_rank": 4, "lora_alpha": 16, "eval_prompts": 2, "eval_seeds": 1, "min_std": 0.0, "lr": 0.02, "judge": "none",
    }  # fmt: skip
    grpo.run(resolve("grpo", flags=flags), Silent())
    folder = tmp_path / "lora-last"
    policy = load(generator_folder)
    layers = load_file(folder / "pytorch_lora_weights.safetensors")
    with torch.no_grad():
        for key, up in layers.items():
            if key.endswith(".lora_B.weight"):
                name = key.removeprefix("transformer.").removesuffix(".lora_B.weight")
                weight = policy.transformer.get_submodule(name).weight
                weight.add_(16 / 4 * up @ layers[key.replace("lora_B", "lora_A")])
    expected = latents(policy)
    assert (expected - plain).abs().max() > 1e-4
    pipe = stock(generator_folder)
    pipe.load_lora_weights(folder)
    torch.testing.assert_close(stock_latents(pipe), expected, atol=1e-5, rtol=1e-5)
    again = load(generator_folder)
    again.load_lora(str(folder))
    torch.testing.assert_close(latents(again), expected, atol=1e-5, rtol=1e-5)


def write(folder: Path, tensors: dict[str, torch.Tensor], name: str = "pytorch_lora_weights.safetensors") -> Path:
    save_file(tensors, folder / name)
    return folder


GOOD = {
    f"transformer.{BLOCK}.lora_A.weight": torch.ones(4, 64),
    f"transformer.{BLOCK}.lora_B.weight": torch.ones(64, 4),
}
REFUSED = {
    "another model's": (
        {"transformer.single_transformer_blocks.7.attn.to_q.lora_A.weight": torch.ones(4, 64)},
        "its tensors belong to another model than this StableDiffusion3Pipeline, the first is transformer.single_",
    ),
    "partly another model's": (
        GOOD | {"transformer.transformer_blocks.40.attn.to_q.lora_A.weight": torch.ones(4, 64)},
        "1 of 3 tensors belong to another model",
    ),
    "a text encoder's too": (
        GOOD | {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)},
        "changes the text encoders too",
    ),
    "wrong shapes": (
        {f"transformer.{BLOCK}.lora_A.weight": torch.ones(4, 32), f"transformer.{BLOCK}.lora_B.weight": torch.ones(64, 4)},
        "has shapes [64, 4] and [4, 32] for weights of [64, 64]",
    ),
    "not finite": (GOOD | {f"transformer.{BLOCK}.lora_B.weight": torch.full((64, 4), torch.nan)}, "are not finite"),
    "a half": ({f"transformer.{BLOCK}.lora_A.weight": torch.ones(4, 64)}, f"half of the LoRA of {BLOCK} is missing"),
    "no LoRA": ({"weight": torch.ones(2)}, "its tensors belong to another model"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_what_it_is(generator_folder: Path, tmp_path: Path, case: str) -> None:
    tensors, message = REFUSED[case]
    with pytest.raises(InputError, match=re.escape(message)):
        load(generator_folder).load_lora(str(write(tmp_path, tensors)))


def test_several_files_are_a_question(generator_folder: Path, tmp_path: Path) -> None:
    generator = load(generator_folder)
    for name in ("step100.safetensors", "step200.safetensors"):
        write(tmp_path, GOOD, name)
    with pytest.raises(InputError, match="holds 2 LoRAs: step100.safetensors, step200.safetensors"):
        generator.load_lora(str(tmp_path))
    generator.load_lora(str(tmp_path / "step100.safetensors"))


def test_dora_is_refused(generator_folder: Path, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(InputError, match="use_dora"):
        load(generator_folder).load_lora(str(folder))
