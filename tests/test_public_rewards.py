"""Public reward models in their published layouts, held against a computation that shares nothing with drm's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Outcome
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from drmcli.scorers import NAMES, StateScorer, load_scorer
from drmcli.scorers.dina import QueryHead, preference

KEPT, TAPS, HEADS, RANK, ALPHA = 4, [2, 3, 4], 2, 2, 4
CAPTION = "a large red circle above a small blue square"


@pytest.fixture(scope="module")
def dina_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DiNa-LRM's layout on the embedded pipeline: random head, random LoRA on two kinds of modules."""
    from drmcli.tiny import world

    base = Path(world.__file__).parent / "weights" / "generator"
    folder = tmp_path_factory.mktemp("dina")
    torch.manual_seed(0)
    width = 64
    head = QueryHead(width, width, width, len(TAPS), 4, HEADS, project=False)
    state = {name: torch.randn_like(t) * 0.1 for name, t in head.state_dict().items()}
    (folder / "checkpoint" / "backbone_lora").mkdir(parents=True)
    torch.save(state, folder / "checkpoint" / "rm_head.pt")
    lora = {}
    for block in range(KEPT):
        for module in ("to_q", "add_k_proj"):
            name = f"base_model.model.transformer_blocks.{block}.attn.{module}"
            lora |= {
                f"{name}.lora_A.weight": torch.randn(RANK, width) * 0.3,
                f"{name}.lora_B.weight": torch.randn(width, RANK) * 0.3,
            }
    save_file(lora, folder / "checkpoint" / "backbone_lora" / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["to_q", "add_k_proj"]}
    (folder / "checkpoint" / "backbone_lora" / "adapter_config.json").write_text(json.dumps(facts))
    model = {
        "backbone_model_id": str(base), "num_transformer_layers": KEPT, "use_lora": True, "freeze_backbone": False,
        "visual_head_idx": TAPS, "text_head_idx": TAPS, "use_text_features": True, "use_t_embed": True, "use_logistic": False,
        "reward_head": {"use_proj_in": False, "width": -1, "out_dim": 1, "num_queries": 4, "num_attn_heads": HEADS, "dropout": 0},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"model": model, "training": {"add_noise": True}}))
    return folder


def by_hand(folder: Path, latents: Tensor, sigma: float, embeds: Tensor, pooled: Tensor) -> Tensor:
    """The score by the published description: LoRA merged into the weights, tokens gathered block by block, the head in plain algebra."""
    base = json.loads((folder / "config.json").read_text())["model"]["backbone_model_id"]
    model = SD3Transformer2DModel.from_pretrained(base, subfolder="transformer")
    lora = load_file(folder / "checkpoint" / "backbone_lora" / "adapter_model.safetensors")
    with torch.no_grad():
        for name in [n for n in lora if "lora_A" in n]:
            module = model.get_submodule(name.removeprefix("base_model.model.").partition(".lora_A")[0])
            module.weight += ALPHA / RANK * lora[name.replace("lora_A", "lora_B")] @ lora[name]
    w = torch.load(folder / "checkpoint" / "rm_head.pt", weights_only=True)
    with torch.no_grad():
        x, c = model.pos_embed(latents), model.context_embedder(embeds)
        time = model.time_text_embed(torch.full((len(latents),), 1000 * sigma), pooled)
        image, text = [], []
        for number, block in enumerate(model.transformer_blocks[:KEPT], 1):
            c, x = block(hidden_states=x, encoder_hidden_states=c, temb=time)
            if number in TAPS:
                image.append(x)
                text.append(c)
    size = x.shape[-1]

    def linear(v: Tensor, name: str) -> Tensor:
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(v: Tensor, name: str) -> Tensor:
        return v / (v.pow(2).mean(-1, keepdim=True) + torch.finfo(v.dtype).eps).sqrt() * w[f"{name}.weight"]

    def gathered(tokens: list[Tensor], kind: str) -> Tensor:
        parts = []
        for i, tap in enumerate(tokens):
            name = f"layer_adapters_{kind}.{i}"
            change = linear(F.silu(linear(time, f"{name}.cond_mlp.0")), f"{name}.cond_mlp.2")[:, None]
            tap = tap * (1 + change[..., :size]) + change[..., size:] + w[f"{name}.layer_embed"]
            parts.append(linear(tap, f"{name}.proj"))
        return linear(torch.cat(parts, -1), f"agg_{kind}")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        part = size // HEADS
        out = []
        for h in range(HEADS):
            a, b, values = (t[..., h * part : (h + 1) * part] for t in (q, k, v))
            out.append((a @ b.transpose(1, 2) / math.sqrt(part)).softmax(-1) @ values)
        return torch.cat(out, -1)

    def gate(v: Tensor, name: str) -> Tensor:
        return linear(F.silu(linear(v, f"{name}.0")), f"{name}.2").sigmoid()

    visual, said = gathered(image, "visual"), gathered(text, "text")
    q = w["query_tokens"].expand(len(latents), -1, -1)
    v, t = norm(visual, "attn1.norm_v"), norm(said, "attn1.norm_t")
    asked = linear(norm(q, "attn1.norm_q"), "attn1.to_q")
    seen = attend(asked, linear(v, "attn1.to_k_vis"), linear(v, "attn1.to_v_vis") * gate(v, "attn1.gate_vis"))
    read = attend(asked, linear(t, "attn1.to_k_text"), linear(t, "attn1.to_v_text") * gate(t, "attn1.gate_text"))
    q = q + linear(seen + read, "attn1.to_out.0")
    v = norm(visual, "attn2.norm_v")
    asked = linear(norm(q, "attn2.norm_q"), "attn2.to_q")
    q = q + linear(attend(asked, linear(v, "attn2.to_k_vis"), linear(v, "attn2.to_v_vis")), "attn2.to_out.0")
    q = q + linear(F.gelu(linear(norm(q, "norm_ff"), "ff.0")), "ff.2")
    return linear(q, "head")[..., 0].mean(1)


def test_dina_scores_as_described(dina_folder: Path) -> None:
    scorer = load_scorer(str(dina_folder), device=torch.device("cpu"), dtype=torch.float32)
    assert isinstance(scorer, StateScorer)
    cond = scorer.encode([CAPTION, "a small green triangle on the left"])
    assert cond.prompt_embeds.shape[1] == scorer.model.generator().pipe.tokenizer.model_max_length + 128
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    for sigma in (0.1, 0.7):
        wanted = by_hand(dina_folder, latents, sigma, cond.prompt_embeds, cond.pooled_prompt_embeds)
        torch.testing.assert_close(scorer.score(latents, sigma, cond), wanted, rtol=1e-5, atol=1e-5)
    latents.requires_grad_(True)
    scorer.score(latents, 0.4, cond).sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0


def test_the_published_size() -> None:
    """87 tensors and 139.3 million numbers, as the published head has, on the meta device."""
    with torch.device("meta"):
        head = QueryHead(1536, 1536, 1536, taps=3, queries=4, heads=8, project=False)
    assert len(head.state_dict()) == 87
    assert sum(t.numel() for t in head.state_dict().values()) == pytest.approx(139.3e6, rel=1e-3)


def test_thurstone() -> None:
    """Equal scores: one half. A gap of one standard deviation, sqrt(2 (2 sigma^2 + .05)): Phi(1) = .8413."""
    zero = torch.zeros(1)
    assert preference(zero, zero, 0.4).item() == pytest.approx(0.5)
    assert preference(zero + math.sqrt(2 * (2 * 0.16 + 0.05)), zero, 0.4).item() == pytest.approx(0.8413, abs=1e-4)


@pytest.mark.parametrize("words", [
    ["score", "p.png", "--prompt", CAPTION, "--reward", "{dina}"],
    ["sample", CAPTION, "--steps", "2", "--stepwise", "--beams", "2", "--reward", "{dina}"],
    ["sample", CAPTION, "--steps", "2", "--mode", "best-of-n", "--beams", "2", "--reward", "dina-lrm={dina}"],
    ["bench", "--dataset", "data/pairs.jsonl", "--reward", "{dina}", "--sigma", "0.4"],
    ["bench", "--dataset", "data/pairs.jsonl", "--reward", "none", "--scorer", "{dina}"],
    ["grpo", "--updates", "1", "--steps", "2", "--group-size", "2", "--reward", "{dina}", "--judge", "none",
     "--set", "prompts_per_update=2", "--set", "eval_prompts=2", "--set", "eval_seeds=1", "--set", "lora_rank=2"],
], ids=["score", "stepwise", "best-of-n", "bench", "scorer", "grpo"])  # fmt: skip
def test_dina_goes_wherever_a_reward_goes(
    words: list[str], dina_folder: Path, drm: Callable[..., Outcome], pairs_file: Path
) -> None:
    Path("p.png").write_bytes((pairs_file.parent / "0-a.png").read_bytes())
    result = drm(*(word.replace("{dina}", str(dina_folder)) for word in words), "--json", "--out", "r")
    assert result.code == 0, result.err


def broken(source: Path, target: Path, change: Callable[[Path], None]) -> Path:
    import shutil

    shutil.copytree(source, target)
    change(target)
    return target


def _settings(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())
        found["model"] |= values
        (folder / "config.json").write_text(json.dumps(found))

    return change


def _head(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "checkpoint" / "rm_head.pt"
        torch.save(change(torch.load(file, weights_only=True)), file)

    return apply


@pytest.mark.parametrize(("change", "fact"), [
    (_settings(use_logistic=True), "use_logistic = true is a variant"),
    (_settings(visual_head_idx=[1, 2]), "text_head_idx = "),
    (_head(lambda s: {k: v for k, v in s.items() if k != "head.bias"}), "lacks head.bias"),
    (_head(lambda s: s | {"more": torch.zeros(1)}), "has a more"),
    (_head(lambda s: s | {"head.bias": torch.full((1,), float("nan"))}), "not finite"),
    (lambda f: (f / "checkpoint" / "rm_head.pt").write_bytes(b"no tensors"), "is damaged"),
    (lambda f: (f / "checkpoint" / "rm_head.pt").unlink(), "holds no checkpoint/rm_head.pt"),
    (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
], ids=["logistic", "taps", "missing", "surplus", "nan", "no-tensors", "no-head", "config"])  # fmt: skip
def test_a_damaged_folder_is_refused(
    change: Callable[[Path], None],
    fact: str,
    dina_folder: Path,
    drm: Callable[..., Outcome],
    pairs_file: Path,
    tmp_path: Path,
) -> None:
    folder = broken(dina_folder, tmp_path / "broken", change)
    result = drm("score", pairs_file.parent / "0-a.png", "--prompt", CAPTION, "--reward", folder)
    assert result.code == 2
    assert fact in result.err


def test_names_say_size_and_licence() -> None:
    assert "Apache-2.0" in NAMES["dina-lrm"] and "GB" in NAMES["dina-lrm"]
