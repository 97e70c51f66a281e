"""A text-to-image pipeline in Hugging Face layout: prompts and images in, latents, velocities and pictures out.

Any folder or hub id of a pipeline that `drmcli.families` knows works the same way. Only the parts that are asked for are loaded.

Dimension letters: B images or prompts, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from drmcli.config import local_or_hub
from drmcli.errors import InputError
from drmcli.families import family_of
from drmcli.families.base import Conditioning, Family, check_negative, check_side, latent_shape, latent_space
from drmcli.fingerprints import at_hand, of_parts
from drmcli.fitting import Room, at_once, tile
from drmcli.hub import explained
from drmcli.kernels import PLAIN, Kernels
from drmcli.lora import load_lora
from drmcli.parts import (
    empty_denoiser,
    load_parts,
    quiet_libraries,
    read_index,
    settle,
    sorted_parts,
)
from drmcli.pipeline_values import checked

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PromptEmbeds = Conditioning
"""The old name of `Conditioning`."""


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


class Generator:
    """A loaded pipeline and the few things that drm does with it.

    `components`: any of "text", "vae", "transformer" (the denoiser, whatever the pipeline calls it); what is not asked for stays on
    disk. A denoiser that is not asked for is there on the meta device, since encoding may read its config.
    """

    kernels: Kernels = PLAIN
    """How its blocks are computed, and what its frozen weights are kept in."""

    def __init__(
        self, pipe: Any, ref: str, *, revision: str | None, max_sequence_length: int, family: Family | None = None
    ):
        self.pipe = pipe
        self.ref = ref
        self.revision = revision
        self.max_sequence_length = max_sequence_length
        self.family = (family or family_of(type(pipe).__name__)).bound(dict(pipe.scheduler.config))
        self.vae_tiling = "auto"
        self._room = Room()

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
        kernels: Kernels = PLAIN,
        vae_tiling: str = "auto",
        beside: Generator | None = None,
        flag: str = "--generator",
    ) -> Generator:
        """Load a pipeline from a folder or the hub. Only safetensors are read.

        kernels: how the denoiser's blocks are computed; by `quantize`, the text encoders' weights are kept in 8 bits too.
        vae_tiling: does the VAE work on large pictures in overlapping tiles: on, off, auto (see `fitting.tile`).
        beside: a loaded generator, whose VAE and text encoders are used where they are the same, not loaded a second time.

        Raises MissingError (gated, absent, offline) or InputError (damaged, of another kind), each naming `flag`.
        """
        where = local_or_hub(ref, flag)
        with explained(ref, flag), quiet_libraries():
            index = read_index(where, revision)
            family = family_of(str(index.get("_class_name")), f"{flag} {ref}")
            kind: Any = family.pipeline_class(index["_class_name"])
            given, absent, wanted = sorted_parts(family, kind, index, components, text_encoder_3, f"{flag} {ref}")
            if "transformer" not in components:
                absent[family.denoiser] = empty_denoiser(family, where, revision)
            others = [n for n in wanted if n != family.denoiser]
            parts = {} if beside is None else beside.same_encoders(ref, revision, others, kernels.quantize)
            left = {name: part for name, part in wanted.items() if name not in parts}
            parts |= load_parts(family, left, where, revision=revision, dtype=dtype, device=kernels.home(device))
            home = at_hand(where, [name for name in given if name not in absent | parts], revision, whole=True)
            pipe = kind.from_pretrained(home, dtype=dtype, use_safetensors=True, **absent, **parts)
        settle(pipe, family, device, kernels, whole="transformer" in components)
        generator = cls(pipe, ref, revision=revision, max_sequence_length=max_sequence_length, family=family)
        generator.vae_tiling, generator.kernels = vae_tiling, kernels
        return checked(generator, components, f"{flag} {ref}")

    @property
    def transformer(self) -> Any:
        """The denoiser: a transformer, or a U-Net."""
        return getattr(self.pipe, self.family.denoiser)

    @property
    def model_config(self) -> dict[str, Any]:
        """The denoiser's config, with what the family must know of the pipeline's own."""
        return dict(self.transformer.config) | {n: self.pipe.config.get(n) for n in self.family.pipeline_facts}

    @property
    def factor(self) -> int:
        """Pixels on a latent pixel's side."""
        return self.pipe.vae_scale_factor * self.family.folds

    @property
    def device(self) -> torch.device:
        parts = [p for p in self.pipe.components.values() if isinstance(p, torch.nn.Module)]
        devices = [next(p.parameters()).device for p in parts]
        return next((d for d in devices if d.type != "meta"), torch.device("cpu"))

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures that the denoiser was made for."""
        return self.family.image_size(self.model_config, self.factor)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """C, H, W of the latents of a picture. Raises InputError for sides in pixels that the model cannot take."""
        return latent_shape(self.family, self.model_config, self.factor, height, width)

    @property
    def latent_space(self) -> tuple[str, int]:
        """Name and channels of the latents: see `families.base.latent_space`."""
        return latent_space(self.family, self.model_config)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """All of the pipeline's text conditioning for B prompts, so many at once as memory allows."""
        texts, length = list(prompts), self.max_sequence_length
        parts = self._room.prompts.each(lambda at: self.family.encode_prompts(self.pipe, texts[at], length), len(texts))
        return parts[0] if len(parts) == 1 else Conditioning.cat(parts)

    @torch.no_grad()
    def encode_negative(self, prompt: str, guidance_scale: float) -> Conditioning | None:
        """A negative prompt's conditioning, one row; None where this scale takes no second pass.

        Raises InputError for one that is not empty and that nothing would read.
        """
        check_negative(self.family, self.model_config, prompt, guidance_scale)
        if not self.family.guides(self.model_config, guidance_scale):
            return None
        return self.family.encode_negative(self.pipe, prompt, self.max_sequence_length)

    def truncated(self, prompt: str) -> bool:
        """Does a prompt hold more tokens than every one of the text encoders reads?"""
        return self.family.truncated(self.pipe, prompt, self.max_sequence_length)

    def preprocess(self, images: Sequence[Image.Image], resolution: int | None = None) -> Tensor:
        """RGB pictures, centre-cropped and resized to a square of `resolution` pixels: float32 [B, 3, S, S] in [-1, 1]."""
        side = resolution or self.image_size
        check_side("--resolution", side, self.family, self.model_config, self.factor)
        return self.pipe.image_processor.preprocess(list(images), side, side, resize_mode="crop")

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image], resolution: int | None = None) -> Tensor:
        """Latents [B, C, H, W] as the denoiser sees them: posterior modes, shifted and scaled, float32."""

        def some(at: slice) -> Tensor:
            pixels = self.preprocess(images[at], resolution).to(self.device, self.pipe.vae.dtype)
            tile(self.pipe.vae, self.vae_tiling, pixels.shape[2] * pixels.shape[3])
            return self.family.encode_images(self.pipe, pixels)

        return torch.cat(self._room.encoded.each(some, len(images)))

    def sigmas(self, num_inference_steps: int, size: tuple[int, int] | None = None) -> Tensor:
        """The pipeline's own sigmas [n + 1], falling, float32 on the CPU. size: H, W of the latents (None: the model's own)."""
        side = self.image_size // self.factor
        return self.family.sigmas(self.pipe, num_inference_steps, size or (side, side))

    def first_state(self, noise: Tensor, sigma: float) -> Tensor:
        """Standard noise as the pipeline's first state, at its first sigma."""
        factor = self.family.first_noise(self.pipe, sigma)
        return noise if factor == 1 else factor * noise

    def velocity(
        self,
        latents: Tensor,
        sigma: float | Tensor,
        cond: Conditioning,
        negative: Conditioning | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """v [B, C, H, W], float32, of latents at sigma (one, or [B]).

        With `negative` (see `encode_negative`): the pipeline's own rule of guidance, both passes in one batch.
        """
        if negative is None or self.passes(negative, guidance_scale) == 1:
            return self._pass(latents, self._levels(sigma, latents), cond, guidance_scale)
        both = Conditioning.cat([negative.expand(len(cond)), cond])
        twice = torch.cat([latents, latents])
        without, with_prompt = self._pass(twice, self._levels(sigma, latents).repeat(2), both, guidance_scale).chunk(2)
        return self.family.guide(with_prompt, without, guidance_scale)

    def velocity_from(
        self,
        states: Any,
        block: int,
        latents: Tensor,
        sigma: float | Tensor,
        cond: Conditioning,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """v [B, C, H, W] without a negative prompt, from what the block before `block` returned for these latents.

        What a frozen reward model on the generator's first blocks has computed is not computed again; embeddings are.
        """
        with self.family.going_on(self.transformer, block, states):
            return self._pass(latents, self._levels(sigma, latents), cond, guidance_scale)

    def passes(self, negative: Conditioning | None, guidance_scale: float) -> int:
        """Latents that go through the denoiser for each one whose velocity is asked for: 2 with guidance by a second pass."""
        return 2 if negative is not None and self.family.guides(self.model_config, guidance_scale) else 1

    def _pass(self, latents: Tensor, sigma: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        inputs = self.family.inputs(self.transformer, latents, sigma, cond, guidance_scale)
        return self.family.velocity(self.transformer(**inputs, return_dict=False), latents, sigma)

    def _levels(self, sigma: float | Tensor, latents: Tensor) -> Tensor:
        return torch.as_tensor(sigma, device=latents.device, dtype=torch.float32).expand(len(latents))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of clean latents [B, C, H, W], so many at once as `fitting.DECODED_PIXELS` hold."""
        pixels = latents.shape[2] * latents.shape[3] * self.factor**2
        self._room.decoded.size = min(self._room.decoded.size, at_once(pixels))
        tile(self.pipe.vae, self.vae_tiling, pixels)

        def some(at: slice) -> list[Image.Image]:
            return self.pipe.image_processor.postprocess(self.family.decode(self.pipe, latents[at]), output_type="pil")

        return [picture for part in self._room.decoded.each(some, len(latents)) for picture in part]

    def load_lora(self, ref: str, flag: str = "--lora") -> None:
        """Put a LoRA of the denoiser on, in any form that `drmcli.lora` reads."""
        with quiet_libraries():
            load_lora(self, ref, flag)

    def lends(
        self, family: Family, ref: str, revision: str | None, dtype: torch.dtype, device: torch.device | str, bits: str
    ) -> bool:
        """Has another pipeline's denoiser, in this number format (bits: `Kernels.quantize`) on this device, the weights of the one here?"""
        name, mine = family.denoiser, getattr(self.pipe, family.denoiser, None)
        if mine is None or self.family.name != family.name or mine.dtype != dtype:
            return False
        if torch.empty(0, device=device).device != mine.device:
            return False
        return of_parts(ref, revision, [name], bits=bits) == self.prints([name])

    def same_encoders(self, ref: str, revision: str | None, names: Sequence[str], bits: str) -> dict[str, Any]:
        """Those of the named parts of another pipeline that are loaded here already; bits: `Kernels.quantize`."""
        mine, theirs = self.prints(names), of_parts(ref, revision, names, bits=bits)
        return {name: getattr(self.pipe, name) for name in names if name in mine and mine[name] == theirs.get(name)}

    def prints(self, names: Sequence[str] | None = None) -> dict[str, str]:
        """A short hash of what each of these parts (None: text and VAE) computes, for those that are there. See `drmcli.fingerprints`."""
        names = (*self.family.text, "vae") if names is None else names
        present = [name for name in names if getattr(self.pipe, name, None) is not None]
        return of_parts(self.ref, self.revision, present, bits=self.kernels.quantize)

    def fingerprint(self, parts: Sequence[str]) -> str:
        """A short hash of what the named parts ("vae", "text") compute, number format and prompt length included."""
        names = [*(("vae",) if "vae" in parts else ()), *(self.family.text if "text" in parts else ())]
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
