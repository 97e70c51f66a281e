"""Qwen-Image: QwenImagePipeline, Qwen2.5-VL text with a mask, joint blocks of text and image, a VAE of videos.

The transformer wants tokens of 2 x 2 latent pixels; the canonical latents are the unpacked ones. Guidance is a second pass whose
result is brought back to the length that the prompt's velocity has, token by token.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from drmcli.families.base import Conditioning, Family, flow_sigmas, input_dtype, linear_mu, pack, unpack


class QwenImage(Family):
    """Conditioning: `prompt_embeds` [B, T, D] of Qwen2.5-VL behind the template, `mask` [B, T]."""

    name = "qwen_image"
    vae_values = ("latents_mean", "latents_std")
    denoiser_class = QwenImageTransformer2DModel
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    text_outputs = ("txt_mlp", "attn.to_add_out")
    steps_in_scheduler = False

    def channels(self, config: dict[str, Any]) -> int:
        return int(config["in_channels"]) // 4

    def patch(self, config: dict[str, Any]) -> int:
        return 2

    def vae_factor(self, config: dict[str, Any]) -> int:
        return 2 ** len(config["temperal_downsample"])

    def image_size(self, config: dict[str, Any], factor: int) -> int:
        return 128 * factor

    def encode_prompts(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> Conditioning:
        embeds, mask = pipe.encode_prompt(
            prompts, device=pipe.text_encoder.device, max_sequence_length=max_sequence_length
        )
        mask = embeds.new_ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        return Conditioning(prompt_embeds=embeds, mask=mask)

    def blank(self, config: dict[str, Any], batch: int, tokens: int) -> Conditioning:
        embeds = torch.randn(batch, tokens, int(config["joint_attention_dim"]))
        return Conditioning(prompt_embeds=embeds, mask=torch.ones(batch, tokens, dtype=torch.bool))

    def truncated(self, pipe: Any, prompt: str, max_sequence_length: int) -> bool:
        room = min(max_sequence_length, pipe.tokenizer_max_length) + pipe.prompt_template_encode_start_idx
        return super().truncated(pipe, pipe.prompt_template_encode.format(prompt), room)

    def encode_images(self, pipe: Any, pixels: Tensor) -> Tensor:
        mean, std = self._spread(pipe.vae, pixels.device)
        return (pipe.vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0].float() - mean) / std

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        mean, std = self._spread(pipe.vae, latents.device)
        z = (latents * std + mean).to(pipe.vae.dtype)
        return pipe.vae.decode(z.unsqueeze(2)).sample[:, :, 0].float()

    def _spread(self, vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's channels, [1, C, 1, 1]."""
        mean, std = (torch.tensor(v, device=device) for v in (vae.config.latents_mean, vae.config.latents_std))
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def sigmas(self, pipe: Any, num_inference_steps: int, size: tuple[int, int]) -> Tensor:
        config = pipe.scheduler.config
        return flow_sigmas(config, num_inference_steps, even=True, mu=linear_mu(config, size[0] * size[1] // 4))

    def guide(self, with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
        size = with_prompt.shape[2], with_prompt.shape[3]
        c, u = pack(with_prompt), pack(without)
        guided = u + scale * (c - u)
        return unpack(guided * (c.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)), size)

    def inputs(
        self, model: nn.Module, latents: Tensor, sigma: Tensor, cond: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        dtype = input_dtype(model)
        h, w = latents.shape[2] // 2, latents.shape[3] // 2
        return {
            "hidden_states": pack(latents).to(dtype),
            "encoder_hidden_states": cond.prompt_embeds.to(dtype),
            # As the pipeline does: attention without a mask has the faster kernels.
            "encoder_hidden_states_mask": None if bool(cond.mask.all()) else cond.mask,
            "timestep": sigma,
            "img_shapes": [[(1, h, w)]] * len(latents),
        }

    def velocity(self, output: Any, latents: Tensor, sigma: Tensor) -> Tensor:
        return unpack(output[0].float(), (latents.shape[2], latents.shape[3]))


FAMILY = QwenImage()
