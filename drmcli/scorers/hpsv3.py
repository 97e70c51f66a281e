"""Human Preference Score v3 (Ma et al. 2025, arXiv 2508.03789): Qwen2-VL-7B looks at a picture and its prompt, a small head scores.

After MizzenAI/HPSv3 (MIT): hpsv3/inference.py, train.py, model/qwen2vl_trainer.py, config/HPSv3_7B.yaml. The head sits on the
hidden state of one added token, `<|Reward|>`, and gives a mean and a deviation; the score is the mean. What is not obvious:

- A picture becomes about 256 tokens: its area is brought to 256 * 28 * 28 pixels, each side a multiple of 28.
- Positions count 0, 1, 2, ... through picture and text alike. Qwen2-VL would give a picture positions in two dimensions, but the
  reference hands over embeddings without the picture's grid, and so the weights were trained on plain ones.
- Attention looks back only, so what follows `<|Reward|>` in the reference's text ("END", the answer's opening) changes nothing,
  and is left out.

Dimension letters: B pictures, L tokens, N picture tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AddedToken, AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

from drmcli.errors import RunError
from drmcli.scorers.pictures import resized
from drmcli.scorers.weights import Source, Weights, filled, linear_layers, read

REPO, BASE = "MizzenAI/HPSv3", "Qwen/Qwen2-VL-7B-Instruct"
REWARD = "<|Reward|>"
PICTURE_TOKENS = 256
"""A picture's area in merged patches."""
LONGEST = 200
"""Qwen2-VL refuses a picture whose sides differ by more than this factor."""

# Qwen2-VL's chat, up to the picture and after it. The instruction's wording and spaces are part of what the weights were trained on.
OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
INSTRUCTION = (
    "<|vision_end|>\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall "
    "score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being the best. \n\n"
    "**Visual Quality:**  \nEvaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal body structures "
    "or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to interpret, with no "
    "blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements (e.g., hair, "
    "clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, atmosphere, "
    "depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult material. If "
    "such content is present, the image quality and satisfaction score should be the lowest possible. \n\n"
    "**Text Alignment:**  \nAssess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align with the textual "
    "description. The subject should match the description in terms of number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the image adheres to "
    "this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image logically fit the "
    "scenario described in the prompt. The environment should support and enhance the subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, accessories, expressions, "
    "actions) are faithfully represented in the image. Minor deviations may be acceptable, but critical attributes should be "
    "preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image. The generated "
    "content should not introduce elements that conflict with or distort the original description.\n"
    "Textual prompt - {prompt}\n\n\n\nPlease provide the overall ratings of this image: " + REWARD
)


def hpsv3(source: Source, device: torch.device, dtype: torch.dtype) -> Callable[[list[Image.Image], list[str]], Tensor]:
    """HPSv3: the mean of the score, about -5 to 15. Needs about 17 GB in bf16."""
    weights = read(source.file(REPO, "HPSv3.safetensors"), source)
    base = source.part(BASE, "tokenizer_config.json")
    config, tokenizer = Qwen2VLConfig.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    head = weights.below("rm_head.")
    state = _qwen_state(weights)
    rows = len(state["language_model.embed_tokens.weight"])
    config.text_config.vocab_size = rows  # that of the base, and the added token
    tokenizer.add_tokens([AddedToken(REWARD, special=True, normalized=False)], special_tokens=True)
    if tokenizer.convert_tokens_to_ids(REWARD) >= rows:
        raise weights.refused(f"there is no embedding of {REWARD} among {rows}")
    layers = linear_layers(head, config.text_config.hidden_size, device)
    model = filled(Qwen2VLModel, config, state, source, device, dtype)
    opening = tokenizer(OPENING, add_special_tokens=False).input_ids

    def score(images: list[Image.Image], prompts: list[str]) -> Tensor:
        seen = _seen(model, images)
        asked = {
            text: tokenizer(INSTRUCTION.format(prompt=text), add_special_tokens=False).input_ids
            for text in set(prompts)
        }
        hidden = _last_hidden(model, opening, seen, [asked[text] for text in prompts]).float()  # [B, D]
        for i, layer in enumerate(layers):
            hidden = layer(hidden.relu() if i else hidden)
        return hidden[:, 0]

    return score


def _qwen_state(weights: Weights) -> dict[str, Tensor]:
    """Names as transformers has had them since 4.52, where `model.` holds both towers; before, it was the text tower alone."""
    joined = any(key.startswith("model.language_model.") for key in weights)
    state = Weights((), weights.source)
    for key, value in weights.items():
        if not key.startswith(("rm_head.", "lm_head.")):
            name = key.removeprefix("model.")
            state[name if joined or name.startswith("visual.") else f"language_model.{name}"] = value
    return state


def _seen(model: Any, images: list[Image.Image]) -> list[Tensor]:
    """Embeddings [N, D] of each picture, all through the vision tower at once."""
    config = model.config.vision_config
    patches, grids = zip(*(_patches(image, config) for image in images))
    pixels = torch.cat(patches).to(model.device, model.dtype)
    grid = torch.tensor(grids, device=model.device)
    found = model.visual(pixels, grid_thw=grid)
    found = getattr(found, "pooler_output", found)  # a bare tensor in early releases
    return list(found.split([h * w // config.spatial_merge_size**2 for _, h, w in grids]))


def _patches(image: Image.Image, config: Any) -> tuple[Tensor, tuple[int, int, int]]:
    """A picture as rows of patch pixels [patches, 3 * time * patch^2] and its grid of 1 x rows x columns.

    Patches of one merged token stand together; a still picture is repeated over the patch's depth in time.
    """
    patch, merge, time = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    width, height = _fitted(*image.size, patch * merge)
    rows, columns = height // patch, width // patch
    x = resized(image, width, height).view(3, rows // merge, merge, patch, columns // merge, merge, patch)
    x = x.permute(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, time, -1, -1)
    return x.reshape(rows * columns, -1), (1, rows, columns)


def _fitted(width: int, height: int, unit: int) -> tuple[int, int]:
    """Sides that are multiples of `unit`, of about the same ratio, and about PICTURE_TOKENS units of area (qwen-vl-utils' rule)."""
    if max(width, height) > LONGEST * min(width, height):
        raise RunError(
            f"hpsv3: a picture of {width} x {height} pixels", hint=f"sides may differ by a factor of {LONGEST}"
        )
    area = PICTURE_TOKENS * unit * unit
    nearest = [max(unit, round(side / unit) * unit) for side in (width, height)]
    if math.prod(nearest) == area:
        return nearest[0], nearest[1]
    cut = math.floor if math.prod(nearest) > area else math.ceil
    scale = math.sqrt(area / (width * height))
    fitted = [max(unit, cut(side * scale / unit) * unit) for side in (width, height)]
    return fitted[0], fitted[1]


def _last_hidden(model: Any, opening: list[int], seen: list[Tensor], asked: list[list[int]]) -> Tensor:
    """Hidden state [B, D] of each row's last token, which is the reward token.

    Rows are filled up on the right, where causal attention does not see it: a row's result does not depend on the others.
    """
    spans = [(len(opening), len(opening) + len(picture)) for picture in seen]
    lengths = [end + len(text) for (_, end), text in zip(spans, asked)]
    ids = torch.zeros(len(seen), max(lengths), dtype=torch.long)
    for row, (_, end), text in zip(ids, spans, asked):
        row[: len(opening)] = torch.tensor(opening)
        row[end : end + len(text)] = torch.tensor(text)
    embeds = model.language_model.embed_tokens(ids.to(model.device))  # [B, L, D]
    for row, (start, end), picture in zip(embeds, spans, seen):
        row[start:end] = picture.to(row.dtype)
    positions = torch.arange(ids.shape[1], device=model.device).expand(3, len(ids), -1)
    found = model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
    return found[torch.arange(len(ids)), torch.tensor(lengths) - 1]
