"""A tiny random pipeline of each family, built from configs without a network; tests alone use them.

Zero-initialised weights are drawn at random and text weights are large, else a prompt or its guidance would change nothing and
tests of them would be empty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

CHAT = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)


def through_vae(pipe: Any, pixels: Tensor) -> Tensor:
    """Pictures encoded and decoded by the VAE alone."""
    return pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample


@dataclass
class Tiny:
    """How a family's tiny pipeline is made and called."""

    build: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline."""
    plain: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    """Arguments without guidance, and `scale` is what drm is told."""
    guided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 3.0})
    scales: tuple[float, float] = (1.0, 3.0)
    """What drm is told for `plain` and `guided`."""
    canonical: Callable[[Tensor, tuple[int, int]], Tensor] = lambda latents, size: latents
    """The pipeline's own latents as [B, C, H, W]."""
    state: Callable[[Tensor, tuple[int, int], float], Tensor] | None = None
    """What the pipeline hands its scheduler as the state, as one of a flow; None: `canonical`."""
    velocity: Callable[[Tensor, Tensor, float], Tensor] | None = None
    """What it hands its scheduler as the prediction, with that state, as a velocity; None: `canonical`."""
    size: tuple[int, int] = (32, 48)
    """Height and width in pixels."""
    length: int = 24
    """max_sequence_length."""
    through_vae: Callable[[Any, Tensor], Tensor] = through_vae


def tokenizer(length: int = 77) -> Any:
    """Characters as tokens."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *(chr(c) for c in range(32, 127))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        model_max_length=length,
    )  # fmt: skip
    fast.chat_template = CHAT
    return fast


def clip(width: int = 16, projected: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=width, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def t5(width: int = 24) -> Any:
    config = transformers.T5Config(vocab_size=99, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config)


def vae(channels: int = 4, **config: Any) -> Any:
    options = {"scaling_factor": 0.4, "shift_factor": 0.1} | config
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False, **options,
    )  # fmt: skip


def shaken(model: nn.Module, *loud: str) -> Any:
    """Weights that are zero drawn at random; those whose name begins with one of `loud` made 8 times larger."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.abs().max() > 0:
                p.normal_(0, 0.1)
            if name.startswith(loud or ("\0",)):
                p.mul_(8)
    return model


def flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae(), text_encoder=clip(), tokenizer=tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer(),
        transformer=shaken(transformer, "context_embedder"),
    )  # fmt: skip


def packed(latents: Tensor, size: tuple[int, int]) -> Tensor:
    """FLUX's own tokens as pictures of latents; size: H, W."""
    return diffusers.FluxPipeline._unpack_latents(latents, *size, vae_scale_factor=1)


def flux2_parts(guided: bool) -> dict[str, Any]:
    """Scheduler, VAE and transformer of FLUX.2; guided: is the guidance scale an input?"""
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guided,
    )  # fmt: skip
    made = diffusers.AutoencoderKLFlux2(
        latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    made.bn.running_mean.fill_(0.3)
    made.bn.running_var.fill_(2.0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return {"scheduler": scheduler, "vae": made, "transformer": shaken(transformer, "context_embedder")}


def klein() -> Any:
    """FLUX.2 klein base, not distilled. It hands out its latents decoded half-way, see `flux2_latents`."""
    config = transformers.Qwen3Config(
        vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=28, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8,
    )  # fmt: skip
    encoder = transformers.Qwen3ForCausalLM(config)
    return diffusers.Flux2KleinPipeline(text_encoder=encoder, tokenizer=tokenizer(), **flux2_parts(guided=False))


def flux2() -> Any:
    """FLUX.2 dev: Mistral 3, of which layers 10, 20 and 30 are read. Its long system message is three tokens here."""
    config = transformers.Mistral3Config(
        text_config={
            "model_type": "mistral", "vocab_size": 99, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 30,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
        },
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "head_dim": 8, "image_size": 16, "patch_size": 8,
        },
    )  # fmt: skip
    reads = tokenizer()
    reads.backend_tokenizer.normalizer = normalizers.Replace(SYSTEM_MESSAGE, "~~~")
    encoder = transformers.Mistral3ForConditionalGeneration(config)
    return diffusers.Flux2Pipeline(text_encoder=encoder, tokenizer=reads, **flux2_parts(guided=True))


def flux2_latents(latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens, or what klein returns: latents unfolded and with the VAE's statistics."""
    if latents.ndim == 3:
        return latents.transpose(1, 2).unflatten(2, size)
    return (torch.nn.functional.pixel_unshuffle(latents, 2) - 0.3) / (2.0 + 1e-4) ** 0.5


def unet(**config: Any) -> Any:
    made = diffusers.UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, **config,
    )  # fmt: skip
    return shaken(made, *(n for n, _ in made.named_parameters() if "attn2.to_v" in n or "attn2.to_out" in n))


PROCESS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def sdxl() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        scheduler=diffusers.EulerDiscreteScheduler(**PROCESS, timestep_spacing="leading"),
        vae=vae(shift_factor=None), text_encoder=clip(), tokenizer=tokenizer(), text_encoder_2=clip(projected=True),
        tokenizer_2=tokenizer(), unet=unet(
            cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
        ),
        add_watermarker=False,
    )  # fmt: skip


def sd(prediction_type: str) -> Any:
    return diffusers.StableDiffusionPipeline(
        scheduler=diffusers.DDIMScheduler(**PROCESS, clip_sample=False, prediction_type=prediction_type),
        vae=vae(shift_factor=None), text_encoder=clip(), tokenizer=tokenizer(), unet=unet(cross_attention_dim=16),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def euler_state(x: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """EulerDiscrete's state x_0 + k eps as one of a flow."""
    return x * (1 - sigma)


def ddim_state(x: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """DDIM's state of variance 1 as one of a flow."""
    return x * (sigma**2 + (1 - sigma) ** 2) ** 0.5


def from_noise(output: Tensor, state: Tensor, sigma: float) -> Tensor:
    """Predicted noise as a velocity, eps - x_0."""
    return output - (state - sigma * output) / (1 - sigma)


def from_v(output: Tensor, state: Tensor, sigma: float) -> Tensor:
    n = (sigma**2 + (1 - sigma) ** 2) ** 0.5
    alpha, s, x = (1 - sigma) / n, sigma / n, state / n
    return (s * x + alpha * output) - (alpha * x - s * output)


PIPELINES = {
    "flux": Tiny(flux, call={"max_sequence_length": 24}, canonical=packed),
    "flux2": Tiny(flux2, call={"max_sequence_length": 24}, canonical=flux2_latents),
    "flux2_klein": Tiny(klein, call={"max_sequence_length": 24}, canonical=flux2_latents),
    "sdxl": Tiny(
        sdxl, call={"original_size": (128, 192), "target_size": (128, 192)}, state=euler_state, velocity=from_noise
    ),
    "sd15": Tiny(partial(sd, "epsilon"), state=ddim_state, velocity=from_noise),
    "sd21": Tiny(partial(sd, "v_prediction"), state=ddim_state, velocity=from_v),
}
"""By name."""
