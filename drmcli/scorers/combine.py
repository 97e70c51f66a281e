"""Several scorers as one: weighted and summed, or so combined that one scorer's blind spot does not decide.

Scorers of noisy states judge a state where it is; scorers of pictures need a picture, which is the one that the generator predicts from
the state. This is the one place that asks which of the two a scorer is.

Dimension letters: B states, R scorers, M candidates that are compared, C, H, W latent channels, height, width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from drmcli.flow import renoise
from drmcli.generator import Generator, PromptEmbeds
from drmcli.kernels import PLAIN, Kernels
from drmcli.reward import RewardModel
from drmcli.scorers import Scorer, StateScorer, load_scorer
from drmcli.scorers.drm import RewardScorer

RENOISE = 0.1
"""How far above its own sigma a state is noised again for each draw of a noise ensemble."""


@dataclass
class Term:
    """One scorer and how much it counts."""

    scorer: Scorer
    weight: float


def _agreement(opinions: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [I, 1] of all opinions [I, M, R], and what each scorer says of a candidate beyond its own mean [I, M, R].

    Scores of reward models mean something only by their differences for one prompt, so scorers are compared by those.
    """
    return opinions.mean((1, 2))[:, None], opinions - opinions.mean(1, keepdim=True)


def least(opinions: Tensor) -> Tensor:
    """[I, M, R] -> [I, M]: what the scorer says that likes a candidate least, relative to its own mean over the candidates."""
    level, apart = _agreement(opinions)
    return level + apart.amin(-1)


def mean_less_spread(opinions: Tensor) -> Tensor:
    """[I, M, R] -> [I, M]: the mean less the standard deviation over scorers, each relative to its own mean."""
    level, apart = _agreement(opinions)
    return level + apart.mean(-1) - apart.std(-1, unbiased=False)


COMBINE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda opinions: opinions.sum(-1),
    "mean": lambda opinions: opinions.mean(-1),
    "min": least,
    "mean-std": mean_less_spread,
}
"""Weighted opinions [I, M, R] of a picture's candidates to one score [I, M] each."""


@dataclass
class Told:
    """What several scorers are told of B prompts."""

    texts: list[str]
    conds: list[PromptEmbeds]
    """One a state scorer, in their order."""

    def __getitem__(self, index: Tensor) -> Told:
        return Told([self.texts[i] for i in index.tolist()], [cond[index] for cond in self.conds])


@dataclass
class Combined:
    """Several scorers as a reward of a search."""

    terms: list[Term]
    decode: Callable[[Tensor], list[Image.Image]]
    """Clean latents [B, C, H, W] to pictures."""

    @property
    def pictures(self) -> bool:
        """Does any of them look at pictures?"""
        return any(not isinstance(term.scorer, StateScorer) for term in self.terms)

    def encode(self, prompts: Sequence[str], own: Callable[[StateScorer], PromptEmbeds | None]) -> Told:
        """own: the generator's encoding where a scorer shares it, else None."""
        states = [term.scorer for term in self.terms if isinstance(term.scorer, StateScorer)]
        return Told(list(prompts), [found if (found := own(s)) is not None else s.encode(prompts) for s in states])

    def score(self, latents: Tensor, sigma: float | Tensor, cond: Told, *, clean: Tensor | None = None) -> Tensor:
        """Weighted opinions [B, R] of latents [B, C, H, W], of which `clean` are the clean latents that they point to."""
        images = self.decode(latents if clean is None else clean) if self.pictures else []
        found, conds = [], iter(cond.conds)
        for term in self.terms:
            if isinstance(term.scorer, StateScorer):
                values = term.scorer.score(latents, sigma, next(conds))
            else:
                values = term.scorer.score_images(images, cond.texts).to(latents.device)
            found.append(term.weight * values)
        return torch.stack(found, -1)


class Rewards:
    """A weighted sum of terms, less `spread_penalty` times their disagreement, cut at `ceiling`.

    beside: a loaded generator, whose weights reward models on its own base use too.
    """

    def __init__(
        self,
        refs: Sequence[tuple[str, float]],
        *,
        device: torch.device,
        dtype: torch.dtype,
        kernels: Kernels = PLAIN,
        draws: int = 1,
        spread_penalty: float = 0.0,
        ceiling: float | None = None,
        seed: int = 0,
        beside: Generator | None = None,
    ):
        self.draws, self.spread_penalty, self.ceiling = draws, spread_penalty, ceiling
        options = {"device": device, "dtype": dtype, "kernels": kernels, "beside": beside}
        self.terms = [
            Term(load_scorer(ref, flag="--add-reward" if i else "--reward", **options), weight)  # type: ignore[arg-type]
            for i, (ref, weight) in enumerate(refs)
        ]
        self.states = [t.scorer for t in self.terms if isinstance(t.scorer, StateScorer)]
        self.seed = seed
        """Of the noise ensemble. Its noise is one for all states: candidates are compared under the same, in any batch and process."""

    @property
    def needs_pictures(self) -> bool:
        return len(self.states) < len(self.terms)

    @property
    def models(self) -> list[RewardModel]:
        return [scorer.model for scorer in self.states if isinstance(scorer, RewardScorer)]

    def check_latents(self, generator: Generator) -> None:
        """Raises InputError for a reward model of other latents than the generator's."""
        for i, term in enumerate(self.terms):
            if isinstance(term.scorer, RewardScorer):
                term.scorer.check_latents(generator, "--add-reward" if i else "--reward")

    def share_encoders(self, generator: Generator) -> list[str]:
        """Ask each model through the encoders it was trained with, a generator's where they are the same. Returns warnings."""
        facts = [(s.name, s.share_encoders(generator)) for s in self.states if isinstance(s, RewardScorer)]
        return [f"{name}: {fact}" for name, fact in facts if fact]

    def encode(self, texts: list[str], own: PromptEmbeds, generator: Generator) -> list[PromptEmbeds]:
        """Each state scorer's conditioning of the prompts; the `own` of a generator for the models that share its encoders."""
        return [
            own if isinstance(s, RewardScorer) and s.model.generator() is generator else s.encode(texts)
            for s in self.states
        ]

    def __call__(
        self,
        latents: Tensor,
        sigma: float,
        conds: list[PromptEmbeds],
        texts: list[str],
        pictures: Callable[[], list[Image.Image]],
    ) -> Tensor:
        """Rewards [B], float32, of states [B, C, H, W] at a sigma.

        conds: one a state scorer. pictures: draws the pictures that scorers of pictures see; called once, and only if there is one.
        """
        total = torch.zeros(len(latents), device=latents.device)
        opinions, waiting = [], iter(conds)
        images = pictures() if self.needs_pictures else []
        for term in self.terms:
            if isinstance(term.scorer, StateScorer):
                drawn = torch.stack(self._drawn(term.scorer, next(waiting), latents, sigma))  # [draws, B]
                opinions.append(drawn)
                values = drawn.mean(0)
            else:
                values = term.scorer.score_images(images, texts).to(latents.device)
            total = total + term.weight * values
        if self.spread_penalty:
            total = total - self.spread_penalty * torch.cat(opinions).std(0, unbiased=False)
        return total if self.ceiling is None else total.clamp(max=self.ceiling)

    def _drawn(self, scorer: StateScorer, cond: PromptEmbeds, x: Tensor, sigma: float) -> list[Tensor]:
        """Scores [B] of the state itself, or of several states a little noisier."""
        if self.draws == 1:
            return [scorer.score(x, sigma, cond)]
        higher = min(sigma + RENOISE, (1 + sigma) / 2)
        rng = torch.Generator().manual_seed(self.seed)
        noise = torch.randn((self.draws, *x.shape[1:]), generator=rng).to(x.device)
        return [scorer.score(renoise(x, sigma, higher, z.expand_as(x)), higher, cond) for z in noise]
