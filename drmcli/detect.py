"""Finding objects and their colours in pictures: Mask2Former and CLIP as GenEval uses them, and the embedded world's own eye.

The reference runs Mask2Former (Swin-S, COCO instances) in mmdetection and CLIP ViT-L/14 in open_clip. Here both are models of
transformers; the rules that turn their outputs into detections are the reference's, the weights are those published for transformers.

Dimension letters: B pictures, Q queries, K classes, H and W pixels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from drmcli.config import local_or_hub
from drmcli.errors import MissingError
from drmcli.generator import quiet_libraries
from drmcli.geneval import COLORS, Detection
from drmcli.hub import explained

RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
"""COCO's names that GenEval's prompts spell in another way."""
MAX_DETECTIONS = 100
"""Detections of a picture, over all classes."""
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
GREY = (153, 153, 153)
"""What stands in for everything that is not the object when its colour is asked for."""


class Detector(Protocol):
    """Finds objects in pictures and tells their colours."""

    name: str

    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]: ...

    def colors(self, image: Image.Image, objects: list[Detection], label: str) -> list[str]: ...


def load_detector(ref: str, color_model: str, *, device: torch.device, dtype: torch.dtype) -> Detector:
    """`shapes`, or a Mask2Former by folder or hub id with a CLIP for the colours.

    Raises MissingError where the models are not there, InputError for others.
    """
    return ShapesDetector() if ref == "shapes" else Mask2Former(ref, color_model, device=device, dtype=dtype)


class Mask2Former:
    """Instance segmentation by transformers' Mask2Former, colours by zero-shot CLIP."""

    def __init__(self, ref: str, color_model: str, *, device: torch.device, dtype: torch.dtype):
        from transformers import AutoImageProcessor, CLIPModel, CLIPProcessor, Mask2FormerForUniversalSegmentation

        if importlib.util.find_spec("scipy") is None:  # transformers' Mask2Former imports it
            raise MissingError("--detector: Mask2Former needs scipy", hint="pip install 'drmcli[geneval]'")
        self.name, self.device = ref, device
        where = local_or_hub(ref, "--detector")
        with explained(ref, "--detector"), quiet_libraries():
            self.processor = AutoImageProcessor.from_pretrained(where)
            self.model = Mask2FormerForUniversalSegmentation.from_pretrained(where, use_safetensors=True, dtype=dtype)
        self.labels = [RENAMED.get(name, name) for _, name in sorted(self.model.config.id2label.items())]
        self.model.to(device).eval()
        where = local_or_hub(color_model, "--color-model")
        with explained(color_model, "--color-model"), quiet_libraries():
            self.clip_processor = CLIPProcessor.from_pretrained(where)
            self.clip = CLIPModel.from_pretrained(where, use_safetensors=True, dtype=dtype).to(device).eval()
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """The 100 surest (query, class) pairs of each picture, scored by class probability times mean mask probability."""
        inputs = self.processor(images=[i.convert("RGB") for i in images], return_tensors="pt")
        out = self.model(inputs["pixel_values"].to(self.device, self.model.dtype))
        classes, masks = out.class_queries_logits.float(), out.masks_queries_logits.float()
        return [self._of_one(c, m, image.size) for c, m, image in zip(classes, masks, images)]

    def _of_one(self, classes: Tensor, masks: Tensor, size: tuple[int, int]) -> list[Detection]:
        """classes [Q, K + 1] logits, the last of no object; masks [Q, h, w] logits; size W, H."""
        chances = classes.softmax(-1)[:, :-1]  # [Q, K]
        top = chances.flatten().topk(min(MAX_DETECTIONS, chances.numel()))
        query, label = top.indices // chances.shape[1], top.indices % chances.shape[1]
        whole = torch.nn.functional.interpolate(
            masks[query][None], size=size[::-1], mode="bilinear", align_corners=False
        )[0]
        inside = whole > 0  # [N, H, W]
        sure = (whole.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        scores = (top.values * sure).tolist()
        found = []
        for i, mask in enumerate(inside.cpu().numpy()):
            ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if len(ys):
                box = float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)
                found.append(Detection(self.labels[int(label[i])], scores[i], box, mask))
        return found

    @torch.no_grad()
    def colors(self, image: Image.Image, objects: list[Detection], label: str) -> list[str]:
        """The nearest of GenEval's ten colours for each object, cut out of the picture onto grey."""
        whole = image.convert("RGB")
        blank = Image.new("RGB", whole.size, GREY)
        cut = []
        for o in objects:
            shown = whole if o.mask is None else Image.composite(whole, blank, Image.fromarray(o.mask))
            left, top, right, bottom = o.box
            cut.append(shown.crop((round(left), round(top), round(right), round(bottom))))
        inputs = self.clip_processor(images=cut, return_tensors="pt")["pixel_values"].to(self.device, self.clip.dtype)
        seen = _unit(_embedding(self.clip.get_image_features(pixel_values=inputs)).float())
        return [COLORS[i] for i in (seen @ self._classifier(label).T).argmax(-1).tolist()]

    def _classifier(self, label: str) -> Tensor:
        """A unit vector a colour [10, D]: the mean over templates."""
        if label not in self._texts:
            texts = [t.format(color=c, label=label) for c in COLORS for t in TEMPLATES]
            inputs = self.clip_processor(text=texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
            each = _unit(_embedding(self.clip.get_text_features(**inputs)).float())
            self._texts[label] = _unit(each.unflatten(0, (len(COLORS), -1)).mean(1))
        return self._texts[label]


def _embedding(found: Any) -> Tensor:
    """The projected embedding, whichever of its two forms transformers returns."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


class ShapesDetector:
    """What the embedded world's judge sees in a picture: a shape of each colour that is there."""

    name = "shapes"

    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        from drmcli.tiny import judge, world

        pixels = np.stack([np.asarray(i.convert("RGB").resize((world.SIZE, world.SIZE))) for i in images])
        scale = [(i.width / world.SIZE, i.height / world.SIZE) for i in images]
        found = []
        for shapes, (x, y) in zip(judge.find(pixels), scale):
            corners = [(s.box[0] * x, s.box[1] * y, s.box[2] * x, s.box[3] * y) for s in shapes]
            found.append([Detection(s.shape, s.score, box, color=s.color) for s, box in zip(shapes, corners)])
        return found

    def colors(self, image: Image.Image, objects: list[Detection], label: str) -> list[str]:
        return [o.color or "" for o in objects]
