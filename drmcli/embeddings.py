"""Conditionings of prompts, kept where memory is cheap."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from drmcli.generator import PromptEmbeds


class Embeddings:
    """What one or several models are told of a prompt: encoded when first asked for, the last `room` prompts kept on the CPU.

    An embedding of SD3 with T5 is 2.7 MB: kept on a GPU for every prompt that a run ever sees, they would fill it. Prompts are encoded
    one by one: in a batch the last bits depend on the company, and so on where a run had been taken up again.
    """

    def __init__(self, encode: Callable[[str], list[PromptEmbeds]], device: torch.device, room: int = 512):
        self.encode, self.device, self.room = encode, device, room
        self.kept: OrderedDict[str, list[PromptEmbeds]] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> list[PromptEmbeds]:
        """The conditioning [B] of each model, on the device."""
        found = {text: self._one(text) for text in dict.fromkeys(prompts)}
        return [stacked([found[text][m] for text in prompts]).to(self.device) for m in range(len(found[prompts[0]]))]

    def _one(self, text: str) -> list[PromptEmbeds]:
        if text not in self.kept:
            conds = self.encode(text)
            once = {id(cond): cond.to("cpu") for cond in conds}  # models of one base share theirs
            self.kept[text] = [once[id(cond)] for cond in conds]
        self.kept.move_to_end(text)
        if len(self.kept) > self.room:
            self.kept.popitem(last=False)
        return self.kept[text]


def stacked(each: Sequence[PromptEmbeds]) -> PromptEmbeds:
    """Conditionings of one prompt each as one."""
    return PromptEmbeds.cat(each)
