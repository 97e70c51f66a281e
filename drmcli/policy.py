"""The generator that learns: its weights in all their versions, and how they are saved.

One transformer is in memory. A version of its weights (the moving average, the policy that draws, the policy before training) is a list of
tensors that takes the place of the trained ones for the length of a `with` block; nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from drmcli.config import local_or_hub
from drmcli.errors import InputError
from drmcli.families.base import Family
from drmcli.generator import Generator, PromptEmbeds
from drmcli.parts import load_denoiser
from drmcli.quantize import refuse_learning


def start_learning(
    transformer: Any, family: Family, lora: LoraConfig | None, *, seed: int, checkpointing: bool
) -> list[torch.nn.Parameter]:
    """Switch on what learns of a generator's transformer, in float32: a LoRA, or (None) all weights. Returns it.

    seed: of the LoRA's first weights. Raises InputError for LoRA targets that are not there.
    """
    transformer.requires_grad_(lora is None)
    if lora is not None:
        torch.manual_seed(seed)
        try:
            transformer.add_adapter(lora)
        except ValueError as error:
            fact = " ".join(str(error).split())
            hint = f"for example {list(family.lora_targets)[:4]}"
            raise InputError(f"--set lora_targets: {fact}", hint=hint) from None
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for parameter in family.unread(transformer):
        parameter.requires_grad_(False)
    return [p for p in transformer.parameters() if p.requires_grad]


class Policy:
    """A generator with a LoRA, or with all of its transformer, trainable in float32.

    lora: None trains all weights. keep_reference: with all weights trained, keep a copy of the first ones (a LoRA is switched off instead).
    ema_decay: of a moving average, 0 is without. keep_old: a second policy that follows the first by `follow` and draws the samples
    (DiffusionNFT). Raises InputError for LoRA targets that are not there, and for all weights of a generator that keeps them in 8 bits.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        lora: LoraConfig | None,
        seed: int,
        guidance_scale: float = 1.0,
        ema_decay: float = 0.0,
        keep_reference: bool = False,
        keep_old: bool = False,
        gradient_checkpointing: bool = False,
    ):
        if lora is None:
            refuse_learning(generator.kernels.quantize, "a policy without a LoRA")
        self.generator, self.lora, self.guidance_scale = generator, lora, guidance_scale
        self.negative = generator.encode_negative("", guidance_scale)
        self.dtype = next(generator.transformer.parameters()).dtype
        self.trained = start_learning(
            generator.transformer, generator.family, lora, seed=seed, checkpointing=gradient_checkpointing
        )
        self.first = [p.detach().clone() for p in self.trained] if keep_reference and lora is None else None
        self.old = [p.detach().clone() for p in self.trained] if keep_old else None
        self.ema = EMAModel(self.trained, decay=ema_decay) if ema_decay else None

    # --- what it computes ---------------------------------------------------------------------------------------------

    def velocity(self, x: Tensor, sigma: float | Tensor, cond: PromptEmbeds) -> Tensor:
        """v [B, C, H, W], float32, of latents at a sigma (one, or [B]), guided where the policy is."""
        return self.generator.velocity(x, sigma, cond, self.negative, self.guidance_scale)

    @property
    def passes(self) -> int:
        """Forward passes of a velocity: guidance needs two."""
        return 1 if self.negative is None else 2

    # --- its versions -------------------------------------------------------------------------------------------------

    @contextmanager
    def _holding(self, weights: Sequence[Tensor]) -> Iterator[None]:
        own = [p.data for p in self.trained]
        for parameter, tensor in zip(self.trained, weights):
            parameter.data = tensor
        try:
            yield
        finally:
            for parameter, tensor in zip(self.trained, own):
                parameter.data = tensor

    @contextmanager
    def reference_policy(self) -> Iterator[None]:
        """The policy before training. With all weights trained it must have been kept (`keep_reference`)."""
        if self.lora is None:
            assert self.first is not None, "the first weights were not kept"
            with self._holding(self.first):
                yield
            return
        transformer = self.generator.transformer
        transformer.disable_adapters()
        try:
            yield
        finally:
            transformer.enable_adapters()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average, which is what is evaluated and saved; the weights themselves where there is none."""
        with self._holding([p.data for p in self.trained] if self.ema is None else self.ema.shadow_params):
            yield

    @contextmanager
    def drawing_policy(self) -> Iterator[None]:
        """The policy that draws samples: the old one where there is one."""
        with self._holding([p.data for p in self.trained] if self.old is None else self.old):
            yield

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """After an update: the moving average takes a step, and the old policy keeps the share `decay` of itself."""
        if self.ema is not None:
            self.ema.step(self.trained)
        for old, now in zip(self.old or (), self.trained):
            old.lerp_(now.detach(), 1 - decay)

    # --- files --------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold of it, on the CPU."""
        versions: dict[str, Sequence[Tensor]] = {"lora": self.trained, "old": self.old or []}
        if self.ema is not None:
            versions["ema"] = self.ema.shadow_params
        return {f"{name}.{i}": t.detach().cpu() for name, many in versions.items() for i, t in enumerate(many)}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor], ema_step: int) -> None:
        """Take up what `tensors` gave."""
        for i, parameter in enumerate(self.trained):
            parameter.copy_(tensors[f"lora.{i}"])
        for i, old in enumerate(self.old or ()):
            old.copy_(tensors[f"old.{i}"])
        if self.ema is not None:
            self.ema.shadow_params = [tensors[f"ema.{i}"].to(p.device) for i, p in enumerate(self.trained)]
            self.ema.optimization_step = ema_step

    def save_weights(self, folder: Path) -> None:
        """The averaged policy, as small as it can be: the LoRA with its alpha, or the transformer in the generator's number format."""
        transformer = self.generator.transformer
        with self.averaged():
            if self.lora is not None:
                self.generator.family.save_lora(folder, transformer, type(self.generator.pipe))
                return
            state = {k: v.to("cpu", self.dtype) for k, v in transformer.state_dict().items()}
            transformer.save_pretrained(
                folder / self.generator.family.denoiser, state_dict=state, safe_serialization=True
            )

    def save_pipeline(self, folder: Path) -> None:
        """The averaged policy as plain diffusers loads it: the LoRA, or the whole pipeline around the transformer."""
        if self.lora is None:
            pipe = self.generator.pipe
            pipe.save_config(folder)
            for name, part in pipe.components.items():
                if part is not None and name != self.generator.family.denoiser:
                    part.save_pretrained(folder / name)
        self.save_weights(folder)

    @torch.no_grad()
    def load(self, where: Path) -> None:
        """Weights that were saved, in place of the current ones."""
        transformer = self.generator.transformer
        if self.lora is None:
            self._take_transformer(str(where), None)
            return
        layers = load_file(where / "pytorch_lora_weights.safetensors")
        set_peft_model_state_dict(
            transformer, {k.removeprefix(f"{self.generator.family.denoiser}."): v for k, v in layers.items()}
        )

    @contextmanager
    def saved(self, where: Path | None) -> Iterator[None]:
        """The policy that a folder holds, or the one before training, for the length of a block."""
        if where is None and (self.lora is not None or self.first is not None):
            with self.reference_policy():
                yield
            return
        own = [p.detach().clone() for p in self.trained]
        ema, self.ema = self.ema, None  # what was saved is the average already
        try:
            if where is None:
                generator = self.generator
                self._take_transformer(local_or_hub(generator.ref, "--generator"), generator.revision)
            else:
                self.load(where)
            yield
        finally:
            self.ema = ema
            with torch.no_grad():
                for parameter, tensor in zip(self.trained, own):
                    parameter.copy_(tensor)

    def _take_transformer(self, where: str, revision: str | None) -> None:
        transformer = self.generator.transformer
        kept = load_denoiser(self.generator.family, where, revision=revision, dtype=torch.float32)
        transformer.load_state_dict(kept.state_dict())
