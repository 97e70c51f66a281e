"""Stable Diffusion 3 and 3.5: StableDiffusion3Pipeline, two CLIP text encoders and T5, joint blocks of text and image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from drmcli.families.base import Conditioning, Family, flow_sigmas, input_dtype, linear_mu


class SD3(Family):
    """Conditioning: `prompt_embeds` [B, 77 + L, D] (both CLIPs side by side, then T5; no mask), `pooled_prompt_embeds` [B, P]."""

    name = "sd3"
    denoiser_class = SD3Transformer2DModel
    text = ("tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3")
    optional = ("image_encoder", "feature_extractor")
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    text_outputs = ("ff_context", "attn.to_add_out")

    def largest_side(self, config: dict[str, Any], factor: int) -> int:
        return int(config["pos_embed_max_size"]) * int(config["patch_size"]) * factor

    def text_tokens(self, max_sequence_length: int, tokenizer_length: int) -> int:
        return tokenizer_length + max_sequence_length

    def encode_prompts(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> Conditioning:
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length,
            device=pipe.text_encoder.device,
        )  # fmt: skip
        return Conditioning(prompt_embeds=embeds, pooled_prompt_embeds=pooled)

    def blank(self, config: dict[str, Any], batch: int, tokens: int) -> Conditioning:
        return Conditioning(
            prompt_embeds=torch.randn(batch, tokens, int(config["joint_attention_dim"])),
            pooled_prompt_embeds=torch.randn(batch, int(config["pooled_projection_dim"])),
        )

    def truncated(self, pipe: Any, prompt: str, max_sequence_length: int) -> bool:
        rooms = [(t, t.model_max_length) for t in (pipe.tokenizer, pipe.tokenizer_2) if t is not None]
        if pipe.tokenizer_3 is not None:
            rooms.append((pipe.tokenizer_3, max_sequence_length))
        return all(len(tokenizer(prompt, truncation=False).input_ids) > room for tokenizer, room in rooms)

    def sigmas(self, pipe: Any, num_inference_steps: int, size: tuple[int, int]) -> Tensor:
        h, w = self.grid(pipe.transformer.config, size)
        config = pipe.scheduler.config
        return flow_sigmas(
            config, num_inference_steps, mu=linear_mu(config, h * w)
        )  # mu is read by a shift with the resolution

    def inputs(
        self, model: nn.Module, latents: Tensor, sigma: Tensor, cond: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        dtype = input_dtype(model)
        return {
            "hidden_states": latents.to(dtype),
            "encoder_hidden_states": cond.prompt_embeds.to(dtype),
            "pooled_projections": cond.pooled_prompt_embeds.to(dtype),
            "timestep": 1000.0 * sigma,
        }


FAMILY = SD3()
