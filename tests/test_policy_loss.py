"""Losses of a policy, by numbers worked out by hand: one latent of one value a state."""

from __future__ import annotations

import math

import pytest
import torch

from drmcli.flow import Step
from drmcli.policy_loss import clipped, direct, nft, optimality


def one(*values: float) -> torch.Tensor:
    """[S, 1, 1, 1]."""
    return torch.tensor(values).reshape(-1, 1, 1, 1)


def test_clipped_by_hand() -> None:
    """Means 0.1 now and 0 then, std 1, actions 1 and 0: log ratios are (1 - 0.81) / 2 = 0.095 and -0.005; the first is clipped at 1.05."""
    found = clipped(
        one(1.0, 0.0).reshape(1, 2, 1, 1, 1), torch.tensor([[2.0, -1.0]]), Step(one(0.1), one(1.0)), one(0.0),
        Step(one(0.0), one(1.0)), dt=-0.1, clip_range=0.05, kl_beta=10.0,
    )  # fmt: skip
    second = math.exp(-0.005)
    assert float(found.kl) == pytest.approx(0.1**2 / 2)
    assert float(found.loss) == pytest.approx((-2 * 1.05 + second) / 2 + 10 * 0.005, rel=1e-5)
    assert float(found.ratio) == pytest.approx((math.exp(0.095) + second) / 2, rel=1e-5)
    assert float(found.clip_fraction) == 0.5


def test_clipped_weighs_by_noise_and_cuts_advantages() -> None:
    """At a ratio of 1 the loss is minus the mean advantage, cut to 5, times the standard deviation 0.5."""
    arguments = one(0.3).reshape(1, 1, 1, 1, 1), torch.tensor([[7.0]]), Step(one(0.1), one(0.5)), one(0.1), None
    assert float(clipped(*arguments, dt=-0.1, clip_range=0.1, noise_weight=True).loss) == pytest.approx(-5 * 0.5)


def test_optimality() -> None:
    assert optimality(torch.tensor([-9.0, -5.0, 0.0, 2.5, 9.0])).tolist() == [0, 0, 0.5, 0.75, 1]


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        # v+ = -1 predicts x0 = 1, right; v- = 1 predicts 0, off by 1, over its size 1. 5 (0.75 x 0 + 0.25 x 1).
        (1.0, 1.25),
        # v+ = -0.5 predicts 0.75: 0.0625 / 0.25; v- = 0.5 predicts 0.25: 0.5625 / 0.75. 10 (0.75 x 0.25 + 0.25 x 0.75).
        (0.5, 3.75),
    ],
)
def test_nft_by_hand(beta: float, expected: float) -> None:
    """x0 = 1 and no noise at level 0.5: x = 0.5. The old policy says 0, the new one -1, which is right; advantage 2.5, so r = 0.75."""
    found = nft(
        one(1.0), one(0.5), torch.tensor([0.5]), torch.tensor([2.5]), one(-1.0), one(0.0), one(-0.5), beta=beta, kl_beta=2.0
    )  # fmt: skip
    assert float(found.kl) == pytest.approx(0.25)
    assert float(found.loss) == pytest.approx(expected + 2 * 0.25)


@pytest.mark.parametrize("advantage", [-3.0, 0.0, 3.0])
def test_nft_goes_towards_good_samples_and_away_from_bad_ones(advantage: float) -> None:
    """At the start new = old: the gradient has the sign of minus the advantage times (target - velocity)."""
    velocity = one(0.2).requires_grad_()
    old = velocity.detach().clone()
    x0, noise = one(1.0), one(0.5)
    x = 0.5 * x0 + 0.5 * noise
    nft(x0, x, torch.tensor([0.5]), torch.tensor([advantage]), velocity, old, None).loss.backward()
    towards = float((noise - x0 - old).sign())
    assert float(velocity.grad.sum().sign()) == (-towards * math.copysign(1, advantage) if advantage else 0)


def test_direct_by_hand() -> None:
    found = direct(torch.tensor([1.0, 3.0]), one(1.0, 2.0), one(0.0, 0.0), kl_beta=0.1)
    assert float(found.kl) == 2.5
    assert float(found.loss) == pytest.approx(-2 + 0.25)
    assert float(direct(torch.tensor([1.0, 3.0]), None, None).loss) == -2
