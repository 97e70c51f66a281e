"""Lumina-Image 2.0: Lumina2Pipeline, Gemma 2 text, refiners of text and image and then one stream with the text first.

Time runs from 0 at noise to 1, and the prediction is x_0 - eps. In the joint stream a row's image follows its own last text token,
so that rows have it at different places. Refiners are part of the embeddings: blocks are counted over `layers` alone.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Lumina2Transformer2DModel
from torch import Tensor, nn

from drmcli.errors import InputError
from drmcli.families.base import Conditioning, Family, Zeros, flow_sigmas, input_dtype, linear_mu


class Lumina2(Family):
    """Conditioning: `prompt_embeds` [B, T, D] of Gemma 2's last layer but one, `mask` [B, T]."""

    name = "lumina2"
    denoiser_class = Lumina2Transformer2DModel
    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    block_lists = ("layers",)
    ends = ("norm_out",)

    def largest_side(self, config: dict[str, Any], factor: int) -> int:
        return self.patch(config) * factor * min(int(n) for n in config["axes_lens"][1:])

    def latents(self, config: dict[str, Any]) -> str:
        return "FLUX.1"

    def width(self, model: nn.Module) -> int:
        return int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    def encode_prompts(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> Conditioning:
        places = int(pipe.transformer.config.axes_lens[0])
        if max_sequence_length >= places:
            raise InputError(
                f"--set max_sequence_length: {max_sequence_length}, and the transformer has {places} places for text",
                hint=f"use {places - 1} or less",
            )
        embeds, mask, _, _ = pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=pipe.text_encoder.device,
            max_sequence_length=max_sequence_length,
        )  # fmt: skip
        return Conditioning(prompt_embeds=embeds, mask=mask.bool()).trimmed()

    def encode_negative(self, pipe: Any, prompt: str, max_sequence_length: int) -> Conditioning:
        """Without the system prompt, which encode_prompt leaves out of negative prompts alone."""
        _, _, embeds, mask = pipe.encode_prompt(
            [""], negative_prompt=[prompt], device=pipe.text_encoder.device, max_sequence_length=max_sequence_length
        )
        return Conditioning(prompt_embeds=embeds, mask=mask.bool()).trimmed()

    def blank(self, config: dict[str, Any], batch: int, tokens: int) -> Conditioning:
        embeds = torch.randn(batch, tokens, int(config["cap_feat_dim"]))
        return Conditioning(prompt_embeds=embeds, mask=torch.ones(batch, tokens, dtype=torch.bool))

    def truncated(self, pipe: Any, prompt: str, max_sequence_length: int) -> bool:
        return super().truncated(pipe, f"{pipe.system_prompt} <Prompt Start> {prompt}", max_sequence_length)

    def sigmas(self, pipe: Any, num_inference_steps: int, size: tuple[int, int]) -> Tensor:
        config = pipe.scheduler.config
        # The pipeline counts channels where tokens are meant; it matters only where the shift depends on the resolution.
        mu = linear_mu(config, self.channels(pipe.transformer.config))
        return flow_sigmas(config, num_inference_steps, even=True, mu=mu)

    def guide(self, with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
        """Brought back to the length of the prompt's velocity along each row of latent pixels, as the pipeline does."""
        guided = super().guide(with_prompt, without, scale)
        return guided * (with_prompt.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def inputs(
        self, model: nn.Module, latents: Tensor, sigma: Tensor, cond: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        dtype = input_dtype(model)
        return {
            "hidden_states": latents.to(dtype),
            "timestep": 1.0 - sigma,
            "encoder_hidden_states": cond.prompt_embeds.to(dtype),
            "encoder_attention_mask": cond.mask,
        }

    def velocity(self, output: Any, latents: Tensor, sigma: Tensor) -> Tensor:
        return -output[0].float()

    def stand_ins(self, model: nn.Module) -> None:
        model.norm_out = Zeros(model.norm_out.linear_2.out_features)  # type: ignore[union-attr, arg-type]

    def tokens(self, output: Any, inputs: dict[str, Any], grid: tuple[int, int]) -> Tensor:
        start = inputs["encoder_attention_mask"].sum(1)
        index = start[:, None] + torch.arange(grid[0] * grid[1], device=output.device)
        return output.gather(1, index[..., None].expand(-1, -1, output.shape[-1]))


FAMILY = Lumina2()
