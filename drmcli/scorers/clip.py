"""Scorers that are a CLIP (Radford et al. 2021, arXiv 2103.00020): PickScore, CLIP itself, HPSv2, and an MLP on CLIP's picture vector.

Dimension letters: B pictures, P width of CLIP's common space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from drmcli.scorers import openclip
from drmcli.scorers.pictures import cropped, padded
from drmcli.scorers.weights import Source, filled, linear_layers, published, read

Score = Callable[[list[Image.Image], list[str]], Tensor]
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VIT_L = "openai/clip-vit-large-patch14"


@dataclass
class Clip:
    """A loaded CLIP: unit vectors of pictures and of prompts."""

    model: Any
    tokenizer: Any

    @property
    def image_size(self) -> int:
        return self.model.config.vision_config.image_size

    def images(self, pixels: Tensor) -> Tensor:
        """Unit vectors [B, P], float32, of normalised pictures [B, 3, S, S]."""
        return picture_vectors(self.model, pixels)

    def texts(self, prompts: list[str]) -> Tensor:
        """Unit vectors [B, P], float32. Each prompt is encoded once; a long one is cut to what the encoder reads (77 tokens)."""
        each = list(dict.fromkeys(prompts))
        room = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(each, padding="max_length", truncation=True, max_length=room, return_tensors="pt")
        pooled = self.model.text_model(input_ids=tokens.input_ids.to(self.model.device)).pooler_output
        vectors = F.normalize(self.model.text_projection(pooled).float(), dim=-1)
        return vectors[[each.index(prompt) for prompt in prompts]]

    def cosine(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Cosine [B] of each picture with its prompt, in [-1, 1]."""
        return (self.images(pixels) * self.texts(prompts)).sum(-1)


def picture_vectors(model: Any, pixels: Tensor) -> Tensor:
    """Unit vectors [B, P], float32, of normalised pictures [B, 3, S, S]."""
    weight = model.visual_projection.weight
    pooled = model.vision_model(pixel_values=pixels.to(weight.device, weight.dtype)).pooler_output
    return F.normalize(model.visual_projection(pooled).float(), dim=-1)


def pickscore(source: Source, device: torch.device, dtype: torch.dtype) -> Score:
    """PickScore (Kirstain et al. 2023, arXiv 2305.01569): e^logit_scale * cosine, about 17 to 25.

    As in the example of the model's page: a CLIP ViT-H/14 with the processor of LAION's.
    """
    return _scaled(source, "yuvalkirstain/PickScore_v1", device, dtype)


def clip(source: Source, device: torch.device, dtype: torch.dtype) -> Score:
    """CLIP ViT-H/14 of LAION: e^logit_scale * cosine, which is 100 * cosine for the published weights.

    The ViT-H/14 is the one in the comparisons of HPSv2 and HPSv3. CLIPScore (Hessel et al. 2021) is 2.5 max(cosine, 0): the same order.
    """
    return _scaled(source, VIT_H, device, dtype)


def _scaled(source: Source, repo: str, device: torch.device, dtype: torch.dtype) -> Score:
    model = published(CLIPModel, source.part(repo, "config.json", own=True), source, device, dtype)
    found = Clip(model, _tokenizer(source))
    scale = model.logit_scale.float().exp()

    def score(images: list[Image.Image], prompts: list[str]) -> Tensor:
        return scale * found.cosine(cropped(images, found.image_size), prompts)

    return score


def hpsv2(source: Source, device: torch.device, dtype: torch.dtype) -> Score:
    """Human Preference Score v2.0 (Wu et al. 2023, arXiv 2306.09341): the cosine, about 0.2 to 0.35; papers print 100 times it."""
    return _hps(source, "HPS_v2_compressed.pt", device, dtype)


def hpsv2_1(source: Source, device: torch.device, dtype: torch.dtype) -> Score:
    """Human Preference Score v2.1: as v2.0, trained on more of its data."""
    return _hps(source, "HPS_v2.1_compressed.pt", device, dtype)


def _hps(source: Source, name: str, device: torch.device, dtype: torch.dtype) -> Score:
    """After tgxs002/HPSv2 hpsv2/img_score.py: `state_dict` of an open_clip ViT-H-14, pictures padded and not cropped."""
    weights = read(source.file("xswu/HPSv2", name), source)
    tokenizer = _tokenizer(source)
    config = openclip.clip_config(weights, tokenizer.eos_token_id)
    model = filled(CLIPModel, config, openclip.clip_state(weights, config), source, device, dtype)
    found = Clip(model, tokenizer)

    def score(images: list[Image.Image], prompts: list[str]) -> Tensor:
        return found.cosine(padded(images, found.image_size), prompts)

    return score


def aesthetic(source: Source, device: torch.device, dtype: torch.dtype) -> Score:
    """LAION's improved aesthetic predictor, sac+logos+ava1 (github.com/christophschuhmann/improved-aesthetic-predictor): about 1 to 10.

    Linear layers without activations on the unit picture vector of OpenAI's CLIP ViT-L/14. The prompt plays no part.
    """
    weights = read(source.file("camenduru/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth"), source)
    where = source.part(VIT_L, "config.json")
    model = published(CLIPVisionModelWithProjection, where, source, device, dtype)
    layers = linear_layers(weights.below("layers."), model.config.projection_dim, device)
    if layers[-1].out_features != 1:
        raise weights.refused("the last layer gives more than one number")

    def score(images: list[Image.Image], prompts: list[str]) -> Tensor:
        x = picture_vectors(model, cropped(images, model.config.image_size, nearest=True))
        for layer in layers:
            x = layer(x)
        return x[:, 0]

    return score


def _tokenizer(source: Source) -> Any:
    """CLIP's tokenizer; that of LAION's ViT-H/14 where the weights come without one. All CLIPs share one vocabulary."""
    return CLIPTokenizer.from_pretrained(source.part(VIT_H, "tokenizer_config.json"))
