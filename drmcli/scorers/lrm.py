"""LRM (arXiv 2502.01051, Kwai's LPO): public reward models on Stable Diffusion 1.5 and XL U-Nets that score noisy latents.

The way down and the middle of a fine-tuned U-Net see a latent twice, once with the prompt and once with the empty one. Averages over the
picture of each stage on the way down (with the prompt) and of the middle (guided by 7.5) are projected and compared with a text
feature: the score is a scaled cosine, within +-exp(logit_scale).

Read from its published layout: `unet/`, `text_encoder/`, for SDXL `text_encoder_2/`, and `state_dict.pt` with the projections (by PyTorch's
weights-only reader). Tokenizers and VAE are the base's. A state is scored at its own sigma; LPO's own training asks with the time
of the step that made it. Pictures are encoded as the mode of the VAE's posterior, not a draw from it.

Dimension letters: B latents, D width of the prompt's embeddings, P width of the common space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from drmcli.config import local_or_hub
from drmcli.errors import InputError
from drmcli.families.base import Conditioning, Family
from drmcli.families.sdxl import FAMILY, UNet
from drmcli.fingerprints import of_folder
from drmcli.fitting import Room
from drmcli.generator import Generator
from drmcli.hub import explained
from drmcli.kernels import PLAIN, Kernels
from drmcli.parts import denoiser_config, load_part, quiet_libraries, read_index, with_denoiser
from drmcli.reward import RewardConfig, RewardModel
from drmcli.scorers.weights import Source

REPOSITORY = "casiatao/LRM"
FOLDERS = {"lrm-sd15": "lrm_sd15", "lrm-sdxl": "lrm_sdxl"}
"""Of each in the repository."""
BASES = {
    "lrm-sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", None),
    "lrm-sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", "madebyollin/sdxl-vae-fp16-fix"),
}
"""Pipeline that tokenizers, sigmas and VAE are of, and another VAE where the base's own overflows in fp16."""
GUIDANCE = 7.5
PROJECTIONS = "state_dict.pt"


def is_published_layout(folder: str | Path) -> bool:
    """Does a folder hold an LRM's files?"""
    return (Path(folder) / PROJECTIONS).is_file() and (Path(folder) / "unet").is_dir()


def files(source: Source) -> Path:
    """The folder with the files of `lrm-sd15` or `lrm-sdxl`. Raises MissingError."""
    inner = FOLDERS[source.name]
    parts = ("unet/*", "text_encoder/*", "text_encoder_2/*", PROJECTIONS)
    folder = source.whole(REPOSITORY, [f"{inner}/{part}" for part in parts], PROJECTIONS)
    return folder if source.folder else folder / inner


class Texts(Generator):
    """VAE of the base and the reward model's own text encoders: prompts come with the empty prompt beside them."""

    def __init__(
        self, family: Family, folder: Path, vae: Any, image_processor: Any, tokenizers: list[Any], encoders: list[Any], project: Any,
    ):  # fmt: skip
        self.family, self.folder, self.ref, self.revision = family, folder, str(folder), None
        self.max_sequence_length = tokenizers[0].model_max_length
        self.vae, self.image_processor, self.tokenizers, self.encoders, self.project = (
            vae, image_processor, tokenizers, encoders, project,
        )  # fmt: skip
        self.pipe = _Parts(vae, image_processor)
        self.vae_tiling, self._room = "auto", Room()

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def preprocess(self, images: Sequence[Any], resolution: int | None = None) -> Tensor:
        side = resolution or self.image_size
        return self.image_processor.preprocess(list(images), side, side, resize_mode="crop")

    @property
    def image_size(self) -> int:
        return 1024 if len(self.encoders) == 2 else 512

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """`prompt_embeds`, `empty_embeds` [B, 77, D], `text` [B, P]; of SDXL the pooled ones of both too."""
        embeds, pooled = self._encode(list(prompts))
        empty, blank = (t.expand(len(prompts), *t.shape[1:]) for t in self._encode([""]))
        if len(self.encoders) == 2:
            return Conditioning(
                prompt_embeds=embeds, empty_embeds=empty, text=pooled, pooled_prompt_embeds=pooled, empty_pooled=blank
            )
        return Conditioning(prompt_embeds=embeds, empty_embeds=empty, text=self.project(pooled.float()))

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        hidden, pooled = [], torch.empty(0)
        for tokenizer, encoder in zip(self.tokenizers, self.encoders):
            ids = tokenizer(
                prompts,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(encoder.device)
            found = encoder(ids, output_hidden_states=True)
            hidden.append(found.hidden_states[-2] if len(self.encoders) == 2 else found.last_hidden_state)
            pooled = found.text_embeds if hasattr(found, "text_embeds") else found.pooler_output
        return torch.cat(hidden, -1), pooled

    def truncated(self, prompt: str) -> bool:
        return len(self.tokenizers[0](prompt, truncation=False).input_ids) > self.max_sequence_length

    def prints(self, names: Sequence[str] | None = None) -> dict[str, str]:
        """A short hash of each text encoder's files, and of the VAE's config: its weights are public ones."""
        parts = ["text_encoder", "text_encoder_2"][: len(self.encoders)]
        return {name: of_folder(self.folder / name) for name in parts} | {"vae": repr(sorted(self.vae.config.items()))}

    def fingerprint(self, parts: Sequence[str]) -> str:
        """A short hash of what the named parts ("vae", "text") compute."""
        kept = {k: v for k, v in self.prints().items() if k.partition("_")[0] in parts}
        return hashlib.sha256(repr((sorted(kept.items()), str(self.vae.dtype))).encode()).hexdigest()[:16]

    def free(self) -> None:
        """Its encoders are the reward model's own, which keeps them."""


class _Parts:
    """What a pipeline would hold."""

    def __init__(self, vae: Any, image_processor: Any):
        self.vae, self.image_processor = vae, image_processor
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.components = {"vae": vae}


class LRM(RewardModel):
    """An LRM as a reward model of drm: it scores wherever one does. It is read, not saved nor trained here."""

    own_encoders = True
    picture_sigma = 0.1

    def __init__(self, config: RewardConfig, unet: Any, projections: dict[str, Tensor]):
        super().__init__(config, unet)
        self.head = nn.Identity()  # type: ignore[assignment]
        weight = projections["visual_projection.weight"].float()
        self.visual_projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.visual_projection.weight.data = weight
        self.logit_scale: Tensor
        self.register_buffer("logit_scale", projections["logit_scale"].float())

    def score(
        self, latents: Tensor, sigma: float | Tensor, cond: Conditioning, *, states: list[Any] | None = None
    ) -> Tensor:
        """Scores [B], float32, differentiable, of latents [B, C, H, W] at sigma (one, or [B])."""
        family = self.family
        assert isinstance(family, UNet)
        sigma = torch.as_tensor(sigma, device=latents.device, dtype=torch.float32).expand(len(latents))
        both = {"prompt_embeds": torch.cat([cond.prompt_embeds, cond.empty_embeds])}
        if "pooled_prompt_embeds" in cond.tensors:
            both["pooled_prompt_embeds"] = torch.cat([cond.pooled_prompt_embeds, cond.empty_pooled])
        inputs = family.inputs(
            self.transformer, torch.cat([latents, latents]), sigma.repeat(2), Conditioning(both), None
        )
        inputs["timestep"] = inputs["timestep"].round()
        if "added_cond_kwargs" in inputs:  # it was trained at one size, and is told that one
            ids = torch.tensor([1024, 1024, 0, 0, 1024, 1024], device=latents.device).to(inputs["sample"].dtype)
            inputs["added_cond_kwargs"]["time_ids"] = ids.expand(2 * len(latents), 6)
        stages, heard = self._stages(), {}

        def hear(number: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                heard[number] = (output[0] if isinstance(output, tuple) else output).float().mean((2, 3))

            return hook

        handles = [stage.register_forward_hook(hear(i)) for i, stage in enumerate(stages)]
        try:
            self.transformer(**inputs, return_dict=False)
        finally:
            for handle in handles:
                handle.remove()
        count = len(latents)
        down = [heard[i][:count] for i in range(len(stages) - 1)]
        with_prompt, without = heard[len(stages) - 1].chunk(2)
        middle = without + GUIDANCE * (with_prompt - without)
        seen = self.visual_projection(torch.cat([*down, middle], -1))
        cosine = F.cosine_similarity(seen, cond.text.float(), dim=-1, eps=1e-12)
        return self.logit_scale.exp() * cosine

    forward = score

    def _stages(self) -> list[nn.Module]:
        """What gives each stage's last picture before it is made smaller, and the middle block."""
        last = []
        for block in self.transformer.down_blocks:
            attentions = getattr(block, "attentions", None)
            last.append(attentions[-1] if attentions else block.resnets[-1])
        return [*last, self.transformer.mid_block]

    def load_texts(
        self, folder: Path, base: str, own_vae: str | None, large: bool, projections: dict[str, Tensor], where: str,
        dtype: torch.dtype, device: torch.device | str,
    ) -> None:  # fmt: skip
        """Its own text encoders, beside the base's tokenizers and VAE."""
        from diffusers.image_processor import VaeImageProcessor

        place = local_or_hub(base, f"{where}: its base")
        read_index(place, None)
        names = ["tokenizer", "tokenizer_2"] if large else ["tokenizer"]
        tokenizers = [AutoTokenizer.from_pretrained(place, subfolder=name) for name in names]
        kinds: list[Any] = [CLIPTextModel, CLIPTextModelWithProjection]
        encoders = [
            load_part(kind, str(folder), name, revision=None, dtype=dtype, device=device).eval().requires_grad_(False)
            for kind, name in zip(kinds, ["text_encoder", "text_encoder_2"][: len(names)])
        ]
        vae = (
            load_part(AutoencoderKL, place, "vae", revision=None, dtype=dtype)
            if own_vae is None or Path(place).is_dir()
            else AutoencoderKL.from_pretrained(
                local_or_hub(own_vae, f"{where}: its VAE"), torch_dtype=dtype, use_safetensors=True
            )
        )
        vae = vae.to(device).eval().requires_grad_(False)
        project: Any = nn.Identity()
        if not large:
            if "text_projection.weight" not in projections:
                raise InputError(f"{where}: {PROJECTIONS} lacks text_projection.weight", hint=f"get {REPOSITORY} again")
            weight = projections["text_projection.weight"].float()
            project = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            project.weight.data = weight
            project.to(device).requires_grad_(False)
        processor = VaeImageProcessor(vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1))
        self._generator = Texts(self.family, folder, vae, processor, tokenizers, encoders, project)


def load(
    folder: Path,
    ref: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    kernels: Kernels = PLAIN,
    beside: Generator | None = None,
    flag: str = "--reward",
) -> LRM:
    """From a folder in the published layout, frozen and ready to score; ref: as it was asked for.

    beside: is not used, since its U-Net is its own.

    Raises MissingError (its base is absent, offline) or InputError (damaged), each naming `flag`.
    """
    where = f"{flag} {ref}"
    with explained(ref, flag), quiet_libraries():
        full = denoiser_config(FAMILY, str(folder), None)
        large = full.get("addition_embed_type") == "text_time"
        base, own_vae = BASES["lrm-sdxl" if large else "lrm-sd15"]
        config = RewardConfig(
            base_model=base, transformer={k: v for k, v in full.items() if not k.startswith("_")},
            family=FAMILY.name, drop_layers=0, backbone="frozen",
        )  # fmt: skip
        projections = read_projections(folder / PROJECTIONS, where)
        model = with_denoiser(
            lambda unet: LRM(config, unet, projections), FAMILY, str(folder), revision=None, dtype=dtype, device=device,
            kernels=kernels,
        )  # fmt: skip
        model.load_texts(folder, base, own_vae, large, projections, where, dtype, device)
    return model.ready(kernels, device)


def read_projections(file: Path, where: str) -> dict[str, Tensor]:
    """`visual_projection.weight`, `logit_scale` and, of SD 1.5, `text_projection.weight`. Raises InputError for anything else."""
    if not file.is_file():
        raise InputError(
            f"{where}: holds no {PROJECTIONS}", hint=f"get the files of https://huggingface.co/{REPOSITORY}"
        )
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (torch.serialization.pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise InputError(
            f"{where}: {PROJECTIONS} is damaged, or holds more than tensors", hint=f"get {REPOSITORY} again"
        ) from error
    flat: dict[str, Tensor] = {}
    for name, value in (found if isinstance(found, dict) else {}).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": tensor for key, tensor in value.items()}
        else:
            flat[name] = torch.as_tensor(value)
    for name in ("visual_projection.weight", "logit_scale"):
        if name not in flat:
            raise InputError(f"{where}: {PROJECTIONS} lacks {name}", hint=f"get {REPOSITORY} again")
    if broken := [k for k, v in flat.items() if not v.float().isfinite().all()]:
        raise InputError(f"{where}: the weights of {broken[0]} are not finite", hint=f"get {REPOSITORY} again")
    return flat
