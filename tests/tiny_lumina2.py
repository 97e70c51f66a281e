"""A tiny Lumina 2 pipeline; its pipeline wants a VAE that makes pictures 8 times smaller."""

from __future__ import annotations

from typing import Any

import diffusers
from tiny_pipelines import Tiny, shaken, tokenizer
from tiny_sana import gemma


def build() -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=3, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 6, 6), axes_lens=(200, 64, 64), cap_feat_dim=24,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(4,) * 4, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False, layers_per_block=1,
        scaling_factor=0.4, shift_factor=0.1,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=shaken(transformer, "time_caption_embed.caption_embedder"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae, text_encoder=gemma(), tokenizer=tokenizer(2048),
    )  # fmt: skip


# The system prompt is 70 characters and more, and each is a token.
TINY = Tiny(build, call={"max_sequence_length": 180}, size=(48, 64), length=180)
