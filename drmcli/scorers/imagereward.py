"""ImageReward (Xu et al. 2023, arXiv 2304.05977): a BLIP that reads the prompt while looking at the picture, and an MLP on the result.

After THUDM/ImageReward: ImageReward/ImageReward.py and models/BLIP/. BLIP is Li et al. 2022, arXiv 2201.12086: a ViT-L/16 at 224 pixels and
a BERT with cross-attention in every layer. Here both are transformers' own modules under other names.

Dimension letters: B pictures, L = 35 prompt tokens, N picture tokens, D width of BERT.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from drmcli.scorers.pictures import cropped
from drmcli.scorers.weights import Source, Weights, filled, linear_layers, read

REPO = "THUDM/ImageReward"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw reward over the authors' data; the published score is in these units."""
TOKENS = 35
"""A prompt is cut or padded to this many."""
HEAD = 64
"""Features an attention head of the vision transformer: 16 heads of a ViT-L, 12 of a ViT-B."""
RENAMED = (
    ("blocks.", "encoder.layers."),
    ("attn.proj.", "self_attn.projection."),
    ("attn.qkv.", "self_attn.qkv."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)
"""Vision transformer, theirs to ours; as in transformers' own conversion of BLIP checkpoints."""
WHOLE = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
TEXT_KEYS = (
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "vocab_size",
    "pad_token_id",
)
"""What med_config.json says of the text encoder. Its encoder_width is overruled by the vision transformer's, as the reference does."""


def imagereward(
    source: Source, device: torch.device, dtype: torch.dtype
) -> Callable[[list[Image.Image], list[str]], Tensor]:
    """ImageReward v1.0: (MLP - mean) / std, about -2.3 to 2."""
    weights = read(source.file(REPO, "ImageReward.pt"), source)
    sizes = json.loads(source.file(REPO, "med_config.json").read_text(encoding="utf-8"))
    visual, textual = weights.below("blip.visual_encoder."), weights.below("blip.text_encoder.")
    vision_config = _vision_config(visual)
    vision = filled(BlipVisionModel, vision_config, _vision_state(visual), source, device, dtype)
    textual.pop("embeddings.position_ids", None)  # a counter that older releases saved
    text_config = BlipTextConfig(
        **{key: sizes[key] for key in TEXT_KEYS if key in sizes},
        encoder_hidden_size=vision_config.hidden_size,
        is_decoder=True,  # builds the cross-attention; attention stays bidirectional unless the call asks otherwise
        bos_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
    )
    reader = filled(_TextModel, text_config, textual, source, device, dtype)
    layers = linear_layers(weights.below("mlp.layers."), text_config.hidden_size, device)
    if layers[-1].out_features != 1:
        raise weights.refused("the last layer gives more than one number")
    tokenizer = BertTokenizer.from_pretrained(source.part("google-bert/bert-base-uncased", "tokenizer_config.json"))

    def score(images: list[Image.Image], prompts: list[str]) -> Tensor:
        pixels = cropped(images, vision_config.image_size, nearest=True).to(device, dtype)
        seen = vision(pixel_values=pixels).last_hidden_state  # [B, N, width]
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").to(
            device
        )
        read_out = reader(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen
        ).last_hidden_state  # [B, L, D]
        x = read_out[:, 0].float()
        for layer in layers:
            x = layer(x)
        return (x[:, 0] - MEAN) / STD

    return score


class _TextModel(BlipTextModel):
    """BLIP's text encoder without the pooler, which these weights do not have."""

    def __init__(self, config: Any):
        super().__init__(config, add_pooling_layer=False)


def _vision_config(weights: Weights) -> BlipVisionConfig:
    """Sizes from shapes. The norms' epsilon is 1e-6 in BLIP's vit.py, where transformers' default is 1e-5."""
    width, _, _, patch = weights["patch_embed.proj.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["blocks.0.mlp.fc1.bias"]),
        num_hidden_layers=weights.count("blocks."),
        num_attention_heads=max(1, width // HEAD),
        image_size=patch * math.isqrt(weights["pos_embed"].shape[1] - 1),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def _vision_state(weights: Weights) -> dict[str, Tensor]:
    state = {}
    for key, value in weights.items():
        name = WHOLE.get(key, key)
        if name == key:
            for theirs, ours in RENAMED:
                name = name.replace(theirs, ours)
        state[name] = value
    return state
