"""What drm must know of one kind of pipeline, and what holds for all.

The rest of drm sees one canonical form: latents x [B, C, H, W] as the denoiser was trained on them, sigma in [0, 1] with 1 = noise,
x_sigma = (1 - sigma) x_0 + sigma eps, velocity v = eps - x_0. What a model wants instead (packed tokens, other times, other signs)
stays inside its family's file.

The denoiser's own forward pass is used as it is; no forward pass is copied out of diffusers. A reward model is *cut*: its block lists
are shortened, and the output layers become stand-ins that give zeros, so that the pass ends as usual and wrappers see nothing
unusual. It is *listened to* by forward hooks on the tapped blocks, which are there during the forward pass alone: a block that
gradient checkpointing computes once more in the backward pass calls no hook.

Saving a policy: `Family.save_lora(folder, denoiser, pipeline)` writes the LoRA named "default" with its adapter metadata (rank, alpha,
targets), without which plain diffusers takes alpha = rank and draws at another strength. `Family.lora_targets` are the default
targets, `Family.unread(model)` the parameters of its last block that nothing reads.

Dimension letters: B latents or prompts, C latent channels, H and W latent height and width, L image tokens, D token width,
h and w the grid of the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from drmcli.errors import InputError
from drmcli.families.conditioning import Conditioning


class Zeros(nn.Module):
    """Stands for an output layer of a model that was cut: zeros of the width that the rest of the forward pass expects."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden.new_zeros(*hidden.shape[:-1], self.width)


class Replay(nn.Module):
    """Stands for a block whose output is known already: a tensor, or (text, image)."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The known output, with as many padded positions at the end as the prompts of this batch have."""
        if isinstance(self.output, tuple):
            text, image = self.output
            given = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
            return (text if text is None else at_length(text, given.shape[1])), image
        given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return at_length(self.output, given.shape[1])


@contextmanager
def listening(blocks: Sequence[nn.Module], taps: Sequence[int]) -> Iterator[dict[int, Any]]:
    """What the tapped blocks return, by position, filled during the forward pass that is made inside."""
    heard: dict[int, Any] = {}

    def hook(tap: int) -> Callable[..., None]:
        def hear(module: nn.Module, args: Any, output: Any) -> None:
            heard[tap] = output

        return hear

    handles = [blocks[tap].register_forward_hook(hook(tap)) for tap in set(taps)]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def rows_of(output: Any, index: Tensor) -> Any:
    """Rows of what a block returned: a tensor, or a tuple of tensors and None."""
    if isinstance(output, tuple):
        return tuple(None if part is None else part[index] for part in output)
    return output[index]


def joined(outputs: Sequence[Any]) -> Any:
    """What a block returned for several batches, one below the other. Padding is at the end; all get that of the longest."""
    if isinstance(outputs[0], tuple):
        return tuple(None if parts[0] is None else joined(parts) for parts in zip(*outputs))
    longest = max(part.shape[1] for part in outputs)
    return torch.cat([at_length(part, longest) for part in outputs])


def at_length(tokens: Tensor, length: int) -> Tensor:
    """[B, T, D] with `length` positions: zeros behind the last one, or without those behind."""
    if tokens.ndim != 3 or tokens.shape[1] == length:
        return tokens
    return tokens[:, :length] if tokens.shape[1] > length else F.pad(tokens, (0, 0, 0, length - tokens.shape[1]))


class Family:
    """One kind of pipeline; stateless. The defaults here are those of a flow-matching transformer over [B, C, H, W] latents.

    A subclass says at least `name`, `denoiser_class`, `lora_targets`, `encode_prompts`, `inputs` and `blank`. `config` is the
    denoiser's own, as a dict.
    """

    name: str
    """In a saved reward model's config.json."""
    denoiser = "transformer"
    """The pipeline's component that predicts, by name."""
    denoiser_class: type
    """Its class in diffusers."""
    text: tuple[str, ...] = ("tokenizer", "text_encoder")
    """Components that encode prompts: loaded, hashed and freed together."""
    optional: tuple[str, ...] = ()
    """Components that drm does not need and does not load."""
    lora_targets: tuple[str, ...] = ()
    block_lists: tuple[str, ...] = ("transformer_blocks",)
    """The lists of blocks in running order; blocks are counted over all of them."""
    ends: tuple[str, ...] = ("norm_out", "proj_out")
    """The output layers, which a reward model has stand-ins for."""
    text_outputs: tuple[str, ...] = ()
    """Parameters of a block that only lead to the text it hands on, by prefix: in the last kept block nothing reads them."""
    shares_blocks = True
    """Can a generator go on from what a reward model's blocks computed?"""
    steps_in_scheduler = True
    """Does the stock pipeline hand its scheduler, a flow-matching Euler one, latents [B, C, H, W] and the velocity? `StepwiseScheduler`
    needs that."""

    folds = 1
    """Pixels of the VAE's latents on the side of a canonical one: 2 where the transformer's channels hold 2 x 2 of them."""
    pipeline_facts: tuple[str, ...] = ()
    """Entries of model_index.json that go with the denoiser's config, in `guides`."""
    vae_values: tuple[str, ...] = ("scaling_factor",)
    """Entries of the VAE's config that encoding and decoding compute with: a number, or one a channel of the latents."""
    scheduler_facts: tuple[str, ...] = ()
    """Entries of the pipeline's scheduler config that the family must know; a reward model saves them."""

    def bound(self, scheduler: dict[str, Any]) -> Family:
        """This family for pipelines whose scheduler's config has these entries."""
        return self

    # --- sizes, from the denoiser's config ------------------------------------------------------------------------------------

    def depth(self, config: dict[str, Any]) -> int:
        """Number of blocks."""
        return int(config["num_layers"])

    def channels(self, config: dict[str, Any]) -> int:
        """C."""
        return int(config["in_channels"])

    def patch(self, config: dict[str, Any]) -> int:
        """Latent pixels on a token's side."""
        return int(config["patch_size"])

    def vae_factor(self, config: dict[str, Any]) -> int:
        """Pixels on a canonical latent pixel's side, from the VAE's config."""
        return self.folds * 2 ** (len(config["block_out_channels"]) - 1)

    def image_size(self, config: dict[str, Any], factor: int) -> int:
        """Side in pixels of the pictures that the model was made for; factor: the VAE's."""
        return int(config["sample_size"]) * factor

    def largest_side(self, config: dict[str, Any], factor: int) -> int | None:
        """Side in pixels of the largest pictures that the model can place; None where there is no limit."""
        return None

    def text_tokens(self, max_sequence_length: int, tokenizer_length: int) -> int:
        """Text positions of a prompt at most; tokenizer_length: of the component `tokenizer`."""
        return max_sequence_length

    def latents(self, config: dict[str, Any]) -> str:
        """The name of the latent space. Reward models may be used across generators whose latent spaces have one name."""
        return self.name

    def width(self, model: nn.Module) -> int:
        """D, where it is one for all blocks."""
        return int(model.inner_dim)  # type: ignore[arg-type]

    def widths(self, model: nn.Module, taps: Sequence[int]) -> list[int]:
        """D of each of these blocks."""
        return [self.width(model)] * len(taps)

    # --- pipeline ---------------------------------------------------------------------------------------------------------------

    def pipeline_class(self, name: str) -> type:
        """The pipeline's class by the name in model_index.json."""
        return getattr(diffusers, name)

    def encode_prompts(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> Conditioning:
        """All that the denoiser is told of B prompts, on the encoders' device."""
        raise NotImplementedError

    def encode_negative(self, pipe: Any, prompt: str, max_sequence_length: int) -> Conditioning:
        """The same for one negative prompt."""
        return self.encode_prompts(pipe, [prompt], max_sequence_length)

    def blank(self, config: dict[str, Any], batch: int, tokens: int) -> Conditioning:
        """Random conditioning of the right shapes, from the config alone: what a memory plan runs on."""
        raise NotImplementedError

    def truncated(self, pipe: Any, prompt: str, max_sequence_length: int) -> bool:
        """Does a prompt hold more tokens than every one of the text encoders reads?"""
        return len(pipe.tokenizer(prompt, truncation=False).input_ids) > max_sequence_length

    def encode_images(self, pipe: Any, pixels: Tensor) -> Tensor:
        """Pictures [B, 3, height, width] in [-1, 1] -> latents [B, C, H, W], float32: posterior modes, shifted and scaled."""
        vae = pipe.vae
        latents = vae.encode(pixels).latent_dist.mode().float()
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        """The inverse: [B, 3, height, width] in [-1, 1], float32."""
        vae = pipe.vae
        z = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return vae.decode(z.to(vae.dtype)).sample.float()

    def sigmas(self, pipe: Any, num_inference_steps: int, size: tuple[int, int]) -> Tensor:
        """The pipeline's own sigmas [n + 1] for latents of H x W, falling, float32 on the CPU."""
        return flow_sigmas(pipe.scheduler.config, num_inference_steps)

    def first_noise(self, pipe: Any, sigma: float) -> float:
        """What standard noise is multiplied by to make the pipeline's first state, at the first sigma."""
        return 1.0

    # --- velocity ---------------------------------------------------------------------------------------------------------------

    def inputs(
        self, model: nn.Module, latents: Tensor, sigma: Tensor, cond: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        """Keyword arguments of the denoiser's own forward for latents [B, C, H, W] at sigma [B], float32.

        guidance: for models that take it as an input; None is the family's own default. Latents and embeddings are cast to the
        model's dtype, times are not.
        """
        raise NotImplementedError

    def velocity(self, output: Any, latents: Tensor, sigma: Tensor) -> Tensor:
        """What the forward returned (return_dict=False) as v [B, C, H, W], float32."""
        return output[0].float()

    second_pass = "raise --guidance-scale above 1"
    """How to get one, in a hint."""
    default_guidance = 1.0
    """Of models that take it as an input: what a reward model on them is told where nothing else is asked."""

    def takes_guidance(self, config: dict[str, Any]) -> bool:
        """Is the guidance scale an input of the model, so that one pass is enough?"""
        return False

    def guides(self, config: dict[str, Any], scale: float) -> bool:
        """Does this guidance scale ask for a second pass, with a negative prompt?"""
        return scale > 1

    def with_true_cfg(self, scale: float) -> Family:
        """This family with a second pass at this scale, beside a guidance scale that is an input. Raises InputError where there is none."""
        raise InputError(
            "--true-cfg-scale: this generator takes no second pass beside --guidance-scale",
            hint="leave it out; --guidance-scale is the scale of the second pass where there is one",
        )

    def guide(self, with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
        """The pipeline's own rule: v [B, C, H, W] from the velocities with the prompt and with the negative one."""
        return without + scale * (with_prompt - without)

    # --- features ---------------------------------------------------------------------------------------------------------------

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """All blocks in running order."""
        return [block for name in self.block_lists for block in getattr(model, name)]

    def cut(self, model: nn.Module, keep: int) -> None:
        """Keep the first blocks and make the output layers stand-ins, in place."""
        left = keep
        for name in self.block_lists:
            blocks = getattr(model, name)
            setattr(model, name, blocks[:left])
            left = max(0, left - len(blocks))
        self.stand_ins(model)

    def stand_ins(self, model: nn.Module) -> None:
        """Put stand-ins in the place of the output layers: here of an output norm and an output projection."""
        norm, projection = self.ends
        setattr(model, norm, Zeros(getattr(model, projection).out_features))
        setattr(model, projection, nn.Identity())

    def unread(self, model: nn.Module) -> list[nn.Parameter]:
        """Parameters of a cut or whole model's last block that nothing reads, since no block follows."""
        return [
            p for name, p in self.blocks(model)[-1].named_parameters() if name.startswith(self.text_outputs or ("\0",))
        ]

    def tokens(self, output: Any, inputs: dict[str, Any], grid: tuple[int, int]) -> Tensor:
        """The image tokens [B, L, D] in what a block returned, row by row of the grid; inputs: the forward's."""
        return output[1] if isinstance(output, tuple) else output

    def grid(self, config: dict[str, Any], size: tuple[int, int]) -> tuple[int, int]:
        """h, w of the tokens of latents of H x W."""
        patch = self.patch(config)
        return size[0] // patch, size[1] // patch

    # --- going on from shared blocks ---------------------------------------------------------------------------------------------

    def share(self, cut: nn.Module, whole: nn.Module) -> None:
        """Let a cut model use the whole one's modules themselves. The two must have the same weights."""
        left = len(self.blocks(cut))
        for name in self.block_lists:
            blocks = getattr(whole, name)
            setattr(cut, name, blocks[:left])
            left = max(0, left - len(blocks))
        for name, module in whole.named_children():
            if name not in self.block_lists and name not in self.ends:
                setattr(cut, name, module)

    @contextmanager
    def going_on(self, whole: nn.Module, first: int, output: Any) -> Iterator[None]:
        """Inside, the whole model takes `output` for what its first blocks return, and computes the others alone."""
        kept = {name: getattr(whole, name) for name in self.block_lists}
        left = first
        for name, blocks in kept.items():
            replayed = 0 < left <= len(blocks)
            setattr(whole, name, nn.ModuleList([*([Replay(output)] if replayed else []), *blocks[max(0, left) :]]))
            left -= len(blocks)
        try:
            yield
        finally:
            for name, blocks in kept.items():
                setattr(whole, name, blocks)

    # --- LoRA -------------------------------------------------------------------------------------------------------------------

    def save_lora(self, folder: Path | str, model: nn.Module, pipeline: type) -> None:
        """Write the denoiser's LoRA as its pipeline does, alpha included; `pipeline(...).load_lora_weights(folder)` reads it."""
        from peft.utils import get_peft_model_state_dict

        layers = {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(model).items()}
        metadata = model.peft_config["default"].to_dict()  # type: ignore[index, union-attr]
        metadata = {k: sorted(v) if isinstance(v, set) else v for k, v in metadata.items()}  # the same file each time
        pipeline.save_lora_weights(  # type: ignore[attr-defined]
            folder,
            **{f"{self.denoiser}_lora_layers": layers, f"{self.denoiser}_lora_adapter_metadata": metadata},
            safe_serialization=True,
        )
        for file in Path(folder).glob("*.safetensors"):
            _order_metadata(file)


def _order_metadata(file: Path) -> None:
    """The same weights as the same bytes: safetensors writes its metadata in an order that chance decides."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def input_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a denoiser's latents and embeddings are cast to: that of its first layer, whatever a LoRA's is."""
    return next(model.parameters()).dtype


def check_negative(family: Family, config: dict[str, Any], prompt: str, scale: float) -> None:
    """Raises InputError for a negative prompt that is not empty and that no second pass reads."""
    if prompt and not family.guides(config, scale):
        raise InputError(
            f"--negative-prompt: --guidance-scale {scale:g} makes no second pass, which alone reads it",
            hint=f"{family.second_pass}, or leave the negative prompt out",
        )


def latent_shape(family: Family, config: dict[str, Any], factor: int, height: int, width: int) -> tuple[int, int, int]:
    """C, H, W of the latents of a picture of these sides in pixels. factor: pixels on a latent pixel's side.

    Raises InputError for sides that the model cannot take.
    """
    for flag, side in (("--height", height), ("--width", width)):
        check_side(flag, side, family, config, factor)
    return family.channels(config), height // factor, width // factor


def check_side(flag: str, side: int, family: Family, config: dict[str, Any], factor: int) -> None:
    """Raises InputError for a side in pixels that is no multiple of what a token covers, or more than the model can place."""
    unit, largest = factor * family.patch(config), family.largest_side(config, factor)
    if side % unit:
        raise InputError(f"{flag} {side}: not a multiple of {unit}", hint=f"use {max(1, round(side / unit)) * unit}")
    if largest is not None and side > largest:
        raise InputError(f"{flag} {side}: the transformer knows {largest} pixels at most", hint="go smaller")


def latent_space(family: Family, config: dict[str, Any]) -> tuple[str, int]:
    """Name and channels of a denoiser's latents. Reward models may be used across generators of one space.

    So a reward model on Stable Diffusion 3.5 Medium judges the states of 3.5 Large, and one on FLUX.1 those of its fine-tunes.
    """
    return family.latents(config), family.channels(config)


def flow_sigmas(config: Any, num_inference_steps: int, *, even: bool = False, mu: float | None = None) -> Tensor:
    """Sigmas [n + 1] of a flow-matching Euler scheduler with this config, float32.

    even: from 1 down to 1 / n in even steps before the shift, as most pipelines ask; else the scheduler's own grid. mu: of a shift
    that depends on the resolution.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    n = num_inference_steps
    scheduler.set_timesteps(n, sigmas=np.linspace(1.0, 1 / n, n) if even else None, mu=mu)
    return scheduler.sigmas.float()


def linear_mu(config: Any, tokens: int) -> float:
    """The shift for a number of image tokens, on the line that a scheduler's config gives."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return least + (most - least) * (tokens - low) / (high - low)


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> tokens [B, (H / 2) (W / 2), 4 C]: 2 x 2 pixels each, its numbers ordered by channel, row, column."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `pack` for latents of H x W."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (size[0] // 2, size[1] // 2)), 2)
