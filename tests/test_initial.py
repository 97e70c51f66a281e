"""Where training starts: a saved reward model, whole or its head alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file

from drmcli.config import resolve
from drmcli.errors import InputError
from drmcli.recipes.initial import make_model
from drmcli.reward import RewardModel

SHAPE = {"head_width": 16, "drop_layers": 3}


@pytest.fixture
def saved(tmp_path: Path, generator_folder: Path):
    def make(backbone: str) -> Path:
        ref = resolve("train-reward").generator  # as the preset names it
        model = RewardModel.from_generator(ref, max_sequence_length=1, backbone=backbone, seed=5, **SHAPE)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)
        model.save_pretrained(tmp_path / backbone)
        return tmp_path / backbone

    return make


@pytest.mark.parametrize(
    ("stored", "asked", "kept", "learning"),
    [
        ("full", "full", "full", {"head", "transformer"}),
        ("full", "head", "full", {"head"}),
        ("lora", "lora", "lora", {"head", "lora"}),
        ("lora", "head", "lora", {"head"}),
        ("frozen", "lora", "lora", {"head", "lora"}),
        ("frozen", "frozen", "frozen", {"head"}),
        ("frozen", "full", "full", {"head", "transformer"}),
    ],
)
def test_what_learns_and_what_is_stored(
    saved, tmp_path: Path, stored: str, asked: str, kept: str, learning: set
) -> None:
    """The scores are those of the saved model, before training and after it is saved again."""
    folder = saved(stored)
    model = make_model(resolve("train-reward", flags={"init": str(folder), "backbone": asked, "lora_rank": 4}))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {"lora" if ".lora_" in n else n.split(".")[0] for n in names} == learning
    assert model.config.backbone == kept
    model.save_pretrained(tmp_path / "again")
    x = torch.randn(2, int(model.config.transformer["in_channels"]), 8, 8, generator=torch.Generator().manual_seed(0))
    cond = model.generator().encode_prompts(["a large red circle on the left"] * 2)
    scores = [RewardModel.from_pretrained(f).score(x, 0.4, cond) for f in (folder, tmp_path / "again")]
    assert torch.equal(scores[0], scores[1])
    with torch.no_grad():
        assert torch.allclose(model.eval().score(x, 0.4, cond), scores[0], atol=1e-6)


def test_the_head_alone_goes_on(saved, tmp_path: Path, drm) -> None:
    folder = saved("full")
    flags = ["train-reward", *SMALL, "--steps", 2, "--json", "--init", folder]
    result = drm(*flags, "--backbone", "head", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "run" / "reward"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head"}
    plan = drm(*flags, "--backbone", "head", "--dry-run")
    assert plan.code == 0, plan.err


def test_what_does_not_fit_is_said_first(saved, tmp_path: Path, drm) -> None:
    folder = saved("lora")
    for flags, code, fact in (
        (["--init", folder, "--backbone", "full"], 2, "--backbone full: the backbone of --init"),
        (["--init", folder, "--backbone", "lora", "--resolution", 64], 2, "was trained with --resolution none, not 64"),
        (["--init", folder, "--set", "max_sequence_length=2"], 2, "max_sequence_length 1, not 2"),
        (["--init", tmp_path / "nowhere"], 3, "there is no such folder"),
        (["--init", "random", "--backbone", "head"], 2, "--init random: with --backbone head"),
    ):
        result = drm("train-reward", *SMALL, *flags, "--out", tmp_path / "run")
        assert result.code == code, (flags, result.err)
        assert fact in result.err
    with pytest.raises(InputError, match="^--init"):
        make_model(resolve("train-reward", flags={"init": str(tmp_path)}))
