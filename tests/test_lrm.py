"""LRM in its published layout, held against the U-Net run stage by stage in plain calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch
from conftest import Outcome
from torch import Tensor

from drmcli.scorers import NAMES, StateScorer, load_scorer, lrm

CAPTION = "a large red circle above a small blue square"


@pytest.fixture(scope="module", params=["lrm-sd15", "lrm-sdxl"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """(name, base pipeline's folder, reward model's folder), all small and random."""
    large = request.param == "lrm-sdxl"
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("lrm")
    torch.manual_seed(1)
    (tiny.sdxl() if large else tiny.sd("epsilon")).save_pretrained(base)
    torch.manual_seed(2)
    own = tiny.sdxl() if large else tiny.sd("epsilon")
    own.unet.save_pretrained(folder / "unet")
    own.text_encoder.save_pretrained(folder / "text_encoder")
    if large:
        own.text_encoder_2.save_pretrained(folder / "text_encoder_2")
    width = 16 + 32 + 32
    state = {"visual_projection": {"weight": torch.randn(16, width) * 0.1}, "logit_scale": 2.66}
    if not large:
        state["text_projection"] = {"weight": torch.randn(16, 16)}
    torch.save(state, folder / "state_dict.pt")
    return request.param, base, folder


@pytest.fixture
def folder(made: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    name, base, own = made
    monkeypatch.setattr(lrm, "BASES", {name: (str(base), None)})
    return own


def by_hand(made: tuple[str, Path, Path], latents: Tensor, time: int, alpha: float, prompts: list[str]) -> Tensor:
    """The published description: x_t of a variance-preserving process at a whole time, the stages one by one."""
    import diffusers
    import transformers

    name, base, folder = made
    large = name == "lrm-sdxl"
    pipe = (diffusers.StableDiffusionXLPipeline if large else diffusers.StableDiffusionPipeline).from_pretrained(base)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    one = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    state = torch.load(folder / "state_dict.pt", weights_only=True)

    def told(texts: list[str]) -> tuple[Tensor, Tensor]:
        ids = pipe.tokenizer(texts, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True,
                             return_tensors="pt").input_ids  # fmt: skip
        first = one(ids, output_hidden_states=True)
        if not large:
            return first.last_hidden_state, first.pooler_output
        two = transformers.CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
        second = two(ids, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds

    with torch.no_grad():
        (embeds, pooled), (empty, blank) = told(prompts), told([""])
        text = torch.cat([embeds, empty.expand(len(prompts), -1, -1)])
        x = torch.cat([latents, latents]) * (alpha + (1 - alpha**2) ** 0.5)
        t = torch.full((len(x),), time)
        emb = unet.time_embedding(unet.time_proj(t))
        if large:
            ids = torch.tensor([1024, 1024, 0, 0, 1024, 1024]).expand(len(x), 6)
            sizes = unet.add_time_proj(ids.flatten()).reshape(len(x), -1)
            emb = emb + unet.add_embedding(torch.cat([torch.cat([pooled, blank.expand(len(prompts), -1)]), sizes], -1))
        h = unet.conv_in(x)
        seen = []
        for block in unet.down_blocks:
            more = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
            h, states = block(hidden_states=h, temb=emb, **more)
            seen.append(states[-2 if block.downsamplers else -1][: len(prompts)].mean((2, 3)))
        h = unet.mid_block(h, emb, encoder_hidden_states=text).mean((2, 3))
        c, u = h.chunk(2)
        feature = torch.cat([*seen, u + 7.5 * (c - u)], -1) @ state["visual_projection"]["weight"].T
        words = pooled if large else pooled @ state["text_projection"]["weight"].T
        feature, words = (v / v.norm(dim=-1, keepdim=True) for v in (feature, words))
        return torch.tensor(2.66).exp() * (feature * words).sum(-1)


def test_lrm_scores_as_described(made: tuple[str, Path, Path], folder: Path) -> None:
    """x_t = alpha x_0 + s eps; what drm holds is x_t / (alpha + s), at sigma = s / (alpha + s)."""
    scorer = load_scorer(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    assert isinstance(scorer, StateScorer)
    prompts = [CAPTION, "a small green triangle"]
    cond = scorer.encode(prompts)
    table = scorer.model.family.table
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    for time in (51, 701):
        sigma = float(table[time])
        alpha = (1 - sigma) / (sigma**2 + (1 - sigma) ** 2) ** 0.5
        wanted = by_hand(made, latents, time, alpha, prompts)
        torch.testing.assert_close(scorer.score(latents, sigma, cond), wanted, rtol=1e-5, atol=1e-5)
    latents.requires_grad_(True)
    scorer.score(latents, 0.4, cond).sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0


@pytest.mark.parametrize("words", [
    ["score", "p.png", "--prompt", CAPTION, "--reward", "{lrm}", "--resolution", "128"],
    ["sample", CAPTION, "--steps", "2", "--stepwise", "--beams", "2", "--generator", "{base}", "--reward", "{lrm}"],
    ["bench", "--dataset", "data/pairs.jsonl", "--reward", "{lrm}", "--sigma", "0.4"],
    ["grpo", "--updates", "1", "--steps", "2", "--group-size", "2", "--generator", "{base}", "--reward", "{lrm}", "--judge", "none",
     "--set", "prompts_per_update=2", "--set", "eval_prompts=2", "--set", "eval_seeds=1", "--set", "lora_rank=2"],
], ids=["score", "stepwise", "bench", "grpo"])  # fmt: skip
def test_lrm_goes_wherever_a_reward_goes(
    words: list[str], made: tuple[str, Path, Path], folder: Path, drm: Callable[..., Outcome], pairs_file: Path
) -> None:
    Path("p.png").write_bytes((pairs_file.parent / "0-a.png").read_bytes())
    filled = [word.replace("{lrm}", str(folder)).replace("{base}", str(made[1])) for word in words]
    result = drm(*filled, "--json", "--out", "r")
    assert result.code == 0, result.err


def test_another_latent_space_is_refused(folder: Path, drm: Callable[..., Outcome]) -> None:
    result = drm("sample", CAPTION, "--steps", "2", "--stepwise", "--reward", folder, "--out", "r")
    assert result.code == 2
    assert "latents" in result.err.splitlines()[-2]


def test_projections_are_checked(folder: Path, drm: Callable[..., Outcome], pairs_file: Path, tmp_path: Path) -> None:
    import shutil

    own = tmp_path / "own"
    shutil.copytree(folder, own)
    torch.save({"visual_projection": {"weight": torch.zeros(2, 2)}}, own / "state_dict.pt")
    result = drm("score", pairs_file.parent / "0-a.png", "--prompt", CAPTION, "--reward", own)
    assert (result.code, "lacks logit_scale" in result.err) == (2, True)
    assert json.dumps(sorted(NAMES)).count("lrm-") == 2
