"""Z-Image and Z-Image-Turbo: ZImagePipeline, Qwen3 text, refiners of text and image and then one stream with the image first.

Time runs from 0 at noise to 1, and the prediction is x_0 - eps. Pictures and prompts go in as lists without padding; the model pads
both to multiples of 32 tokens itself. Refiners are part of the embeddings: blocks are counted over `layers` alone.

The pipeline's guidance_scale w counts from 0: c + w (c - u). Here as in all families 1 is without guidance, so that drm's scale is
the pipeline's + 1 (its default 5 is 6 here). Turbo is distilled and wants none.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from drmcli.families.base import Conditioning, Family, Zeros, flow_sigmas, input_dtype, linear_mu

PATCH = "2-1"
"""The pipeline's patches: 2 x 2 latent pixels of 1 frame."""


class ZImage(Family):
    """Conditioning: `prompt_embeds` [B, T, D] of Qwen3's last layer but one, `mask` [B, T]."""

    name = "z_image"
    denoiser_class = ZImageTransformer2DModel
    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    block_lists = ("layers",)
    ends = ("all_final_layer",)

    def depth(self, config: dict[str, Any]) -> int:
        return int(config["n_layers"])

    def patch(self, config: dict[str, Any]) -> int:
        return 2

    def image_size(self, config: dict[str, Any], factor: int) -> int:
        return 128 * factor

    def largest_side(self, config: dict[str, Any], factor: int) -> int:
        return 2 * factor * min(int(n) for n in config["axes_lens"][1:])

    def latents(self, config: dict[str, Any]) -> str:
        return "FLUX.1"

    def width(self, model: nn.Module) -> int:
        return int(model.dim)  # type: ignore[arg-type]

    def encode_prompts(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> Conditioning:
        # A copy: the pipeline writes its chat template into the list that it is given.
        rows, _ = pipe.encode_prompt(
            list(prompts), pipe.text_encoder.device, do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )  # fmt: skip
        mask = pad_sequence([row.new_ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        return Conditioning(prompt_embeds=pad_sequence(rows, batch_first=True), mask=mask)

    def blank(self, config: dict[str, Any], batch: int, tokens: int) -> Conditioning:
        embeds = torch.randn(batch, tokens, int(config["cap_feat_dim"]))
        return Conditioning(prompt_embeds=embeds, mask=torch.ones(batch, tokens, dtype=torch.bool))

    def truncated(self, pipe: Any, prompt: str, max_sequence_length: int) -> bool:
        chat = [{"role": "user", "content": prompt}]
        text = pipe.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return super().truncated(pipe, text, max_sequence_length)

    def sigmas(self, pipe: Any, num_inference_steps: int, size: tuple[int, int]) -> Tensor:
        config = pipe.scheduler.config
        return flow_sigmas(config, num_inference_steps, even=True, mu=linear_mu(config, size[0] * size[1] // 4))

    def inputs(
        self, model: nn.Module, latents: Tensor, sigma: Tensor, cond: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        dtype = input_dtype(model)
        lengths = cond.mask.sum(1).tolist()
        return {
            "x": list(latents.to(dtype).unsqueeze(2)),
            "t": 1.0 - sigma,
            "cap_feats": [row[:n] for row, n in zip(cond.prompt_embeds.to(dtype), lengths)],
        }

    def velocity(self, output: Any, latents: Tensor, sigma: Tensor) -> Tensor:
        return -torch.stack(output[0]).squeeze(2).float()

    def stand_ins(self, model: nn.Module) -> None:
        layers: Any = model.all_final_layer
        layers[PATCH] = Zeros(layers[PATCH].linear.out_features)

    def tokens(self, output: Any, inputs: dict[str, Any], grid: tuple[int, int]) -> Tensor:
        return output[:, : grid[0] * grid[1]]


FAMILY = ZImage()
