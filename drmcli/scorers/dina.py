"""DiNa-LRM (arXiv 2602.11146): a public reward model on Stable Diffusion 3.5 Medium that scores noisy latents.

Twelve blocks with a LoRA; image and text tokens behind several of them go through adapters that know the sigma, and a few query
tokens read them. Trained with a Thurstone loss on uniform sigma; its authors score pictures at sigma 0.1 and a sampler's latents at 0.4.

Read from its published layout: `config.json`, `checkpoint/backbone_lora/` (a peft adapter) and `checkpoint/rm_head.pt` (by PyTorch's
weights-only reader). Two things differ from its authors' own code and hardly change a score: pictures are encoded as the mode of the
VAE's posterior, not a draw from it, and sigma is taken as it is, not as the nearest of a scheduler's thousand entries.

Dimension letters: B latents, L tokens, D width of the denoiser, W width of the head, Q query tokens, E width of the time embedding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from drmcli.config import local_or_hub
from drmcli.errors import InputError
from drmcli.families import family_of
from drmcli.families.base import Conditioning, listening
from drmcli.generator import Generator
from drmcli.hub import explained
from drmcli.kernels import PLAIN, Kernels
from drmcli.parts import denoiser_config, quiet_libraries, read_index, with_denoiser
from drmcli.reward import RewardConfig, RewardModel
from drmcli.scorers.weights import Source, read

REPOSITORY = "liuhuohuo/DiNa-LRM-SD35M-12layers"
HEAD, LORA = "checkpoint/rm_head.pt", "checkpoint/backbone_lora"
TEXT_LENGTH = 128
"""T5 tokens in its training and evaluation."""
PICTURE_SIGMA = 0.1
"""Sigma at which its authors score pictures."""


def is_published_layout(folder: str | Path) -> bool:
    """Does a folder hold DiNa-LRM's files?"""
    return (Path(folder) / HEAD).is_file() or (Path(folder) / LORA).is_dir()


def files(source: Source) -> Path:
    """The folder with its files. Raises MissingError."""
    return source.whole(REPOSITORY, ["config.json", HEAD, f"{LORA}/*"], HEAD)


class Adapter(nn.Module):
    """Tokens of one tap [B, L, D], modulated by the time embedding [B, E] -> [B, L, W / 4]."""

    def __init__(self, width: int, inner: int, time: int, project: bool):
        super().__init__()
        self.proj_in = nn.Linear(width, inner, bias=False) if project else None
        self.layer_embed = nn.Parameter(torch.zeros(1, 1, inner))
        self.cond_mlp = nn.Sequential(nn.Linear(time, 2 * inner), nn.SiLU(), nn.Linear(2 * inner, 2 * inner))
        self.proj = nn.Linear(inner, inner // 4)

    def forward(self, tokens: Tensor, time: Tensor) -> Tensor:
        if self.proj_in is not None:
            tokens = self.proj_in(tokens)
        gamma, beta = self.cond_mlp(time)[:, None].chunk(2, -1)
        return self.proj(tokens * (1 + gamma) + beta + self.layer_embed)


class Read(nn.Module):
    """Attention of the queries [B, Q, W] to image tokens, and with `text` to text tokens by a softmax of their own, values gated."""

    def __init__(self, width: int, heads: int, text: bool):
        super().__init__()
        self.heads, self.text = heads, text
        self.norm_q, self.norm_v = nn.RMSNorm(width), nn.RMSNorm(width)
        self.to_q, self.to_k_vis, self.to_v_vis = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        if text:
            self.norm_t = nn.RMSNorm(width)
            self.to_k_text, self.to_v_text = nn.Linear(width, width), nn.Linear(width, width)
            self.gate_vis, self.gate_text = _gate(width), _gate(width)

    def forward(self, queries: Tensor, image: Tensor, text: Tensor) -> Tensor:
        q, v = self.to_q(self.norm_q(queries)), self.norm_v(image)
        values = self.to_v_vis(v) * self.gate_vis(v).sigmoid() if self.text else self.to_v_vis(v)
        found = self._attend(q, self.to_k_vis(v), values)
        if self.text:
            t = self.norm_t(text)
            found = found + self._attend(q, self.to_k_text(t), self.to_v_text(t) * self.gate_text(t).sigmoid())
        return queries + self.to_out[0](found)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _gate(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))


class QueryHead(nn.Module):
    """Image and text tokens of several taps and a time embedding -> scores [B]. Names are those of the published weights."""

    def __init__(self, width: int, inner: int, time: int, taps: int, queries: int, heads: int, project: bool):
        super().__init__()
        made = [nn.ModuleList(Adapter(width, inner, time, project) for _ in range(taps)) for _ in range(2)]
        self.layer_adapters_visual, self.layer_adapters_text = made
        self.agg_visual, self.agg_text = (nn.Linear(taps * (inner // 4), inner) for _ in range(2))
        self.query_tokens = nn.Parameter(torch.zeros(1, queries, inner))
        self.attn1, self.attn2 = Read(inner, heads, text=True), Read(inner, heads, text=False)
        self.norm_ff = nn.RMSNorm(inner)
        self.ff = nn.Sequential(nn.Linear(inner, 4 * inner), nn.GELU(), nn.Linear(4 * inner, inner))
        self.head = nn.Linear(inner, 1)

    def forward(self, image: Sequence[Tensor], text: Sequence[Tensor], time: Tensor) -> Tensor:
        dtype = self.query_tokens.dtype
        time = time.to(dtype)
        seen = [adapt(tokens.to(dtype), time) for adapt, tokens in zip(self.layer_adapters_visual, image)]
        said = [adapt(tokens.to(dtype), time) for adapt, tokens in zip(self.layer_adapters_text, text)]
        visual, textual = self.agg_visual(torch.cat(seen, -1)), self.agg_text(torch.cat(said, -1))
        queries = self.query_tokens.expand(len(time), -1, -1)
        queries = self.attn2(self.attn1(queries, visual, textual), visual, textual)
        queries = queries + self.ff(self.norm_ff(queries))
        return self.head(queries).mean((1, 2)).float()


class DiNaLRM(RewardModel):
    """DiNa-LRM as a reward model of drm: it scores wherever one does. It is read, not saved nor trained here."""

    picture_sigma = PICTURE_SIGMA

    def __init__(self, config: RewardConfig, transformer: Any, head: dict[str, Any]):
        super().__init__(config, transformer)
        width = self.family.width(transformer)
        inner = width if head["width"] == -1 else int(head["width"])
        self.head = QueryHead(  # type: ignore[assignment]
            width, inner, width, len(self.taps), int(head["num_queries"]), int(head["num_attn_heads"]),
            bool(head["use_proj_in"]) or width != inner,
        )  # fmt: skip

    def score(
        self, latents: Tensor, sigma: float | Tensor, cond: Conditioning, *, states: list[Any] | None = None
    ) -> Tensor:
        """Scores [B], float32, differentiable, of latents [B, C, H, W] at sigma (one, or [B])."""
        sigma = torch.as_tensor(sigma, device=latents.device, dtype=torch.float32).expand(len(latents))
        inputs = self.family.inputs(self.transformer, latents, sigma, cond, self.guidance)
        last = len(self.blocks) - 1
        with listening(self.blocks, [*self.taps, last]) as heard:
            self.transformer(**inputs, return_dict=False)
        if states is not None:
            states.append(heard[last])
        time = self.transformer.time_text_embed(inputs["timestep"], inputs["pooled_projections"])
        with torch.autocast(latents.device.type, enabled=False):
            return self.head([heard[t][1] for t in self.taps], [heard[t][0] for t in self.taps], time)

    forward = score

    def load_head(self, file: Path, name: str) -> None:
        """The query head. Raises InputError, beginning with `name`, for weights that are not this head's."""
        if not file.is_file():
            raise InputError(f"{name}: holds no {HEAD}", hint=f"get the files of https://huggingface.co/{REPOSITORY}")
        found, wanted = dict(read(file, Source(name, None, ""))), self.head.state_dict()
        problem = next((f"lacks {k}" for k in wanted if k not in found), None)
        problem = problem or next(
            (f"has a {k} that its config.json does not explain" for k in found if k not in wanted), None
        )
        problem = problem or next(
            (
                f"{k} has shape {list(v.shape)}, not {list(wanted[k].shape)}"
                for k, v in found.items()
                if v.shape != wanted[k].shape
            ),
            None,
        )
        problem = problem or next(
            (f"the weights of {k} are not finite" for k, v in found.items() if not v.isfinite().all()), None
        )
        if problem:
            raise InputError(f"{name}: {HEAD} {problem}", hint="its files do not belong together; get them again")
        self.head.load_state_dict({k: v.float() for k, v in found.items()})

    def load_lora(self, folder: Path, name: str) -> None:
        """The peft adapter, by the full names of the modules that it has weights for, so that nothing else is matched."""
        hint = f"get the files of https://huggingface.co/{REPOSITORY}"
        weights = folder / "adapter_model.safetensors"
        if not weights.is_file() or not (folder / "adapter_config.json").is_file():
            raise InputError(
                f"{name}: holds no {LORA} with adapter_model.safetensors and adapter_config.json", hint=hint
            )
        settings = _json(folder / "adapter_config.json", name)
        state = {k.removeprefix("base_model.model."): v.float() for k, v in load_file(weights).items()}
        modules = sorted({k.rpartition(".lora_")[0] for k in state})
        there = dict(self.transformer.named_modules())
        if strange := [m for m in modules if m not in there]:
            raise InputError(f"{name}: its LoRA is for {strange[0]}, which its base has not", hint=hint)
        if broken := [k for k, v in state.items() if not v.isfinite().all()]:
            raise InputError(f"{name}: the weights of {broken[0]} are not finite", hint=hint)
        facts = {"r": settings["r"], "lora_alpha": settings["lora_alpha"], "target_modules": modules}
        self.transformer.load_lora_adapter(state, prefix=None, metadata=facts)


def load(
    folder: Path,
    ref: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    kernels: Kernels = PLAIN,
    beside: Generator | None = None,
    flag: str = "--reward",
) -> DiNaLRM:
    """From a folder in the published layout, frozen and ready to score; ref: as it was asked for.

    beside: see `RewardModel.from_pretrained`.

    Raises MissingError (its base is absent, gated, offline) or InputError (damaged, another variant), each naming `flag`.
    """
    name = f"{flag} {ref}"
    with explained(ref, flag), quiet_libraries():
        settings = read_settings(folder, name)
        base = local_or_hub(settings["backbone_model_id"], f"{name}: backbone_model_id")
        family = family_of(str(read_index(base, None).get("_class_name")), f"{name}: its base")
        if family.name != "sd3":
            raise InputError(
                f"{name}: on {family.name}, where its published form is on sd3", hint="use the one on SD3.5-Medium"
            )
        full = {k: v for k, v in denoiser_config(family, base, None).items() if not k.startswith("_")}
        config = RewardConfig(
            base_model=settings["backbone_model_id"], transformer=full, family=family.name, max_sequence_length=TEXT_LENGTH,
            drop_layers=int(full["num_layers"]) - int(settings["num_transformer_layers"]),
            tap_layers=[int(i) - 1 for i in settings["visual_head_idx"]], backbone="frozen",
        )  # fmt: skip
        model = with_denoiser(
            lambda denoiser: DiNaLRM(config, denoiser, settings["reward_head"]), family, base, revision=None, dtype=dtype, device=device,
            beside=beside, kernels=kernels,
        )  # fmt: skip
        model.load_head(folder / HEAD, name)
        if settings["use_lora"]:
            model.load_lora(folder / LORA, name)
    model.transformer.to(dtype)  # the adapter
    return model.ready(kernels, device)


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """The `model` section of config.json with the defaults of the published recipe. Raises InputError for other variants."""
    values = _json(folder / "config.json", name)
    model = values.get("model", values)
    if not isinstance(model, dict) or "backbone_model_id" not in model:
        raise InputError(f"{name}: its config.json names no backbone_model_id", hint=f"get {REPOSITORY} again")
    head = {"use_proj_in": False, "width": -1, "num_queries": 4, "num_attn_heads": 8, "out_dim": 1} | model.get(
        "reward_head", {}
    )
    found: dict[str, Any] = {
        "num_transformer_layers": 12, "use_lora": True, "visual_head_idx": [4, 8, 12], "text_head_idx": [4, 8, 12],
        "use_logistic": False, "use_t_embed": True, "use_text_features": True,
    } | model | {"reward_head": head}  # fmt: skip
    other = [
        key for key, usual in (("use_logistic", False), ("use_t_embed", True), ("use_text_features", True)) if found[key] != usual
    ]  # fmt: skip
    other += ["text_head_idx"] if found["text_head_idx"] != found["visual_head_idx"] else []
    other += ["visual_head_idx"] if min([int(i) for i in found["visual_head_idx"]]) < 1 else []
    other += ["out_dim"] if head["out_dim"] != 1 else []
    if other:
        value = json.dumps(head["out_dim"] if other[0] == "out_dim" else found[other[0]])
        raise InputError(f"{name}: {other[0]} = {value} is a variant that drm does not read", hint=f"use {REPOSITORY}")
    return found


def _json(file: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        values = None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: its {file.name} is damaged: {error}", hint=f"get {REPOSITORY} again") from None
    if not isinstance(values, dict):
        raise InputError(
            f"{name}: holds no {file.name} with settings", hint=f"get the files of https://huggingface.co/{REPOSITORY}"
        )
    return values


def preference(a: Tensor, b: Tensor, sigma: float) -> Tensor:
    """Its probability that a picture with score a is preferred to one with score b: Phi((a - b) / sqrt(2 (2 sigma^2 + 0.05)))."""
    return 0.5 * (1 + torch.erf((a - b) / math.sqrt(2 * (2 * sigma**2 + 0.05)) / math.sqrt(2)))
