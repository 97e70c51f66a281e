"""FLUX.2, dev and klein: Flux2Pipeline and Flux2KleinPipeline, a language model's inner layers as text, double blocks and then single ones.

The canonical latents are the transformer's own: the VAE's, 2 x 2 pixels folded into channels and normalised by its batch statistics. dev is
distilled for guidance, the scale an input of the model. klein is guided by a second pass with an empty prompt, unless its
model_index.json says that it was distilled for few steps. The shift depends on the resolution and on the number of steps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

from drmcli.families.base import Conditioning, Family, flow_sigmas, input_dtype


class Flux2(Family):
    """Conditioning: `prompt_embeds` [B, L, 3 D], three layers side by side; always padded to one length, and the padding is read."""

    name = "flux2"
    vae_values = ("batch_norm_eps",)
    denoiser_class = Flux2Transformer2DModel
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "attn.to_qkv_mlp_proj",
    )  # fmt: skip
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    text_outputs = ("ff_context", "attn.to_add_out")
    steps_in_scheduler = False
    second_pass = "take klein base, with --guidance-scale above 1"
    default_guidance = 4.0
    folds = 2
    pipeline_facts = ("is_distilled",)

    def depth(self, config: dict[str, Any]) -> int:
        return int(config["num_layers"]) + int(config["num_single_layers"])

    def patch(self, config: dict[str, Any]) -> int:
        return 1

    def image_size(self, config: dict[str, Any], factor: int) -> int:
        return 64 * factor

    def latents(self, config: dict[str, Any]) -> str:
        return "FLUX.2"

    def encode_prompts(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> Conditioning:
        device = pipe.text_encoder.device
        embeds, _ = pipe.encode_prompt(prompts, device=device, max_sequence_length=max_sequence_length)
        return Conditioning(prompt_embeds=embeds)

    def blank(self, config: dict[str, Any], batch: int, tokens: int) -> Conditioning:
        return Conditioning(prompt_embeds=torch.randn(batch, tokens, int(config["joint_attention_dim"])))

    def truncated(self, pipe: Any, prompt: str, max_sequence_length: int) -> bool:
        tokenizer = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)  # dev's is a processor
        if hasattr(pipe, "system_message"):  # of dev
            said = {"system": pipe.system_message, "user": prompt}
            chat = [{"role": who, "content": [{"type": "text", "text": text}]} for who, text in said.items()]
            text = pipe.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
        else:
            chat = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        return len(tokenizer(text, truncation=False).input_ids) > max_sequence_length

    def encode_images(self, pipe: Any, pixels: Tensor) -> Tensor:
        vae = pipe.vae
        folded = F.pixel_unshuffle(vae.encode(pixels).latent_dist.mode().float(), 2)
        mean, std = _statistics(vae)
        return (folded - mean) / std

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        vae = pipe.vae
        mean, std = _statistics(vae)
        return vae.decode(F.pixel_shuffle(latents * std + mean, 2).to(vae.dtype)).sample.float()

    def sigmas(self, pipe: Any, num_inference_steps: int, size: tuple[int, int]) -> Tensor:
        return flow_sigmas(
            pipe.scheduler.config, num_inference_steps, even=True, mu=shift(size[0] * size[1], num_inference_steps)
        )

    def takes_guidance(self, config: dict[str, Any]) -> bool:
        return bool(config["guidance_embeds"])

    def guides(self, config: dict[str, Any], scale: float) -> bool:
        return scale > 1 and not config["guidance_embeds"] and not config.get("is_distilled")

    def inputs(
        self, model: nn.Module, latents: Tensor, sigma: Tensor, cond: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        dtype, device = input_dtype(model), latents.device
        batch, _, h, w = latents.shape
        scale = None
        if self.takes_guidance(model.config):  # type: ignore[arg-type]
            scale = torch.full_like(sigma, self.default_guidance if guidance is None else guidance)
        zero = torch.tensor([0])
        image = torch.cartesian_prod(zero, torch.arange(h), torch.arange(w), zero)
        places = torch.arange(cond.prompt_embeds.shape[1])
        text = torch.cartesian_prod(zero, zero, zero, places)
        return {
            "hidden_states": latents.flatten(2).transpose(1, 2).to(dtype),
            "encoder_hidden_states": cond.prompt_embeds.to(dtype),
            "timestep": sigma,
            "guidance": scale,
            "img_ids": image.to(device).expand(batch, -1, -1),
            "txt_ids": text.to(device).expand(batch, -1, -1),
        }

    def velocity(self, output: Any, latents: Tensor, sigma: Tensor) -> Tensor:
        return output[0].float().transpose(1, 2).unflatten(2, (latents.shape[2], latents.shape[3]))

    def tokens(self, output: Any, inputs: dict[str, Any], grid: tuple[int, int]) -> Tensor:
        return output[1] if isinstance(output, tuple) else output[:, -grid[0] * grid[1] :]

    def unread(self, model: nn.Module) -> list[nn.Parameter]:
        found = super().unread(model)
        if not len(model.single_transformer_blocks):  # type: ignore[arg-type]
            found += list(model.single_stream_modulation.parameters())  # type: ignore[union-attr, operator]
        return found


def shift(tokens: int, num_inference_steps: int) -> float:
    """mu of the time shift: a line in the number of steps between one in the tokens at 10 steps and another at 200."""
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    return many + (many - few) / 190 * (num_inference_steps - 200)


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation [1, C, 1, 1] of folded latents."""
    mean, variance = vae.bn.running_mean.float(), vae.bn.running_var.float()
    return mean.view(1, -1, 1, 1), (variance + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)


FAMILY = Flux2()
