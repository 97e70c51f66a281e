"""A CLIP checkpoint of open_clip as transformers' CLIPModel.

open_clip (github.com/mlfoundations/open_clip, src/open_clip/transformer.py) keeps query, key and value of a block as one matrix, writes the
two projections as `x @ P`, and numbers its blocks `resblocks`. Sizes are read off the tensors; head widths cannot be, and are those of
its model_configs/ViT-H-14.json: 80 in the vision tower, 64 in the text tower (1024 wide, 16 heads).
"""

from __future__ import annotations

import math

from torch import Tensor
from transformers import CLIPConfig

from drmcli.scorers.weights import Weights

VISION_HEAD, TEXT_HEAD = 80, 64
"""Features an attention head."""
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""Names in a block, theirs to ours, of what is the same."""
NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}


def clip_config(weights: Weights, eos_token_id: int) -> CLIPConfig:
    """Sizes of a ViT-H-14 kind of model from the shapes of its weights. `eos_token_id`: of its tokenizer."""
    width, _, _, patch = weights["visual.conv1.weight"].shape
    positions = len(weights["visual.positional_embedding"]) - 1
    vocab, text_width = weights["token_embedding.weight"].shape
    vision_layers = weights.count("visual.transformer.resblocks.")
    text_layers = weights.count("transformer.resblocks.")
    projection = weights["visual.proj"].shape[1]
    vision = {
        "hidden_size": width,
        "intermediate_size": len(weights["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
        "num_hidden_layers": vision_layers,
        "num_attention_heads": max(1, width // VISION_HEAD),
        "image_size": patch * math.isqrt(positions),
        "patch_size": patch,
    }
    text = {
        "hidden_size": text_width,
        "intermediate_size": len(weights["transformer.resblocks.0.mlp.c_fc.bias"]),
        "num_hidden_layers": text_layers,
        "num_attention_heads": max(1, text_width // TEXT_HEAD),
        "max_position_embeddings": len(weights["positional_embedding"]),
        "vocab_size": vocab,
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": eos_token_id,
    }
    common = {"hidden_act": "gelu", "projection_dim": projection}
    return CLIPConfig(text_config=text | common, vision_config=vision | common, projection_dim=projection)


def clip_state(weights: Weights, config: CLIPConfig) -> dict[str, Tensor]:
    """The same weights under transformers' names. Raises InputError for one that is missing or left over."""
    state = {
        "logit_scale": weights["logit_scale"].reshape(()),
        "vision_model.embeddings.class_embedding": weights["visual.class_embedding"],
        "vision_model.embeddings.position_embedding.weight": weights["visual.positional_embedding"],
        "vision_model.embeddings.patch_embedding.weight": weights["visual.conv1.weight"],
        "visual_projection.weight": weights["visual.proj"].T,
        "text_model.embeddings.token_embedding.weight": weights["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": weights["positional_embedding"],
        "text_projection.weight": weights["text_projection"].T,
    }
    for theirs, ours in NORMS.items():
        state |= {f"{ours}.{kind}": weights[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    towers = (
        ("visual.transformer", "vision_model", config.vision_config.num_hidden_layers),
        ("transformer", "text_model", config.text_config.num_hidden_layers),
    )
    for theirs, ours, layers in towers:
        for i in range(layers):
            state |= _block(weights, f"{theirs}.resblocks.{i}.", f"{ours}.encoder.layers.{i}.")
    weights.refuse_unused("attn_mask")
    return state


def _block(weights: Weights, theirs: str, ours: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        fused = weights[f"{theirs}attn.in_proj_{kind}"]
        state |= {f"{ours}self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", fused.chunk(3))}
        state |= {f"{ours}{b}.{kind}": weights[f"{theirs}{a}.{kind}"] for a, b in BLOCK.items()}
    return state
