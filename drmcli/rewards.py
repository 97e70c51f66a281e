"""What a policy is trained on: reward models of noisy states and scorers of pictures, weighted and summed.

A term is a DRM folder or hub id, or any scorer of `drmcli.scorers` (a name, or `module:function`). Reward models judge a state where
it is; scorers need a picture, which is the one that the policy predicts from the state.

Dimension letters: B states, C, H, W latent channels, height, width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from drmcli.errors import RunError
from drmcli.flow import renoise
from drmcli.generator import PromptEmbeds
from drmcli.reward import RewardModel
from drmcli.scorers import NAMES, load_scorer

RENOISE = 0.1
"""How far above its own noise level a state is noised again for each draw of a noise ensemble."""


@dataclass
class Term:
    """One summand; exactly one of `model` and `scorer` is there."""

    ref: str
    weight: float
    model: RewardModel | None = None
    scorer: Callable[[list[Image.Image], list[str]], Any] | None = None


def parse_term(text: str) -> tuple[str, float]:
    """`REF=WEIGHT` as its parts; the weight is 1 where none is given."""
    ref, mark, weight = text.rpartition("=")
    try:
        return (ref, float(weight)) if mark else (text, 1.0)
    except ValueError:
        return text, 1.0


class Rewards:
    """A weighted sum of terms, less `spread_penalty` times their disagreement, cut at `ceiling`."""

    def __init__(
        self,
        refs: Sequence[tuple[str, float]],
        *,
        device: torch.device,
        dtype: torch.dtype,
        attention: str = "sdpa",
        draws: int = 1,
        spread_penalty: float = 0.0,
        ceiling: float | None = None,
        seed: int = 0,
    ):
        self.draws, self.spread_penalty, self.ceiling = draws, spread_penalty, ceiling
        self.terms = [
            load_term(ref, weight, device, dtype, attention, "--add-reward" if i else "--reward")
            for i, (ref, weight) in enumerate(refs)
        ]
        self.models = [t.model for t in self.terms if t.model is not None]
        self.rng = torch.Generator().manual_seed(seed)
        """Of the noise ensemble."""

    @property
    def needs_pictures(self) -> bool:
        return any(term.scorer is not None for term in self.terms)

    def encode(self, texts: list[str], own: PromptEmbeds, ref: str) -> list[PromptEmbeds]:
        """Each model's conditioning of the prompts; a generator's `own` for the models that were cut from it (`ref`)."""
        return [own if m.config.base_model == ref else m.generator().encode_prompts(texts) for m in self.models]

    def __call__(
        self,
        latents: Tensor,
        sigma: float,
        conds: list[PromptEmbeds],
        texts: list[str],
        pictures: Callable[[], list[Image.Image]],
    ) -> Tensor:
        """Rewards [B], float32, of states [B, C, H, W] at a noise level.

        conds: one a model. pictures: draws the pictures that scorers see; called once, and only if there is a scorer. Raises RunError
        when a reward is not finite.
        """
        total = torch.zeros(len(latents), device=latents.device)
        opinions, waiting = [], iter(zip(self.models, conds))
        images = pictures() if self.needs_pictures else []
        for term in self.terms:
            if term.scorer is not None:
                values = torch.as_tensor(term.scorer(images, texts), dtype=torch.float32, device=latents.device)
                if values.shape != (len(latents),):
                    raise RunError(
                        f"--add-reward {term.ref}: {list(values.shape)} scores for {len(latents)} pictures",
                        hint="return one number a picture",
                    )
            else:
                drawn = torch.stack(self._drawn(*next(waiting), latents, sigma))  # [draws, B]
                opinions.append(drawn)
                values = drawn.mean(0)
            total = total + term.weight * values
        if self.spread_penalty:
            total = total - self.spread_penalty * torch.cat(opinions).std(0, unbiased=False)
        return total if self.ceiling is None else total.clamp(max=self.ceiling)

    def _drawn(self, model: RewardModel, cond: PromptEmbeds, x: Tensor, sigma: float) -> list[Tensor]:
        """Scores [B] of the state itself, or of several states a little noisier."""
        if self.draws == 1:
            return [model.score(x, sigma, cond)]
        higher = min(sigma + RENOISE, (1 + sigma) / 2)
        noise = torch.randn((self.draws, *x.shape), generator=self.rng).to(x.device)
        return [model.score(renoise(x, sigma, higher, z), higher, cond) for z in noise]


def load_term(
    ref: str, weight: float, device: torch.device, dtype: torch.dtype, attention: str, flag: str = "--reward"
) -> Term:
    """A term by its name. A name of a scorer or `module:function` is one; all else is a reward model."""
    if is_scorer(ref):
        return Term(ref, weight, scorer=load_scorer(ref, device=device, dtype=dtype, flag=flag))
    return Term(
        ref, weight, RewardModel.from_pretrained(ref, device=device, dtype=dtype, attention=attention, flag=flag)
    )


def is_scorer(ref: str) -> bool:
    """Is this a scorer's name, NAME=FOLDER, or a callable `module:function`, and no folder?"""
    name = ref.partition("=")[0]
    return not Path(ref).exists() and (name in NAMES or (":" in ref and "/" not in ref))
