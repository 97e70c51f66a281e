"""Sana: SanaPipeline, Gemma 2 text behind a long instruction, linear attention, a VAE that makes pictures 32 times smaller.

Its pipeline steps with DPM-Solver++ of second order, which remembers the step before; a search that branches and an SDE step want one
without memory. drm takes Euler steps over the pipeline's own sigmas, which is DPM-Solver++ of first order. Times are whole
numbers of thousandths, cut off, as that scheduler hands them on.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from drmcli.families.base import Conditioning, Family, input_dtype


class Sana(Family):
    """Conditioning: `prompt_embeds` [B, T, D] of Gemma 2, `mask` [B, T]."""

    name = "sana"
    denoiser_class = SanaTransformer2DModel
    lora_targets = (
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
        "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
    )  # fmt: skip

    steps_in_scheduler = False

    def vae_factor(self, config: dict[str, Any]) -> int:
        return 2 ** (len(config["encoder_block_out_channels"]) - 1)

    def width(self, model: nn.Module) -> int:
        config: Any = model.config
        return int(config.num_attention_heads * config.attention_head_dim)

    def encode_prompts(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> Conditioning:
        # The instruction is the default of the pipeline's call; encode_prompt's own default is to have none.
        instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
        embeds, mask, _, _ = pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=pipe.text_encoder.device,
            max_sequence_length=max_sequence_length, complex_human_instruction=instruction,
        )  # fmt: skip
        return Conditioning(prompt_embeds=embeds, mask=mask.bool()).trimmed()

    def encode_negative(self, pipe: Any, prompt: str, max_sequence_length: int) -> Conditioning:
        """Without the instruction."""
        embeds, mask, _, _ = pipe.encode_prompt(
            [prompt], do_classifier_free_guidance=False, device=pipe.text_encoder.device,
            max_sequence_length=max_sequence_length,
        )  # fmt: skip
        return Conditioning(prompt_embeds=embeds, mask=mask.bool()).trimmed()

    def blank(self, config: dict[str, Any], batch: int, tokens: int) -> Conditioning:
        embeds = torch.randn(batch, tokens, int(config["caption_channels"]))
        return Conditioning(prompt_embeds=embeds, mask=torch.ones(batch, tokens, dtype=torch.bool))

    def truncated(self, pipe: Any, prompt: str, max_sequence_length: int) -> bool:
        return super().truncated(pipe, prompt, max_sequence_length - 1)

    def encode_images(self, pipe: Any, pixels: Tensor) -> Tensor:
        return pipe.vae.encode(pixels).latent.float() * pipe.vae.config.scaling_factor

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        return pipe.vae.decode((latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)).sample.float()

    def sigmas(self, pipe: Any, num_inference_steps: int, size: tuple[int, int]) -> Tensor:
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        scheduler.set_timesteps(num_inference_steps)
        return scheduler.sigmas.float()

    def inputs(
        self, model: nn.Module, latents: Tensor, sigma: Tensor, cond: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        dtype = input_dtype(model)
        config: Any = model.config
        # float32 may fall short of a whole number by half a unit in its last place, 3e-5 here.
        time = torch.floor(1000.0 * sigma.double() + 5e-5).float()
        return {
            "hidden_states": latents.to(dtype),
            "encoder_hidden_states": cond.prompt_embeds.to(dtype),
            "encoder_attention_mask": cond.mask,
            "timestep": time * config.timestep_scale,
        }

    def velocity(self, output: Any, latents: Tensor, sigma: Tensor) -> Tensor:
        """Models that predict a variance too have it in a second half of the channels."""
        return output[0][:, : latents.shape[1]].float()

    def stand_ins(self, model: nn.Module) -> None:
        super().stand_ins(model)
        model.scale_shift_table = None  # type: ignore[assignment]  # only the output norm reads it


FAMILY = Sana()
