"""The reward model of the paper: a diffusion transformer cut short, with a small head that scores noisy latents.

DRM (arXiv 2605.25661, section 3): image tokens f_v of the last kept block; f_p = MLP(f_v) to a lower width; tokens back on
their 2-D grid; s = MLP(Pool(Conv(f_p))). Trained at every noise level, it scores a latent at any step: R(x_t, t, c).

Dimension letters: B latents, C channels, H and W latent height and width, L = (H/p)(W/p) image tokens of patch size p, D
transformer width, F head width, T tapped blocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from huggingface_hub import ModelHubMixin, constants, snapshot_download
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from drmcli.config import local_or_hub, spoken
from drmcli.errors import InputError, RunError
from drmcli.fingerprints import reach
from drmcli.flow import add_noise
from drmcli.generator import Generator, PromptEmbeds, load_part, quiet_libraries, use_attention
from drmcli.hub import explained
from drmcli.run import seed_of

LORA_TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
FORMAT = 1


@dataclass
class RewardConfig:
    """Everything that rebuilds a reward model around its weights."""

    base_model: str
    """Pipeline that the backbone was cut from; its VAE and text encoders make the inputs."""
    transformer: dict[str, Any]
    """Config of the base's whole transformer, as diffusers writes it."""
    base_revision: str | None = None
    """Revision of the base on the hub."""
    max_sequence_length: int = 256
    """Tokens of the T5 part of a prompt in training."""
    text_encoder_3: bool = True
    """Was T5 there in training?"""
    resolution: int | None = None
    """Side of the training images, pixels; None is the base's own."""
    drop_layers: int = 3
    """Blocks cut off at the end."""
    tap_layers: list[int] | None = None
    """Blocks whose image tokens the head reads; None is the last kept one."""
    head_width: int = 512
    """Width of the head."""
    head_pool: str = "mean"
    """Pooling over the grid: mean or attention."""
    backbone: str = "full"
    """full: the backbone's weights are saved here; lora, frozen: they are the base's."""
    lora_rank: int = 64
    lora_alpha: int = 128
    lora_targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))
    format: int = FORMAT
    """Version of this layout."""


class Head(nn.Module):
    """s = MLP(Pool(Conv(Reshape(MLP(f_v))))), times a learnable scale. Always float32.

    An unscaled Bradley-Terry head can sit near chance for long, hence the scale.
    """

    def __init__(self, width: int, taps: int, head_width: int, pool: str):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(taps))
        self.reduce = nn.Sequential(nn.Linear(width * taps, head_width), nn.GELU(), nn.Linear(head_width, head_width))
        self.conv = nn.Conv2d(head_width, head_width, 3, padding=1)
        self.attend = nn.Conv2d(head_width, 1, 1) if pool == "attention" else None
        self.score = nn.Sequential(nn.Linear(head_width, head_width), nn.GELU(), nn.Linear(head_width, 1))
        self.log_scale = nn.Parameter(torch.zeros(1))  # not of shape []: sharded training has no place for a scalar

    def forward(self, tokens: list[Tensor], height: int, width: int) -> Tensor:
        """T tensors [B, L, D] of a height x width grid, row-major -> scores [B]."""
        x = torch.cat([norm(t.float()) for norm, t in zip(self.norms, tokens)], dim=-1)
        x = self.reduce(x).transpose(1, 2).unflatten(2, (height, width))  # [B, F, H/p, W/p]
        x = F.gelu(self.conv(x))
        if self.attend is None:
            pooled = x.mean((2, 3))
        else:
            pooled = (x * self.attend(x).flatten(2).softmax(-1).unflatten(2, (height, width))).sum((2, 3))
        return self.score(pooled).squeeze(-1) * self.log_scale.exp()


class RewardModel(nn.Module, ModelHubMixin, library_name="drmcli", tags=["reward-model"]):  # type: ignore[call-arg]
    """A truncated SD3 transformer and its head. `score` takes latents, `score_images` pictures.

    Make one with `from_generator`, load one with `from_pretrained(folder or hub id)`, save with `save_pretrained`.
    """

    def __init__(self, config: RewardConfig, transformer: SD3Transformer2DModel):
        super().__init__()
        self.config = config
        blocks = len(transformer.transformer_blocks)
        depth = int(config.transformer["num_layers"])
        keep = depth - config.drop_layers
        if not 1 <= keep <= blocks:
            raise InputError(
                f"--set drop_layers: {config.drop_layers} of {depth} blocks leave nothing", hint=f"use 0 to {depth - 1}"
            )
        taps = [keep - 1] if config.tap_layers is None else list(config.tap_layers)
        if not taps or any(not 0 <= t < keep for t in taps):
            raise InputError(f"--set tap_layers: {taps} for {keep} kept blocks", hint=f"count from 0 to {keep - 1}")
        self.taps = taps
        self.transformer = transformer
        transformer.transformer_blocks = transformer.transformer_blocks[: max(taps) + 1]
        transformer.norm_out, transformer.proj_out = nn.Identity(), nn.Identity()
        self.head = Head(transformer.inner_dim, len(taps), config.head_width, config.head_pool)
        self.gradient_checkpointing = False
        self._generator: Generator | None = None

    # --- making and loading -------------------------------------------------------------------------------------------

    @classmethod
    def from_generator(
        cls,
        ref: str,
        *,
        revision: str | None = None,
        init: str = "pretrained",
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        flag: str = "--generator",
        **settings: Any,
    ) -> RewardModel:
        """A new reward model on the transformer of a pipeline. `settings` are fields of RewardConfig.

        init "random" keeps the architecture and forgets the weights. The head is always new, drawn from `seed`.
        """
        where = local_or_hub(ref, flag)
        with explained(ref, flag), quiet_libraries():
            reach(where, revision)
            full = dict(SD3Transformer2DModel.load_config(where, subfolder="transformer", revision=revision))
            torch.manual_seed(seed_of("reward", seed))
            if init == "random":
                transformer = SD3Transformer2DModel.from_config(full).to(dtype)
            else:
                transformer = load_part(SD3Transformer2DModel, where, "transformer", revision=revision, dtype=dtype)
        config = RewardConfig(
            base_model=ref,
            base_revision=revision,
            transformer={k: v for k, v in full.items() if not k.startswith("_")},
            **settings,
        )
        torch.manual_seed(seed_of("head", seed))
        model = cls(config, transformer)
        model.set_trainable()
        return model.to(device)

    def set_trainable(self) -> None:
        """Which weights learn: all, the LoRA, or the head alone. Weights that cannot reach the score never do."""
        if self.config.backbone == "lora":
            from peft import LoraConfig

            self.transformer.requires_grad_(False)
            if not getattr(self.transformer, "_hf_peft_config_loaded", False):
                lora = LoraConfig(
                    r=self.config.lora_rank,
                    lora_alpha=self.config.lora_alpha,
                    init_lora_weights="gaussian",
                    target_modules=list(self.config.lora_targets),
                )
                self.transformer.add_adapter(lora)
        else:
            self.transformer.requires_grad_(self.config.backbone == "full")
        # The text stream's own output of the last block is read by nobody.
        last = self.transformer.transformer_blocks[-1]
        for name, parameter in last.named_parameters():
            if name.startswith(("ff_context", "attn.to_add_out")):
                parameter.requires_grad_(False)
        self.head.requires_grad_(True)

    def saved_tensors(self) -> dict[str, Tensor]:
        """What is saved: with a full backbone everything, else what was trained."""
        if self.config.backbone == "full":
            return dict(self.state_dict())
        trained = {
            name for name, parameter in self.named_parameters() if parameter.requires_grad or name.startswith("head.")
        }
        trained |= {name for name, _ in self.named_parameters() if ".lora_" in name}
        return {name: tensor for name, tensor in self.state_dict().items() if name in trained}

    def _save_pretrained(self, save_directory: Path) -> None:
        folder = Path(save_directory)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in self.saved_tensors().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
        from huggingface_hub import ModelCard

        c = self.config
        kept = max(self.taps) + 1
        text = f"""---
library_name: drmcli
tags: [reward-model, text-to-image, diffusion]
base_model: {c.base_model if "{" not in c.base_model else "embedded"}
---

# A diffusion-based reward model

Scores how well a picture, or a noisy latent at any step, serves a prompt. Higher is better; only differences for one prompt
mean something.

- base: {spoken(c.base_model)}, revision {c.base_revision or "main"}; {kept} of {c.transformer["num_layers"]} transformer blocks
- trained: {c.backbone} backbone; image tokens of block {", ".join(map(str, self.taps))}; head width {c.head_width}, {c.head_pool} pooling
- training resolution: {c.resolution or "the base's own"}; T5: {"yes" if c.text_encoder_3 else "no"}

```python
from drmcli import RewardModel
model = RewardModel.from_pretrained("FOLDER")
model.score_images([image], ["a prompt"], sigmas=[0.25])
```

Method: DRM, arXiv 2605.25661. The licence of the base model applies to what was trained from it.
"""
        return ModelCard(text)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
        flag: str = "--reward",
    ) -> RewardModel:
        """Load a saved reward model from a folder or the hub, frozen and ready to score.

        Raises MissingError (absent, gated, offline) or InputError (damaged, of another kind), each naming `flag`.
        """
        model_id = str(pretrained_model_name_or_path)
        where = Path(local_or_hub(model_id, flag))
        with explained(model_id, flag), quiet_libraries():
            if not where.is_dir():
                where = Path(
                    snapshot_download(
                        model_id,
                        revision=revision,
                        cache_dir=cache_dir,
                        local_files_only=local_files_only,
                        token=token,
                        allow_patterns=["config.json", "model.safetensors", "README.md"],
                    )
                )
            config = read_config(where, f"{flag} {model_id}")
            weights = where / constants.SAFETENSORS_SINGLE_FILE
            if not weights.is_file():
                raise InputError(
                    f"{flag} {model_id}: holds no model.safetensors", hint="drm reads weights from safetensors only"
                )
            tensors = load_file(weights)
            if config.backbone == "full":
                transformer = SD3Transformer2DModel.from_config(config.transformer)
            else:
                base = local_or_hub(config.base_model, f"{flag} {model_id}: base_model")
                transformer = load_part(
                    SD3Transformer2DModel, base, "transformer", revision=config.base_revision, dtype=torch.float32
                )
            model = cls(config, transformer)
            model.set_trainable()
        model.load_tensors(tensors, f"{flag} {model_id}")
        use_attention(model.transformer, attention)
        if dtype != torch.float32:
            model.transformer.to(dtype)
        return model.eval().requires_grad_(False).to(device)

    def load_tensors(self, tensors: dict[str, Tensor], where: str) -> None:
        """Load what `saved_tensors` gave. Raises InputError for missing, surplus, misshapen or non-finite ones."""
        mine = self.saved_tensors()
        # Files written before the scale had an axis.
        tensors = {name: t.reshape(1) if name == "head.log_scale" and t.ndim == 0 else t for name, t in tensors.items()}
        problem = None
        if missing := sorted(mine.keys() - tensors.keys()):
            problem = f"lacks the tensor {missing[0]}"
        elif surplus := sorted(tensors.keys() - mine.keys()):
            problem = f"has a tensor {surplus[0]} that its config.json does not explain"
        else:
            for name, tensor in tensors.items():
                if tensor.shape != mine[name].shape:
                    problem = f"{name} has shape {list(tensor.shape)}, not {list(mine[name].shape)}"
                elif not bool(torch.isfinite(tensor).all()):
                    problem = f"the weights of {name} are not finite"
                if problem:
                    break
        if problem:
            raise InputError(
                f"{where}: {problem}",
                hint="its config.json and weights do not belong together; train or download it again",
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                mine[name].copy_(tensor)

    # --- scoring ------------------------------------------------------------------------------------------------------

    def features(
        self, latents: Tensor, sigma: Tensor, cond: PromptEmbeds, *, states: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Image tokens [B, L, D] of each tapped block for latents [B, C, H, W] at noise levels sigma [B].

        states: filled with what the next block of the whole transformer would take: image tokens, context, time embedding.
        """
        t = self.transformer
        dtype = t.pos_embed.proj.weight.dtype
        hidden = t.pos_embed(latents.to(dtype)).contiguous()  # [B, L, D]
        temb = t.time_text_embed(1000.0 * sigma, cond.pooled_prompt_embeds.to(dtype))
        context = t.context_embedder(cond.prompt_embeds.to(dtype))
        out = []
        for i, block in enumerate(t.transformer_blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                context, hidden = checkpoint(block, hidden, context, temb, use_reentrant=False)
            else:
                context, hidden = block(hidden_states=hidden, encoder_hidden_states=context, temb=temb)
            if i in self.taps:
                out.append(hidden)
        if states is not None:
            states += [hidden, context, temb]
        return out

    def score(
        self, latents: Tensor, sigma: float | Tensor, cond: PromptEmbeds, *, states: list[Tensor] | None = None
    ) -> Tensor:
        """R(x_sigma, c): scores [B], float32, differentiable. latents [B, C, H, W] at noise level sigma (one, or [B]).

        states: see `features`.
        """
        channels = int(self.config.transformer["in_channels"])
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise InputError(
                f"latents of shape {list(latents.shape)}: this reward model was trained on {channels} channels",
                hint="use a reward model whose base is the generator's",
            )
        p = int(self.config.transformer["patch_size"])
        if latents.shape[2] % p or latents.shape[3] % p:
            raise InputError(
                f"latents of {latents.shape[2]} x {latents.shape[3]}: not a multiple of the patch size {p}",
                hint="choose another height and width",
            )
        sigma = torch.as_tensor(sigma, device=latents.device, dtype=torch.float32).expand(len(latents))
        tokens = self.features(latents, sigma, cond, states=states)
        device_type = latents.device.type
        with torch.autocast(device_type, enabled=False):
            return self.head(tokens, latents.shape[2] // p, latents.shape[3] // p)

    forward = score

    def generator(self, *, device: torch.device | str | None = None, beside: Generator | None = None) -> Generator:
        """The base pipeline's VAE and text encoders as in training, loaded once. beside: see `Generator.load`."""
        if self._generator is None:
            c = self.config
            self._generator = Generator.load(
                c.base_model,
                revision=c.base_revision,
                device=device or next(self.parameters()).device,
                dtype=next(self.transformer.parameters()).dtype,
                components=("text", "vae"),
                text_encoder_3=c.text_encoder_3,
                max_sequence_length=c.max_sequence_length,
                beside=beside,
                flag="base_model",
            )
        return self._generator

    def use_encoders(self, generator: Generator) -> None:
        """Take a generator's VAE and text encoders for one's own. Rather call `encoders.share`, which compares them first."""
        self._generator = generator

    @torch.no_grad()
    def score_images(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        *,
        sigmas: Sequence[float] = (0.25,),
        noise_samples: int = 4,
        seed: int = 0,
        batch_size: int = 32,
    ) -> Tensor:
        """Scores [B, len(sigmas)] of B pictures for B prompts. Each picture and each prompt is encoded once.

        noise_samples: draws averaged at each noise level above 0 (DiNa-LRM calls it a noise ensemble).
        """
        if len(images) != len(prompts):
            raise InputError(f"{len(images)} images and {len(prompts)} prompts", hint="give a prompt an image")
        generator = self.generator()
        unique = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        names = list(unique)
        parts = [generator.encode_prompts(names[i : i + batch_size]) for i in range(0, len(names), batch_size)]
        embeds = PromptEmbeds(
            torch.cat([p.prompt_embeds for p in parts]), torch.cat([p.pooled_prompt_embeds for p in parts])
        )
        out = []
        for i in range(0, len(images), batch_size):
            some = list(prompts[i : i + batch_size])
            latents = generator.encode_images(images[i : i + batch_size], self.config.resolution)
            cond = embeds[torch.tensor([unique[p] for p in some], device=latents.device)]
            keys = [hashlib.sha256(image.convert("RGB").tobytes()).hexdigest() for image in images[i : i + batch_size]]
            out.append(score_clean(self, latents, cond, keys, sigmas, noise_samples=noise_samples, seed=seed))
        return torch.cat(out)


@torch.no_grad()
def score_clean(
    model: Callable[[Tensor, float, PromptEmbeds], Tensor],
    latents: Tensor,
    cond: PromptEmbeds,
    keys: Sequence[str],
    sigmas: Sequence[float],
    *,
    noise_samples: int,
    seed: int,
) -> Tensor:
    """Scores [B, len(sigmas)] of clean latents, noised and averaged over the draws. See `keyed_noise` for the B keys.

    Raises RunError for a score that is not finite.
    """
    scores = torch.zeros(len(latents), len(sigmas), device=latents.device)
    for draw in range(noise_samples if any(s > 0 for s in sigmas) else 1):
        noise = keyed_noise(keys, latents.shape[1:], seed=seed, draw=draw).to(latents.device)
        for j, sigma in enumerate(sigmas):
            if sigma > 0:
                scores[:, j] += model(add_noise(latents, noise, sigma), sigma, cond) / noise_samples
            elif draw == 0:
                scores[:, j] = model(latents, 0.0, cond)
    if not bool(torch.isfinite(scores).all()):
        raise RunError("scoring: a score is not finite", hint="check the reward model's weights, or use --dtype fp32")
    return scores


def keyed_noise(keys: Sequence[str], shape: Sequence[int], *, seed: int, draw: int) -> Tensor:
    """Gaussian noise [B, *shape] that depends on each key, the seed and the draw, and so never on the batch.

    A picture's key names its content: two pictures of a prompt have noise of their own, as a sampler's candidates have.
    """
    unique: dict[str, Tensor] = {}
    for key in keys:
        if key not in unique:
            rng = torch.Generator().manual_seed(seed_of("noise", seed, draw, key))
            unique[key] = torch.randn(tuple(shape), generator=rng)
    return torch.stack([unique[key] for key in keys])


def read_config(folder: Path, where: str) -> RewardConfig:
    """config.json of a saved reward model. Raises InputError when it is missing, damaged or of another kind."""
    try:
        values = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise InputError(
            f"{where}: holds no config.json", hint="give the `reward` folder of a train-reward run"
        ) from None
    except ValueError as error:
        raise InputError(f"{where}: config.json is damaged: {error}", hint="train or download it again") from None
    known = {f.name for f in fields(RewardConfig)}
    if not isinstance(values, dict) or not {"base_model", "transformer"} <= values.keys() or not values.keys() <= known:
        raise InputError(
            f"{where}: config.json is not a reward model's", hint="give the `reward` folder of a train-reward run"
        )
    if values.get("format", FORMAT) > FORMAT:
        raise InputError(
            f"{where}: written by a newer drm (format {values['format']})", hint="pip install --upgrade drmcli"
        )
    return RewardConfig(**values)
