"""Stable Diffusion 1.5, 2.1 and XL: U-Nets that predict noise, or v, of a variance-preserving process.

At the border they are a rectified flow. With the process's own alpha and s, alpha^2 + s^2 = 1, a state x_t = alpha x_0 + s eps is
x = x_t / (alpha + s) at sigma = s / (alpha + s); with n = sqrt(sigma^2 + (1 - sigma)^2), x_t = x / n. The velocity eps - x_0 is
(eps - x) / (1 - sigma). In this frame the Euler step is DDIM's (eta 0), and EulerDiscrete's. A sigma between two of the process's 1000
times is told as a time between them.

Two things differ from a flow: the first sigma is below 1, so that the first noise is scaled (`first_noise`); and a pipeline whose DDIM
does not end at clean latents (set_alpha_to_one: false) is taken to the end here.

A reward model keeps the blocks on the way down and the middle one; the way up goes, and with it about half of the weights. Blocks
give pictures of falling size: all taps are averaged to the grid of the middle block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn

from drmcli.families.base import Conditioning, Family, input_dtype

PROCESS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
"""Of Stable Diffusion, where a scheduler's config does not say."""
FACTOR = 8
"""Pixels on a latent pixel's side: what SDXL is told of a picture's size is in pixels."""


class UNet(Family):
    """Conditioning: `prompt_embeds` [B, 77, D]; of SDXL `pooled_prompt_embeds` [B, P] too."""

    name = "sdxl"
    denoiser = "unet"
    denoiser_class = UNet2DConditionModel
    text = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    optional = ("safety_checker", "feature_extractor", "image_encoder")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    scheduler_facts = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type")
    shares_blocks = False
    steps_in_scheduler = False

    def __init__(self, facts: dict[str, Any] | None = None):
        facts = {k: v for k, v in (facts or {}).items() if k in self.scheduler_facts}
        with torch.device("cpu"):  # a memory plan makes its models on the meta device
            process = DDIMScheduler.from_config(PROCESS | facts)
        self.predicts_noise = process.config.prediction_type == "epsilon"
        self.table = _sigma(process.alphas_cumprod.double())
        """[times] the sigma of each time, rising."""

    def bound(self, scheduler: dict[str, Any]) -> UNet:
        return UNet(scheduler)

    # --- sizes ------------------------------------------------------------------------------------------------------------------

    def depth(self, config: dict[str, Any]) -> int:
        return len(config["down_block_types"]) + 1

    def patch(self, config: dict[str, Any]) -> int:
        return 2 ** (len(config["down_block_types"]) - 1)

    def latents(self, config: dict[str, Any]) -> str:
        return "SDXL" if config.get("addition_embed_type") == "text_time" else "Stable Diffusion 1 and 2"

    def widths(self, model: Any, taps: Sequence[int]) -> list[int]:
        every = [*model.config.block_out_channels, model.config.block_out_channels[-1]]
        return [every[tap] for tap in taps]

    # --- pipeline ---------------------------------------------------------------------------------------------------------------

    def encode_prompts(self, pipe: Any, prompts: list[str], max_sequence_length: int) -> Conditioning:
        found = pipe.encode_prompt(
            prompts, device=pipe.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if len(found) == 2:
            return Conditioning(prompt_embeds=found[0])
        return Conditioning(prompt_embeds=found[0], pooled_prompt_embeds=found[2])

    def encode_negative(self, pipe: Any, prompt: str, max_sequence_length: int) -> Conditioning:
        made = self.encode_prompts(pipe, [prompt], max_sequence_length)
        if not prompt and pipe.config.get("force_zeros_for_empty_prompt", False):
            return Conditioning({name: torch.zeros_like(tensor) for name, tensor in made.tensors.items()})
        return made

    def text_tokens(self, max_sequence_length: int, tokenizer_length: int) -> int:
        return tokenizer_length

    def truncated(self, pipe: Any, prompt: str, max_sequence_length: int) -> bool:
        return len(pipe.tokenizer(prompt, truncation=False).input_ids) > pipe.tokenizer.model_max_length

    def blank(self, config: dict[str, Any], batch: int, tokens: int) -> Conditioning:
        made = Conditioning(prompt_embeds=torch.randn(batch, tokens, int(config["cross_attention_dim"])))
        if config.get("addition_embed_type") == "text_time":
            width = int(config["projection_class_embeddings_input_dim"]) - 6 * int(config["addition_time_embed_dim"])
            made.tensors["pooled_prompt_embeds"] = torch.randn(batch, width)
        return made

    def sigmas(self, pipe: Any, num_inference_steps: int, size: tuple[int, int]) -> Tensor:
        """EulerDiscrete's own levels where the pipeline has that scheduler, else those of DDIM with the same config."""
        if isinstance(pipe.scheduler, EulerDiscreteScheduler):
            euler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
            euler.set_timesteps(num_inference_steps)
            return (euler.sigmas / (1 + euler.sigmas)).float()
        ddim = DDIMScheduler.from_config(pipe.scheduler.config)
        ddim.set_timesteps(num_inference_steps)
        return torch.cat([self.table[ddim.timesteps.long()], self.table.new_zeros(1)]).float()

    def first_noise(self, pipe: Any, sigma: float) -> float:
        n = (sigma**2 + (1 - sigma) ** 2) ** 0.5
        spacing = pipe.scheduler.config.get("timestep_spacing")
        if isinstance(pipe.scheduler, EulerDiscreteScheduler) and spacing in ("linspace", "trailing"):
            return sigma  # this scheduler begins at s eps, the others at noise of variance 1
        return n

    # --- velocity ---------------------------------------------------------------------------------------------------------------

    def times(self, sigma: Tensor) -> Tensor:
        """Times [B] of the process for sigmas; whole ones where a sigma is a time's own."""
        table = self.table.to(sigma.device)
        s = sigma.double().clamp(float(table[0]), float(table[-1]))
        after = torch.searchsorted(table, s).clamp(1, len(table) - 1)
        low, high = table[after - 1], table[after]
        time = (after - 1) + (s - low) / (high - low)
        near = time.round()
        return torch.where((time - near).abs() < 1e-3, near, time).float()

    def inputs(
        self, model: nn.Module, latents: Tensor, sigma: Tensor, cond: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        dtype = input_dtype(model)
        made: dict[str, Any] = {
            "sample": (latents / _norm(sigma)).to(dtype),
            "timestep": self.times(sigma),
            "encoder_hidden_states": cond.prompt_embeds.to(dtype),
        }
        if "pooled_prompt_embeds" in cond.tensors:
            height, width = FACTOR * latents.shape[2], FACTOR * latents.shape[3]
            ids = torch.tensor([height, width, 0, 0, height, width], device=latents.device, dtype=dtype)
            pooled = cond.pooled_prompt_embeds.to(dtype)
            made["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids.expand(len(latents), 6)}
        return made

    def velocity(self, output: Any, latents: Tensor, sigma: Tensor) -> Tensor:
        predicted, s = output[0].float(), sigma[:, None, None, None]
        if self.predicts_noise:
            return (predicted - latents) / (1 - s).clamp(min=1e-4)
        n = _norm(sigma)
        alpha, noise, state = (1 - s) / n, s / n, latents / n
        return (noise * state + alpha * predicted) - (alpha * state - noise * predicted)

    # --- features ---------------------------------------------------------------------------------------------------------------

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        middle = model.mid_block
        return [*model.down_blocks, *([] if middle is None else [middle])]  # type: ignore[misc, list-item, union-attr]

    def cut(self, model: Any, keep: int) -> None:
        if keep <= len(model.down_blocks):
            model.mid_block = None
        model.down_blocks = model.down_blocks[:keep]
        model.up_blocks = nn.ModuleList()
        model.conv_norm_out, model.conv_out = None, nn.Identity()

    def tokens(self, output: Any, inputs: dict[str, Any], grid: tuple[int, int]) -> Tensor:
        picture = (
            output[0] if isinstance(output, tuple) else output
        )  # a block on the way down returns its residuals too
        return F.adaptive_avg_pool2d(picture, grid).flatten(2).transpose(1, 2)


def _sigma(alphas_cumprod: Tensor) -> Tensor:
    alpha, s = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    return s / (alpha + s)


def _norm(sigma: Tensor) -> Tensor:
    """n [B, 1, 1, 1]."""
    return (sigma.square() + (1 - sigma).square()).sqrt()[:, None, None, None]


FAMILY = UNet()
