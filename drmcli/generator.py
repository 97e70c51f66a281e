"""A text-to-image pipeline in Hugging Face layout: prompts and images in, latents, velocities and pictures out.

Any folder or hub id of a StableDiffusion3Pipeline works the same way. Only the parts that are asked for are loaded.

Dimension letters: B images or prompts, C latent channels, H and W latent height and width, L prompt tokens, D and P widths
of token and pooled prompt embeddings.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import logging
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor

from drmcli.config import local_or_hub
from drmcli.errors import InputError, MissingError
from drmcli.fingerprints import of_parts, reach
from drmcli.hub import explained, quiet_hub

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODELS = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae", "transformer")
TEXT = ("tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass
class PromptEmbeds:
    """Text conditioning of SD3: `prompt_embeds` [B, L, D] and `pooled_prompt_embeds` [B, P]."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, index: Any) -> PromptEmbeds:
        return PromptEmbeds(self.prompt_embeds[index], self.pooled_prompt_embeds[index])

    def to(self, *args: Any, **kwargs: Any) -> PromptEmbeds:
        return PromptEmbeds(self.prompt_embeds.to(*args, **kwargs), self.pooled_prompt_embeds.to(*args, **kwargs))


def pick_device(name: str) -> torch.device:
    """`auto`, `cuda`, `cuda:1` or `cpu` as a device. Raises InputError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: no such device", hint="use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise InputError(f"--device {name}: no such device", hint="use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs",
            hint="`drm doctor` shows the devices",
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on CUDA and fp32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def load_part(kind: type, where: str, name: str, *, revision: str | None, dtype: torch.dtype) -> Any:
    """One model of a pipeline, from safetensors. Raises InputError when weights are missing or not finite.

    The libraries fill in random values for what is missing; a score from those would mean nothing.
    """
    model, found = kind.from_pretrained(  # type: ignore[attr-defined]
        where, subfolder=name, revision=revision, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"{where}: {name} lacks the weights of {missing[0]}", hint="download or build the model again")
    _refuse_broken(model, f"{where}: {name}")
    return model


def use_attention(transformer: SD3Transformer2DModel, name: str) -> None:
    """Attention kernels of a transformer: sdpa is PyTorch's own; for xformers MissingError where it or CUDA is not there."""
    if name != "xformers":
        return
    if not torch.cuda.is_available():
        raise MissingError("--attention xformers: needs a CUDA GPU", hint="leave it out, or use --attention sdpa")
    try:
        transformer.enable_xformers_memory_efficient_attention()
    except (ModuleNotFoundError, ImportError) as error:
        raise MissingError("--attention xformers: not installed", hint="pip install 'drmcli[xformers]'") from error


class Generator:
    """A loaded pipeline and the few things that drm does with it.

    `components`: any of "text", "vae", "transformer"; what is not asked for stays on disk. A transformer that is not asked
    for is there on the meta device, since SD3's prompt encoding reads its config.
    """

    def __init__(self, pipe: StableDiffusion3Pipeline, ref: str, *, revision: str | None, max_sequence_length: int):
        self.pipe = pipe
        self.ref = ref
        self.revision = revision
        self.max_sequence_length = max_sequence_length

    @classmethod
    def load(
        cls,
        ref: str,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        components: Sequence[str] = ("text", "vae", "transformer"),
        text_encoder_3: bool = True,
        max_sequence_length: int = 256,
        attention: str = "sdpa",
        beside: Generator | None = None,
        flag: str = "--generator",
    ) -> Generator:
        """Load a pipeline from a folder or the hub. Only safetensors are read.

        beside: a loaded generator, whose VAE and text encoders are used where they are the same, not loaded a second time.

        Raises MissingError (gated, absent, offline) or InputError (damaged, of another kind), each naming `flag`.
        """
        where = local_or_hub(ref, flag)
        with explained(ref, flag), quiet_libraries():
            reach(where, revision)
            index = StableDiffusion3Pipeline.load_config(where, revision=revision)
            kind = index.get("_class_name")
            if kind != "StableDiffusion3Pipeline":
                raise InputError(f"{flag} {ref}: holds a {kind}", hint="drm works with the StableDiffusion3 family")
            known = inspect.signature(StableDiffusion3Pipeline.__init__).parameters
            absent = {
                name: None for name, value in index.items() if name in known and value in ([None, None], (None, None))
            }
            if not text_encoder_3:
                absent |= {"text_encoder_3": None, "tokenizer_3": None}
            if "text" not in components:
                absent |= dict.fromkeys(TEXT)
            if "vae" not in components:
                absent |= {"vae": None}
            if "transformer" not in components:
                config = SD3Transformer2DModel.load_config(where, subfolder="transformer", revision=revision)
                with torch.device("meta"):
                    absent["transformer"] = SD3Transformer2DModel.from_config(config)
            wanted = {n: v for n, v in index.items() if n in MODELS and n not in absent}
            parts = (
                {} if beside is None else beside.same_encoders(ref, revision, [n for n in wanted if n != "transformer"])
            )
            parts |= {
                name: load_part(getattr(import_module(library), kind), where, name, revision=revision, dtype=dtype)
                for name, (library, kind) in wanted.items()
                if name not in parts
            }
            pipe = StableDiffusion3Pipeline.from_pretrained(
                where, revision=revision, dtype=dtype, use_safetensors=True, **absent, **parts
            )
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
                if not part.__class__.__name__.startswith("SD3") or "transformer" in components:
                    part.to(device)
        pipe.set_progress_bar_config(disable=True)
        generator = cls(pipe, ref, revision=revision, max_sequence_length=max_sequence_length)
        if "transformer" in components:
            use_attention(pipe.transformer, attention)
        return generator

    @property
    def transformer(self) -> SD3Transformer2DModel:
        return self.pipe.transformer

    @property
    def device(self) -> torch.device:
        parts = [p for p in self.pipe.components.values() if isinstance(p, torch.nn.Module)]
        devices = [next(p.parameters()).device for p in parts]
        return next((d for d in devices if d.type != "meta"), torch.device("cpu"))

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures that the transformer was made for."""
        return self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        """All of the pipeline's text conditioning for B prompts."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts),
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        return PromptEmbeds(embeds, pooled)

    def truncated(self, prompt: str) -> bool:
        """Does a prompt hold more tokens than every one of the text encoders reads?"""
        rooms = [(t, t.model_max_length) for t in (self.pipe.tokenizer, self.pipe.tokenizer_2) if t is not None]
        if self.pipe.tokenizer_3 is not None:
            rooms.append((self.pipe.tokenizer_3, self.max_sequence_length))
        return all(len(tokenizer(prompt, truncation=False).input_ids) > room for tokenizer, room in rooms)

    def preprocess(self, images: Sequence[Image.Image], resolution: int | None = None) -> Tensor:
        """RGB pictures, centre-cropped and resized to a square of `resolution` pixels: float32 [B, 3, S, S] in [-1, 1]."""
        side = resolution or self.image_size
        unit = self.pipe.vae_scale_factor * self.pipe.patch_size
        if side % unit:
            raise InputError(
                f"--resolution {side}: not a multiple of {unit}", hint=f"use {max(1, round(side / unit)) * unit}"
            )
        return self.pipe.image_processor.preprocess(list(images), side, side, resize_mode="crop")

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image], resolution: int | None = None) -> Tensor:
        """Latents [B, C, H, W] as the transformer sees them: posterior modes, shifted and scaled, float32."""
        vae = self.pipe.vae
        pixels = self.preprocess(images, resolution).to(self.device, vae.dtype)
        latents = vae.encode(pixels).latent_dist.mode().float()
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

    def sigmas(self, num_inference_steps: int) -> Tensor:
        """Noise levels [n + 1] from 1 to 0 of the pipeline's own scheduler, float32 on the CPU."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        if scheduler.config.use_dynamic_shifting:
            raise InputError(
                f"--generator {self.ref}: its scheduler shifts with the resolution",
                hint="set use_dynamic_shifting to false",
            )
        scheduler.set_timesteps(num_inference_steps)
        return scheduler.sigmas.float()

    def velocity(
        self,
        latents: Tensor,
        sigma: float | Tensor,
        cond: PromptEmbeds,
        negative: PromptEmbeds | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """v [B, C, H, W], float32, of latents at noise level sigma (one, or [B]).

        With `negative` and a guidance_scale w other than 1: v_u + w (v_c - v_u), both in one batch.
        """
        dtype = self.transformer.pos_embed.proj.weight.dtype
        guided = negative is not None and guidance_scale != 1.0
        timestep = 1000.0 * torch.as_tensor(sigma, device=latents.device, dtype=torch.float32).expand(len(latents))
        x, embeds, pooled = latents.to(dtype), cond.prompt_embeds, cond.pooled_prompt_embeds
        if guided:
            assert negative is not None
            x, timestep = torch.cat([x, x]), torch.cat([timestep, timestep])
            embeds = torch.cat([negative.prompt_embeds.expand_as(embeds), embeds])
            pooled = torch.cat([negative.pooled_prompt_embeds.expand_as(pooled), pooled])
        v = self.transformer(x, embeds.to(dtype), pooled.to(dtype), timestep, return_dict=False)[0].float()
        if not guided:
            return v
        unconditional, conditional = v.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def velocity_from(self, states: Sequence[Tensor], block: int, height: int, width: int) -> Tensor:
        """v [B, C, H, W], float32, without guidance, from the states before a block: image tokens, context, time embedding.

        The rest of the transformer alone: what a frozen reward model on its first blocks has computed is not computed again.
        """
        t = self.transformer
        hidden, context, temb = states
        for layer in t.transformer_blocks[block:]:
            context, hidden = layer(hidden_states=hidden, encoder_hidden_states=context, temb=temb)
        tokens = t.proj_out(t.norm_out(hidden, temb))  # [B, h * w, p * p * C]
        p, channels = t.config.patch_size, t.out_channels
        grid = tokens.unflatten(1, (height // p, width // p)).unflatten(-1, (p, p, channels))  # [B, h, w, p, p, C]
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), channels, height, width).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of clean latents [B, C, H, W]."""
        vae = self.pipe.vae
        z = latents / vae.config.scaling_factor + vae.config.shift_factor
        return self.pipe.image_processor.postprocess(vae.decode(z.to(vae.dtype)).sample.float(), output_type="pil")

    def load_lora(self, folder: str, flag: str = "--lora") -> None:
        """Put a LoRA of the transformer on, saved as diffusers saves it. Raises InputError for one that changes nothing."""
        path = local_or_hub(folder, flag)
        with explained(folder, flag), quiet_libraries():
            self.pipe.load_lora_weights(path, use_safetensors=True)
        if not any("lora_" in name for name, _ in self.transformer.named_parameters()):
            raise InputError(
                f"{flag} {folder}: holds no weights for the transformer", hint="save it with save_lora_weights"
            )

    def same_encoders(self, ref: str, revision: str | None, names: Sequence[str]) -> dict[str, Any]:
        """Those of the named parts of another pipeline that are loaded here already."""
        mine, theirs = self.prints(names), of_parts(ref, revision, names)
        return {name: getattr(self.pipe, name) for name in names if name in mine and mine[name] == theirs.get(name)}

    def prints(self, names: Sequence[str] = (*TEXT, "vae")) -> dict[str, str]:
        """A short hash of what each of these parts computes, for those that are there. See `drmcli.fingerprints`."""
        return of_parts(self.ref, self.revision, [name for name in names if getattr(self.pipe, name, None) is not None])

    def fingerprint(self, parts: Sequence[str]) -> str:
        """A short hash of what the named parts ("vae", "text") compute, number format and prompt length included."""
        names = [*(("vae",) if "vae" in parts else ()), *(TEXT if "text" in parts else ())]
        module = getattr(self.pipe, "vae" if "vae" in parts else "text_encoder")
        facts = [*sorted(self.prints(names).items()), str(module.dtype)]
        if "text" in parts:
            facts.append(str(self.max_sequence_length))
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def free(self) -> None:
        """Let go of the weights."""
        for name, part in list(self.pipe.components.items()):
            if isinstance(part, torch.nn.Module):
                setattr(self.pipe, name, None)
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()


def _refuse_broken(module: torch.nn.Module, where: str) -> None:
    """Weights that are not finite would only show as a useless score much later."""
    for name, tensor in module.state_dict().items():
        if not tensor.is_meta and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{where}: the weights of {name} are not finite", hint="download or build the model again")


@contextmanager
def quiet_libraries():
    """Keep the progress bars and notices of diffusers, transformers and the hub's client out of the user's terminal while loading."""
    from transformers.utils import logging as transformers_logging

    libraries = diffusers_logging, transformers_logging
    before = [lib.get_verbosity() for lib in libraries]
    for lib in libraries:
        lib.set_verbosity(logging.CRITICAL)
        lib.disable_progress_bar()
    try:
        with quiet_hub():
            yield
    finally:
        for lib, level in zip(libraries, before):
            lib.set_verbosity(level)
