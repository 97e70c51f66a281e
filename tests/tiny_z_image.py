"""A tiny Z-Image pipeline: 72 image tokens, which the model pads to 96."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from tiny_pipelines import CHAT, Tiny, shaken, tokenizer, vae


def build() -> Any:
    text = transformers.Qwen3Config(
        vocab_size=99, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=12, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
        axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
    )  # fmt: skip
    reads = tokenizer()
    reads.chat_template = "user: " + CHAT  # no prompt is without tokens
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(),
        text_encoder=transformers.Qwen3Model(text), tokenizer=reads,
        transformer=shaken(transformer, "cap_embedder"),
    )  # fmt: skip


# The pipeline's scale counts from 0.
TINY = Tiny(
    build, call={"max_sequence_length": 40}, plain={"guidance_scale": 0.0}, guided={"guidance_scale": 2.0},
    size=(32, 36), length=40,
)  # fmt: skip
