"""Step-wise Sampling in plain diffusers: a scheduler that drops into a flow-matching pipeline.

    pipe.scheduler = StepwiseScheduler.from_pipe(pipe, reward, prompt="...", beams=4, seed=0)
    pipe("...", generator=torch.Generator().manual_seed(0))

The pipeline keeps its guidance, its ControlNet and everything else; only the step from one sigma to the next becomes a
choice among candidates (DRM, arXiv 2605.25661, section 5). For one seed the picture is that of `drm sample --stepwise`.

Dimension letters as in `sampling`: I pictures, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from drmcli.calls import Models
from drmcli.errors import InputError
from drmcli.generator import Generator, PromptEmbeds
from drmcli.reward import RewardModel
from drmcli.sampling import Candidates, Search, take_step


class StepwiseScheduler(FlowMatchEulerDiscreteScheduler):
    """Keeps, at every step, the candidate that the reward model likes best. Make one with `from_pipe`."""

    models: Models
    search: Search
    seeds: list[int]
    candidates: list[Candidates]
    """What was scored in the last call of the pipeline."""

    @classmethod
    def from_pipe(
        cls,
        pipe: Any,
        reward: RewardModel,
        *,
        prompt: str | Sequence[str],
        beams: int = 4,
        seed: int | Sequence[int] = 0,
        num_images_per_prompt: int = 1,
        step_rule: str = "cps",
        noise_level: float = 0.9,
        max_sequence_length: int | None = None,
        **search: Any,
    ) -> StepwiseScheduler:
        """A scheduler for one call of the pipeline with these prompts.

        seed: one for all pictures, or one a picture; give the pipeline generators of the same seeds. max_sequence_length: what
        the pipeline is called with (None: the reward model's). A reward model on the pipeline's own base need not be in memory twice:
        see `RewardModel.borrow_weights`. Further fields of `Search` as keywords.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise InputError(f"seed: {len(seeds)} seeds for {len(prompts)} pictures", hint="give one, or one a picture")
        length = reward.config.max_sequence_length if max_sequence_length is None else max_sequence_length
        if not reward.family.steps_in_scheduler:
            raise InputError(
                f"StepwiseScheduler: {type(pipe).__name__} does not take flow-matching Euler steps on latents [C, H, W]",
                hint="use `drm sample --stepwise`",
            )
        encoder = Generator(
            pipe, reward.config.base_model, revision=None, max_sequence_length=length, family=reward.family
        )
        cond: PromptEmbeds = encoder.encode_prompts(prompts)
        scheduler = cls.from_config(pipe.scheduler.config)
        scheduler.search = Search(mode="stepwise", beams=beams, step_rule=step_rule, noise_level=noise_level, **search)
        device = cond.device
        scheduler.models = Models(None, reward, cond, cond, None, 1.0, scheduler.search.latents_at_once(), device)
        scheduler.seeds = seeds
        scheduler._begin()
        return scheduler

    def _begin(self) -> None:
        self._rngs: list[torch.Generator] | None = None
        self._state: Tensor | None = None
        self.candidates = []

    @wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)  # pipelines look for its parameter `sigmas`
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        if hasattr(self, "models"):
            self._begin()

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True, **_: Any
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """From `sample` [I, C, H, W] with the velocity `model_output` to the kept candidate at the next sigma.

        The state is kept in float32 between steps, whatever the pipeline's dtype.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        step = int(self.step_index)
        if self._rngs is None:
            self._rngs = [torch.Generator().manual_seed(seed) for seed in self.seeds]
            for rng in self._rngs:  # the pipeline's own initial noise is the first draw
                torch.randn(sample.shape[1:], generator=rng)
        x = sample.float() if self._state is None else self._state
        if len(x) != len(self.seeds):
            raise InputError(
                f"StepwiseScheduler: made for {len(self.seeds)} pictures, called with {len(x)}",
                hint="make one with the prompts, num_images_per_prompt and seeds of this call",
            )
        taken = take_step(
            self.models, self.search, x[:, None], model_output.float()[:, None], step, self.sigmas.cpu(), self._rngs
        )
        if taken.candidates is not None:
            self.candidates.append(taken.candidates)
        self._state = taken.x[:, 0]
        self._step_index += 1
        prev = self._state.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=prev) if return_dict else (prev,)
