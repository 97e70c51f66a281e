"""Finding objects and their colours in pictures: Mask2Former and CLIP as GenEval uses them, and the embedded world's own eye.

The reference runs Mask2Former (Swin-S, COCO instances) in mmdetection and CLIP ViT-L/14 in open_clip. Here both are models of
transformers; the scale of the pictures and the rules that turn outputs into detections are the reference's, the weights are those
published for transformers. Both work in float32 as there: detections stand and fall with thresholds on their scores.

Dimension letters: B pictures, Q queries, K classes, H and W pixels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from drmcli.config import local_or_hub
from drmcli.errors import InputError, MissingError
from drmcli.hub import explained
from drmcli.measure.geneval import COLORS, THRESHOLD, Detection
from drmcli.parts import quiet_libraries
from drmcli.tiny.world import SHAPES

RENAMED = {
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard",
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant",
    "diningtable": "dining table", "tvmonitor": "tv",
}  # fmt: skip
"""Detectors' names that GenEval's prompts spell in another way: COCO's own, and those of the label file that transformers'
conversion of 80-class Mask2Former reads (coco-detection-mmdet-id2label.json), which has Pascal VOC's words."""
SIZE = {"shortest_edge": 800, "longest_edge": 1333}
"""Scale of a picture for the detector, the test scale of the reference's mmdetection config; the published processors of
transformers shrink to 384 x 384 instead."""
AT_ONCE = 8
"""Pictures in one forward pass of the detector."""
MAX_DETECTIONS = 100
"""Detections of a picture, over all classes."""
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
GREY = (153, 153, 153)
"""What stands in for everything that is not the object when its colour is asked for."""


class Detector(Protocol):
    """Finds objects in pictures and tells their colours."""

    name: str
    labels: list[str]
    """Names of the classes that it knows."""

    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]: ...

    def colors(self, image: Image.Image, objects: list[Detection], label: str) -> list[str]: ...


def load_detector(ref: str, color_model: str, *, device: torch.device) -> Detector:
    """A name of `DETECTORS`, or a Mask2Former by folder or hub id with a CLIP for the colours.

    Raises MissingError where the models are not there, InputError for others.
    """
    return DETECTORS[ref]() if ref in DETECTORS else Mask2Former(ref, color_model, device=device)


def check_labels(detector: Detector, wanted: Sequence[str]) -> None:
    """Raises InputError where a prompt's class is none of the detector's: every such picture would count as wrong."""
    unknown = sorted(set(wanted) - set(detector.labels))
    if unknown:
        raise InputError(
            f"--detector {detector.name}: knows no {', '.join(unknown[:5])}",
            hint="use a detector of COCO's 80 classes, or `shapes` for the embedded world's prompts",
        )


class Mask2Former:
    """Instance segmentation by transformers' Mask2Former, colours by zero-shot CLIP."""

    def __init__(self, ref: str, color_model: str, *, device: torch.device, least: float = THRESHOLD):
        from transformers import AutoImageProcessor, CLIPModel, CLIPProcessor, Mask2FormerForUniversalSegmentation

        if importlib.util.find_spec("scipy") is None:  # transformers' Mask2Former imports it
            raise MissingError("--detector: Mask2Former needs scipy", hint="pip install 'drmcli[geneval]'")
        self.name, self.device, self.least = ref, device, least
        where = local_or_hub(ref, "--detector")
        with explained(ref, "--detector"), quiet_libraries():
            self.processor = AutoImageProcessor.from_pretrained(where)
            self.model = Mask2FormerForUniversalSegmentation.from_pretrained(
                where, use_safetensors=True, dtype=torch.float32
            )
        self.labels = [RENAMED.get(name, name) for _, name in sorted(self.model.config.id2label.items())]
        self.model.to(device).eval()
        where = local_or_hub(color_model, "--color-model")
        with explained(color_model, "--color-model"), quiet_libraries():
            self.clip_processor = CLIPProcessor.from_pretrained(where)
            self.clip = CLIPModel.from_pretrained(where, use_safetensors=True, dtype=torch.float32).to(device).eval()
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """What is surer than `least` of the 100 likeliest (query, class) pairs of each picture.

        The score of a pair is its class probability times the mean probability inside its mask.
        """
        found = []
        for start in range(0, len(images), AT_ONCE):
            some = [image.convert("RGB") for image in images[start : start + AT_ONCE]]
            inputs = self.processor(images=some, size=SIZE, return_tensors="pt")
            seen = inputs["pixel_mask"].bool()  # [B, H, W], False where a smaller picture of the batch is padded
            out = self.model(inputs["pixel_values"].to(self.device))
            for i, image in enumerate(some):
                inside = int(seen[i].any(1).sum()), int(seen[i].any(0).sum())
                found.append(
                    self._of_one(
                        out.class_queries_logits[i], out.masks_queries_logits[i], seen.shape[1:], inside, image.size
                    )
                )
        return found

    def _of_one(
        self, classes: Tensor, masks: Tensor, padded: Sequence[int], inside: tuple[int, int], size: tuple[int, int]
    ) -> list[Detection]:
        """classes [Q, K + 1] logits, the last of no object; masks [Q, h, w] logits of a padded picture [H, W] of which `inside` is
        the picture; size W, H before scaling."""
        chances = classes.softmax(-1)[:, :-1]  # [Q, K]
        top = chances.flatten().topk(min(MAX_DETECTIONS, chances.numel()))
        likely = top.values > self.least  # the mask's part is 1 at most: the others cannot get there
        pair, chance = top.indices[likely], top.values[likely]
        found = []
        for p, c in zip(pair.tolist(), chance.tolist()):
            query, label = divmod(p, chances.shape[1])
            whole = _scaled(masks[query], padded)[: inside[0], : inside[1]]
            whole = _scaled(whole, size[::-1])
            mask = whole > 0  # [H, W]
            if not mask.any():
                continue
            score = c * float(whole[mask].sigmoid().mean())
            if score > self.least:
                ys, xs = mask.any(1).nonzero()[:, 0].tolist(), mask.any(0).nonzero()[:, 0].tolist()
                box = float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)
                found.append(Detection(self.labels[label], score, box, mask.cpu().numpy()))
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
        inputs = self.clip_processor(images=cut, return_tensors="pt")["pixel_values"].to(self.device)
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


def _scaled(mask: Tensor, size: Sequence[int]) -> Tensor:
    """A map [h, w] at another size [H, W]."""
    return torch.nn.functional.interpolate(mask[None, None], size=tuple(size), mode="bilinear", align_corners=False)[
        0, 0
    ]


class ShapesDetector:
    """What the embedded world's judge sees in a picture: a shape of each colour that is there."""

    name = "shapes"

    def __init__(self) -> None:
        self.labels = list(SHAPES)

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


DETECTORS: dict[str, Callable[[], Detector]] = {"shapes": ShapesDetector}
"""Detectors that have names."""
