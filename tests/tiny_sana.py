"""A tiny Sana pipeline. DPM-Solver++ is of first order here: what drm's Euler steps are."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from tiny_pipelines import Tiny, shaken, tokenizer
from torch import Tensor


def gemma() -> Any:
    """Gemma 2 text, of Lumina 2 too."""
    config = transformers.Gemma2Config(
        vocab_size=99, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=12, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return transformers.Gemma2Model(config)


def build() -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=3,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=24,
        sample_size=4, timestep_scale=0.5,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        encoder_layers_per_block=(1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), ()), decoder_qkv_multiscales=((), (), (), ()), scaling_factor=0.4,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=1
    )
    return diffusers.SanaPipeline(
        tokenizer=tokenizer(2048), text_encoder=gemma(), vae=vae, scheduler=scheduler,
        transformer=shaken(transformer, "caption_norm"),
    )  # fmt: skip


def through_vae(pipe: Any, pixels: Tensor) -> Tensor:
    return pipe.vae.decode(pipe.vae.encode(pixels).latent).sample


TINY = Tiny(
    build, call={"max_sequence_length": 32, "use_resolution_binning": False}, size=(32, 64), length=32,
    through_vae=through_vae,
)  # fmt: skip
