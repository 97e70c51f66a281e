"""Losses and advantages against numbers derived by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from drmcli import losses


def test_bradley_terry_by_hand() -> None:
    """d = 2: -log sigmoid(2) = log(1 + e^-2) = 0.126928; d = 0: log 2."""
    loss = losses.bradley_terry(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert loss.item() == pytest.approx((math.log1p(math.exp(-2)) + math.log(2)) / 2)


def test_bradley_terry_margin_label_weight() -> None:
    """margin 1: log(1 + e^-1). Label 1/2: the mean of both sides. Weights 3 and 1: a weighted mean."""
    a, b = torch.tensor([2.0]), torch.tensor([0.0])
    assert losses.bradley_terry(a, b, margin=1.0).item() == pytest.approx(math.log1p(math.exp(-1)))
    tie = losses.bradley_terry(a, b, label=torch.tensor([0.5])).item()
    assert tie == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2)
    pair = losses.bradley_terry(torch.tensor([2.0, 0.0]), torch.zeros(2), weight=torch.tensor([3.0, 1.0])).item()
    assert pair == pytest.approx((3 * math.log1p(math.exp(-2)) + math.log(2)) / 4)


def test_a_tie_is_best_at_equal_scores() -> None:
    d = torch.linspace(-3, 3, 61)
    values = torch.stack([losses.bradley_terry(x[None], torch.zeros(1), label=torch.tensor([0.5])) for x in d])
    assert d[values.argmin()].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", ["bradley_terry", "thurstone"])
def test_swapping_sides_and_label_changes_nothing(loss: str) -> None:
    a, b, label = torch.randn(5), torch.randn(5), torch.rand(5)
    more = (torch.rand(5),) if loss == "thurstone" else ()
    f = getattr(losses, loss)
    torch.testing.assert_close(f(a, b, *more, label=label), f(b, a, *more, label=1 - label))


def test_thurstone_is_a_probit_of_the_noise() -> None:
    """Var of a difference at sigma = 0.5: 2 (2 * 0.25 + 0.05) = 1.1, so d = 1 has P = Phi(1 / sqrt(1.1))."""
    loss = losses.thurstone(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([0.5]))
    expected = -math.log(Normal(0.0, 1.0).cdf(torch.tensor(1 / math.sqrt(1.1), dtype=torch.float64)).item())
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_thurstone_is_stable_far_out() -> None:
    a = torch.tensor([-80.0], requires_grad=True)
    loss = losses.thurstone(a, torch.zeros(1), torch.zeros(1))
    loss.backward()
    assert a.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(a.grad).all()


def test_advantages_by_hand() -> None:
    """[1, 2, 3]: population std sqrt(2/3), so -1.2247, 0, 1.2247; unbiased std 1: -1, 0, 1."""
    r = torch.tensor([[1.0, 2.0, 3.0]])
    root = math.sqrt(1.5)
    population = losses.group_advantages(r, eps=0).values
    torch.testing.assert_close(population, torch.tensor([[-root, 0.0, root]]))
    torch.testing.assert_close(
        losses.group_advantages(r, eps=0, unbiased=True).values, torch.tensor([[-1.0, 0.0, 1.0]])
    )


def test_groups_without_signal_get_nothing() -> None:
    r = torch.tensor([[1.0, 1.0], [0.0, 1e-6], [0.0, 2.0]])
    out = losses.group_advantages(r, min_std=1e-3)
    assert out.signal.tolist() == [False, False, True]
    assert out.values[:2].abs().max() == 0
    assert out.values[2].abs().min() > 0.9


def test_global_std_divides_all_groups_alike() -> None:
    r = torch.tensor([[0.0, 2.0], [0.0, 4.0]])
    out = losses.group_advantages(r, eps=0, global_std=True).values
    torch.testing.assert_close(out[1], 2 * out[0])


def test_a_reward_that_is_not_finite_raises() -> None:
    with pytest.raises(ValueError, match="not finite"):
        losses.group_advantages(torch.tensor([[1.0, math.nan]]))


def test_clipped_loss_by_hand() -> None:
    """ratios 1.5 and 0.5, clip 0.2. A = 1: max(-1.5, -1.2) = -1.2 and max(-0.5, -0.8) = -0.5; mean -0.85. Both are clipped."""
    out = losses.clipped_policy_loss(torch.log(torch.tensor([1.5, 0.5])), torch.ones(2), clip_range=0.2)
    assert out.loss.item() == pytest.approx(-0.85)
    assert out.clip_fraction.item() == 1
    assert out.ratio.item() == pytest.approx(1)
    assert out.approx_kl.item() == pytest.approx((math.log(1.5) ** 2 + math.log(0.5) ** 2) / 4)


def test_first_update_is_the_policy_gradient() -> None:
    """At ratio 1 the gradient of the loss with respect to log p is -A / N."""
    log_ratio = torch.zeros(3, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    losses.clipped_policy_loss(log_ratio, advantages, clip_range=1e-4).loss.backward()
    assert log_ratio.grad is not None
    torch.testing.assert_close(log_ratio.grad, -advantages / 3)
