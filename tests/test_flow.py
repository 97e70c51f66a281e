"""The flow steps against hand-derived vectors, torch.distributions and diffusers' own scheduler."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal, kl_divergence

from drmcli import flow

# Coefficients of x and v in the mean, and the noise std, of Flow-GRPO's step on SD3.5's grid of 10 steps at a = 0.7.
FLOW_SDE = [
    (0.755000, -0.039871, 0.700000),
    (0.712541, -0.058242, 0.742964),
    (0.842634, -0.069293, 0.536152),
    (0.884093, -0.083818, 0.445897),
    (0.902892, -0.103447, 0.391794),
    (0.912011, -0.130884, 0.352797),
    (0.915465, -0.170907, 0.319070),
    (0.914463, -0.232600, 0.282007),
    (0.908672, -0.335055, 0.225360),
    (0.997793, -0.011116, 0.006278),
]
# Total noise after that step under a perfect predictor, the level it amounts to, and the same of Dance-SDE at eta = 0.3.
LEFT_OVER = [
    (1.000705, 0.9617, 0.960205),
    (0.971460, 0.9181, 0.913464),
    (0.881996, 0.8611, 0.857875),
    (0.808531, 0.7941, 0.790677),
    (0.725128, 0.7124, 0.707850),
    (0.623560, 0.6105, 0.603354),
    (0.496452, 0.4813, 0.468008),
    (0.341451, 0.3211, 0.290509),
    (0.239952, 0.1949, 0.159436),
    (0.006655, 0.0066, 0.053184),
]
SIGMAS = flow.schedule(10)


def state(seed: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 4, 6, generator=torch.Generator().manual_seed(seed))


def take(rule: str, i: int, x: torch.Tensor, v: torch.Tensor, noise_level: float) -> flow.Step:
    return flow.STEP_RULES[rule](x, v, SIGMAS[i], SIGMAS[i + 1], noise_level=noise_level, sigma_max=SIGMAS[1])


@pytest.mark.parametrize("steps", [1, 2, 10, 28, 40])
def test_schedule_is_diffusers(steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(flow.schedule(steps), scheduler.sigmas, atol=1e-6, rtol=0)


def test_schedule_ends_where_sd35_does() -> None:
    """f(f(0.001)) with f(s) = 3 s / (1 + 2 s): f(0.001) = 0.00299401, f of that 0.008929; then 0."""
    assert flow.schedule(28)[-2:].tolist() == pytest.approx([0.008929, 0.0], abs=1e-6)


@pytest.mark.parametrize("i", range(10))
def test_flow_sde_vectors(i: int) -> None:
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    of_x, of_v = take("flow-sde", i, one, zero, 0.7), take("flow-sde", i, zero, one, 0.7)
    assert [of_x.mean.item(), of_v.mean.item(), of_x.std.item()] == pytest.approx(FLOW_SDE[i], abs=2e-6)


@pytest.mark.parametrize("i", range(10))
def test_noise_left_over(i: int) -> None:
    """Euler-Maruyama steps leave more noise than the level that the reward model is told; the correction says how much."""
    args = {"sigma": SIGMAS[i], "sigma_next": SIGMAS[i + 1], "sigma_max": SIGMAS[1]}
    clean, noise = flow.noise_after_step("flow-sde", noise_level=0.7, **args)
    assert clean.item() == pytest.approx(1 - SIGMAS[i + 1].item(), abs=2e-6)
    assert noise.item() == pytest.approx(LEFT_OVER[i][0], abs=2e-6)
    assert flow.noise_after_step("dance-sde", noise_level=0.3, **args)[1].item() == pytest.approx(
        LEFT_OVER[i][2], abs=2e-6
    )
    fixed, level = flow.corrected(torch.full((1, 1, 1, 1), 2.0), "flow-sde", noise_level=0.7, **args)
    assert level.item() == pytest.approx(LEFT_OVER[i][1], abs=1e-4)
    assert fixed.item() == pytest.approx(2.0 / (clean + noise).item(), rel=1e-5)


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("i", range(10))
def test_cps_keeps_the_noise_level(i: int, noise_level: float) -> None:
    """(s' cos)^2 + (s' sin)^2 = s'^2 for any noise level, also at the last step."""
    clean, noise = flow.noise_after_step("cps", SIGMAS[i], SIGMAS[i + 1], noise_level=noise_level)
    assert noise.item() == pytest.approx(SIGMAS[i + 1].item(), abs=1e-6)
    assert clean.item() == pytest.approx(1 - SIGMAS[i + 1].item(), abs=1e-6)


@pytest.mark.parametrize("rule", flow.STEP_RULES)
def test_noise_level_zero_is_euler_and_diffusers(rule: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    x = ours = state(0)
    for i in range(10):
        v = state(i + 1)
        x = scheduler.step(v, scheduler.timesteps[i], x).prev_sample
        step = take(rule, i, ours, v, 0.0)
        assert step.std.abs().max() == 0
        ours = flow.sample_step(step, state(99))
    torch.testing.assert_close(ours, x, atol=2e-5, rtol=0)


@pytest.mark.parametrize("rule", flow.STEP_RULES)
def test_sigma_a_sample(rule: str) -> None:
    """A batch with a sigma each is the same as one call each."""
    x, v = state(0, 3), state(1, 3)
    now, then = SIGMAS[[0, 3, 8]], SIGMAS[[1, 4, 9]]
    whole = flow.STEP_RULES[rule](x, v, now, then, noise_level=0.5, sigma_max=SIGMAS[1])
    for b in range(3):
        alone = flow.STEP_RULES[rule](
            x[b : b + 1], v[b : b + 1], now[b].item(), then[b].item(), noise_level=0.5, sigma_max=SIGMAS[1]
        )
        torch.testing.assert_close(whole.mean[b : b + 1], alone.mean)
        torch.testing.assert_close(whole.std.expand(3, 1, 1, 1)[b : b + 1], alone.std)


def test_predictions_undo_add_noise() -> None:
    x0, noise, sigma = state(0), state(1), torch.tensor([0.3, 0.9])
    x = flow.add_noise(x0, noise, sigma)
    torch.testing.assert_close(flow.predict_x0(x, noise - x0, sigma), x0)
    torch.testing.assert_close(flow.predict_noise(x, noise - x0, sigma), noise)


def test_half_precision_is_computed_in_float32() -> None:
    x, v = state(0).bfloat16(), state(1).bfloat16()
    step = take("flow-sde", 3, x, v, 0.7)
    assert step.mean.dtype == torch.float32
    torch.testing.assert_close(step.mean, take("flow-sde", 3, x.float(), v.float(), 0.7).mean)


@pytest.mark.parametrize("rule", ["flow-sde", "dance-sde", "cps"])
def test_log_prob_is_the_normal_density(rule: str) -> None:
    step = take(rule, 4, state(0), state(1), 0.7)
    x_next = flow.sample_step(step, state(2))
    expected = Normal(step.mean, step.std.expand_as(step.mean)).log_prob(x_next).mean((1, 2, 3))
    torch.testing.assert_close(flow.log_prob(x_next, step), expected)


def test_log_prob_forms() -> None:
    """By hand, one pixel: mean 0, std 2, x' = 1: -1/8 - log 2 - log sqrt(2 pi); without constants -1."""
    step = flow.Step(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0))
    x_next = torch.ones(1, 1, 1, 1)
    assert flow.log_prob(x_next, step).item() == pytest.approx(-1 / 8 - math.log(2) - 0.5 * math.log(2 * math.pi))
    assert flow.log_prob(x_next, step, form="no-const").item() == -1
    with pytest.raises(ValueError, match="deterministic"):
        flow.log_prob(x_next, flow.Step(step.mean, torch.zeros(1, 1, 1, 1)))
    with pytest.raises(ValueError, match="no form"):
        flow.log_prob(x_next, step, form="nonsense")


@pytest.mark.parametrize("form", ["gaussian", "no-const", "guard"])
def test_ratio_before_an_update_is_one(form: str) -> None:
    step = take("cps", 2, state(0), state(1), 0.7)
    assert flow.log_ratio(flow.sample_step(step, state(2)), step, step, form=form).abs().max() == 0


def test_guard_takes_out_the_bias() -> None:
    """With x' ~ old, E[gaussian log ratio] = -d^2 / (2 std^2) < 0, and the guarded one has mean 0."""
    old = flow.Step(torch.zeros(4000, 1, 2, 2), torch.full((4000, 1, 1, 1), 0.5))
    new = flow.Step(old.mean + 0.2, old.std)
    x_next = flow.sample_step(old, torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0)))
    plain = flow.log_ratio(x_next, new, old).mean().item()
    assert plain == pytest.approx(-(0.2**2) / (2 * 0.5**2), abs=0.015)
    assert flow.log_ratio(x_next, new, old, form="guard").mean().item() == pytest.approx(0, abs=0.008)


def test_kl_forms() -> None:
    a, b = take("cps", 4, state(0), state(1), 0.7), take("cps", 4, state(0), state(5), 0.7)
    std = a.std.expand_as(a.mean)
    exact = kl_divergence(Normal(a.mean, std), Normal(b.mean, std)).mean((1, 2, 3))
    dt = SIGMAS[5] - SIGMAS[4]
    torch.testing.assert_close(flow.kl_divergence(a, b, dt=dt), exact)
    torch.testing.assert_close(flow.kl_divergence(a, b, dt=dt, form="no-dt"), exact * dt.abs())
    torch.testing.assert_close(flow.kl_divergence(a, b, dt=dt, form="mse"), (a.mean - b.mean).square().mean((1, 2, 3)))
    with pytest.raises(ValueError, match="no form"):
        flow.kl_divergence(a, b, dt=dt, form="nonsense")


def test_kl_has_a_gradient_once_weights_differ() -> None:
    v = state(1).requires_grad_()
    new, reference = take("cps", 4, state(0), v, 0.7), take("cps", 4, state(0), state(5), 0.7)
    flow.kl_divergence(new, reference, dt=0.1).mean().backward()
    assert v.grad is not None
    assert v.grad.abs().max() > 0


def test_candidates_share_one_velocity() -> None:
    """The loss of k candidates of one state has the gradient of the same loss with the state repeated k times."""
    x, weight = state(0, 1), torch.tensor([1.0, -2.0, 0.5])
    noise = state(7, 3)

    def gradient(repeat: bool) -> torch.Tensor:
        v = state(1, 1).requires_grad_()
        states, velocity = (x.repeat(3, 1, 1, 1), v.repeat(3, 1, 1, 1)) if repeat else (x, v)
        step = take("cps", 4, states, velocity, 0.7)
        with torch.no_grad():
            x_next = flow.sample_step(step, noise)
        mean = flow.Step(step.mean.expand_as(noise), step.std)
        (flow.log_prob(x_next, mean) * weight).sum().backward()
        assert v.grad is not None
        return v.grad

    torch.testing.assert_close(gradient(False), gradient(True))
