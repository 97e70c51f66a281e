"""Evaluation and the alarm, by numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from drmcli.evaluation import Evaluation, Judge, evaluate, mean_distance, reward_is_hacked

NOISE = np.linspace(-0.01, 0.01, 12)
PROMPTS = np.repeat(np.arange(6), 2)


def history(*points: tuple[float, float]) -> list[dict]:
    return [{"update": 10 * i, "reward": reward, "judge": judge} for i, (reward, judge) in enumerate(points)]


@pytest.mark.parametrize(
    ("points", "fooled"),
    [
        (((0.0, 0.5), (1.0, 0.7), (2.0, 0.3)), True),  # the reward rose, the judge lost all and more
        (((0.0, 0.5), (1.0, 0.7), (0.9, 0.3)), False),  # the reward fell as well
        (((0.0, 0.5), (1.0, 0.7), (2.0, 0.66)), False),  # a fifth of the gain is lost
        (((0.0, 0.5), (1.0, 0.7), (2.0, 0.64)), True),  # more than a quarter is
        (((0.0, 0.5), (1.0, 0.7), (2.0, 0.8)), False),  # the judge rose
        (((0.0, 0.5),), False),
    ],
)
def test_the_alarm(points: tuple, fooled: bool) -> None:
    rows = history(*points)
    best = max(judge for _, judge in points)
    found = reward_is_hacked(rows, points[-1][1] + NOISE, best - NOISE, PROMPTS)
    assert (found is not None) is fooled
    if fooled:
        assert "update 20" in found and "since update 10" in found


def test_the_alarm_waits_for_more_than_noise() -> None:
    rows = history((0.0, 0.5), (1.0, 0.7), (2.0, 0.6))
    wild = np.array([1, -1] * 3).repeat(2) * 0.5
    assert reward_is_hacked(rows, 0.6 + wild, 0.7 - wild, PROMPTS) is None
    assert (
        reward_is_hacked(rows, np.array([0.6]), np.array([0.7]), np.array([0])) is None
    )  # one prompt: no noise is known


def test_distances() -> None:
    """Two prompts of three pictures: at 0, 1, 3 and at 0, 2, 2 on a line."""
    at = np.array([[0.0, 1, 3], [0, 2, 2]])
    apart = np.abs(at[:, :, None] - at[:, None, :]).reshape(6, 3)
    assert mean_distance(apart, np.ones(6, dtype=bool)) == pytest.approx((2 + 4 / 3) / 2)
    assert mean_distance(apart, np.array([1, 1, 0, 1, 0, 0], dtype=bool)) == 1  # one pair is left
    assert mean_distance(apart, np.array([1, 0, 0, 0, 0, 1], dtype=bool)) is None
    judged = Evaluation(PROMPTS[:6], np.zeros(6), np.array([0.95, 0.92, 0.1, 0.2, 0.9, 0.99]), apart, [])
    assert judged.flawless(0.9) == (pytest.approx(4 / 6), pytest.approx((1 + 0) / 2))
    assert Evaluation(PROMPTS[:6], np.zeros(6), np.full(6, np.nan), apart, []).flawless(0.9) == (None, None)


def draw(texts: list[str], seeds: list[int]):
    values = [10.0 * int(text) + seed for text, seed in zip(texts, seeds)]
    latents = torch.tensor(values).reshape(-1, 1, 1, 1).expand(-1, 2, 2, 2)
    return latents, torch.tensor(values), [Image.new("RGB", (2, 2), (int(v), 0, 0)) for v in values]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_an_evaluation_and_all_know_the_whole(world: int) -> None:
    """Five prompts over 1, 2 and 3 processes; the surplus that makes the shares equal is in no figure."""
    prompts, nobody = [str(i) for i in range(5)], Judge("none", torch.device("cpu"), torch.float32)
    sent: list[list[torch.Tensor]] = [[] for _ in range(world)]
    for rank in range(world):  # first what each process would send, then what each is given
        evaluate(draw, nobody, prompts, 2, rank=rank, world=world, gather=lambda t, r=rank: sent[r].append(t) or t.repeat(world, *[1] *
        (t.ndim - 1)))  # fmt: skip
    for rank in range(world):
        parts = iter(zip(*sent))
        found = evaluate(draw, nobody, prompts, 2, rank=rank, world=world, gather=lambda _, p=parts: torch.cat(next(p)))
        assert found.reward.tolist() == [0, 1, 10, 11, 20, 21, 30, 31, 40, 41]
        assert found.prompt.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert [image.getpixel((0, 0))[0] for image in found.images] == found.reward.tolist()
        assert found.diversity == 1
        assert np.isnan(found.judge).all()


def test_one_prompt_with_one_picture_has_no_diversity() -> None:
    found = evaluate(draw, Judge("none", torch.device("cpu"), torch.float32), ["3"], 1)
    assert found.reward.tolist() == [30]
    assert found.diversity is None
