"""What a search will ask of its models, counted from its settings alone: for budgets, for `--dry-run` and for plans of memory.

`strides` walks down a schedule as `sampling.descend` does, without latents; what counts is read off its steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from drmcli.calls import Calls
from drmcli.flow import schedule
from drmcli.sampling import Search, nearest_step, refining


@dataclass(frozen=True)
class Stride:
    """One step of a picture's trajectories."""

    states: int
    """Before it."""
    known: bool
    """Their velocities are there from the step before."""
    candidates: int
    """Their children."""
    scored: bool
    """Are the candidates scored?"""
    looked_at: bool
    """Does scoring them, or a trace, take a velocity of each, to see the clean latents that it points to?"""
    left: int
    """Candidates that live on."""


def strides(
    search: Search, sigmas: Tensor, *, first: int = 0, states: int | None = None, trace: bool
) -> Iterator[Stride]:
    """The steps of a search with a reward, from step `first` of a schedule [n + 1] on.

    states: those of a picture before it; None is what the search begins with.
    """
    levels = sigmas.tolist()
    n, known = search.begun() if states is None else states, False
    for step, (sigma, sigma_next) in enumerate(zip(levels[first:], levels[first + 1 :]), first):
        candidates = n * search.children(step, sigma, sigma_next, n)
        count = search.survivors(sigma_next, search.standing(step, n), candidates)
        scored = count is not None
        looked_at = scored and sigma_next > 0 and search.looks(trace)
        left = candidates if count is None else count
        yield Stride(n, known, candidates, scored, looked_at, left)
        n, known = left, looked_at


def expected_calls(search: Search, sigmas: Tensor, *, trace: bool = False, guided: bool | None = None) -> Calls:
    """Calls of the models for one picture, without blocks that are shared.

    sigmas: the schedule [n + 1]. A reward is assumed to be there. guided: does the guidance scale take a second pass (None: any
    other than 1 does)? See `Family.guides`.
    """
    calls = Calls()
    each = 1 + (search.guidance_scale > 1 if guided is None else guided)

    def down(way: list[Stride]) -> Stride:
        """Counts a way down and returns its last step."""
        for s in way:
            calls.generator += each * ((0 if s.known else s.states) + (s.candidates if s.looked_at else 0))
            calls.reward += s.candidates if s.scored else 0
        return way[-1]

    last = down(list(strides(search, sigmas, trace=trace)))
    judged = last.scored and last.left == 1 and search.score_at == "noisy"
    calls.reward += 0 if judged else last.left
    if search.refine:
        start = nearest_step(sigmas, search.refine_sigma)
        for _ in range(search.refine):
            down(list(strides(refining(search), sigmas, first=start, states=1, trace=trace)))
            calls.reward += 1
    return calls


def widest(search: Search, *, trace: bool) -> tuple[int, int]:
    """The most states of a picture that a velocity is asked for at once, and that are scored at once."""
    steps = list(strides(search, schedule(search.num_inference_steps), trace=trace))
    drawn = max(max(s.states, s.left, s.candidates if s.looked_at else 0) for s in steps)
    return drawn, max([steps[-1].left, *(s.candidates for s in steps if s.scored)])
