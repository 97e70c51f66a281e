"""FLUX.1, dev and schnell: FluxPipeline, CLIP's pooled text and T5, double blocks and then single ones.

dev is distilled for guidance: the scale is an input of the model. schnell takes none. A second pass with a negative prompt
(`true_cfg_scale` in the pipeline) comes on top where it is asked for, and both passes are told the same guidance scale. The transformer
wants tokens of 2 x 2 latent pixels; the canonical latents are the unpacked ones.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from drmcli.families.base import Conditioning, Family, flow_sigmas, input_dtype, linear_mu, pack, unpack


class Flux(Family):
    """Conditioning: `prompt_embeds` [B, L, D] of T5 (no mask: its padding is read), `pooled_prompt_embeds` [B, P] of CLIP."""

    name = "flux"
    denoiser_class = FluxTransformer2DModel
    text = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    optional = ("image_encoder", "feature_extractor")
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    text_outputs = ("ff_context", "attn.to_add_out")
    steps_in_scheduler = False
    default_guidance = 3.5
    second_pass = "raise --true-cfg-scale above 1"
    true_cfg_scale = 1.0
    """Of the second pass; 1 is none."""

    def depth(self, config: dict[str, Any]) -> int:
        return int(config["num_layers"]) + int(config["num_single_layers"])

    def channels(self, config: dict[str, Any]) -> int:
        return int(config["in_channels"]) // 4

    def patch(self, config: dict[str, Any]) -> int:
        return 2

    def image_size(self, config: dict[str, Any], factor: int) -> int:
        return 128 * factor

    def latents(self, config: dict[str, Any]) -> str:
        return "FLUX.1"

    def encode_prompts(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> Conditioning:
        embeds, pooled, _ = pipe.encode_prompt(
            prompts, None, device=pipe.text_encoder.device, max_sequence_length=max_sequence_length
        )
        return Conditioning(prompt_embeds=embeds, pooled_prompt_embeds=pooled)

    def blank(self, config: dict[str, Any], batch: int, tokens: int) -> Conditioning:
        return Conditioning(
            prompt_embeds=torch.randn(batch, tokens, int(config["joint_attention_dim"])),
            pooled_prompt_embeds=torch.randn(batch, int(config["pooled_projection_dim"])),
        )

    def truncated(self, pipe: Any, prompt: str, max_sequence_length: int) -> bool:
        return len(pipe.tokenizer_2(prompt, truncation=False).input_ids) > max_sequence_length

    def sigmas(self, pipe: Any, num_inference_steps: int, size: tuple[int, int]) -> Tensor:
        config = pipe.scheduler.config
        return flow_sigmas(config, num_inference_steps, even=True, mu=linear_mu(config, size[0] * size[1] // 4))

    def takes_guidance(self, config: dict[str, Any]) -> bool:
        return bool(config["guidance_embeds"])

    def with_true_cfg(self, scale: float) -> Flux:
        made = copy(self)
        made.true_cfg_scale = scale
        return made

    def guides(self, config: dict[str, Any], scale: float) -> bool:
        return self.true_cfg_scale > 1

    def guide(self, with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
        return super().guide(with_prompt, without, self.true_cfg_scale)

    def inputs(
        self, model: nn.Module, latents: Tensor, sigma: Tensor, cond: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        dtype, device = input_dtype(model), latents.device
        h, w = latents.shape[2] // 2, latents.shape[3] // 2
        rows, columns = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        scale = None
        if self.takes_guidance(model.config):  # type: ignore[arg-type]
            scale = torch.full_like(sigma, self.default_guidance if guidance is None else guidance)
        return {
            "hidden_states": pack(latents).to(dtype),
            "encoder_hidden_states": cond.prompt_embeds.to(dtype),
            "pooled_projections": cond.pooled_prompt_embeds.to(dtype),
            "timestep": sigma,
            "guidance": scale,
            "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(dtype),
            "txt_ids": torch.zeros(cond.prompt_embeds.shape[1], 3, device=device, dtype=dtype),
        }

    def velocity(self, output: Any, latents: Tensor, sigma: Tensor) -> Tensor:
        return unpack(output[0].float(), (latents.shape[2], latents.shape[3]))


FAMILY = Flux()
