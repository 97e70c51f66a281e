"""Rectified flow: noise in, noise out, and the stochastic steps whose log-probabilities reinforcement learning needs.

x_s = (1 - s) x0 + s eps with s = sigma in [0, 1]; the model's velocity is v ~ eps - x0. A step goes from
sigma to sigma_next < sigma. All arithmetic is float32, whatever comes in.

Every step rule has one signature and gives the mean and the standard deviation of the next state, so that candidates,
log-probabilities and KL all come from the same pair.

Dimension letters: B latents, C channels, H and W latent height and width. A sigma is a float or a tensor [B].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Level = float | Tensor


@dataclass
class Step:
    """A Gaussian over the next state: `mean` [B, C, H, W] and `std` [B, 1, 1, 1], both float32."""

    mean: Tensor
    std: Tensor


def schedule(num_inference_steps: int, shift: float = 3.0) -> Tensor:
    """Sigmas [n + 1] of diffusers' FlowMatchEulerDiscreteScheduler for SD3, from 1 to 0, float32.

    diffusers shifts twice at the small end: the grid runs linearly down to the already shifted level of 1/1000, and is
    then shifted as a whole, so the last level above 0 is 0.008929 at shift 3 whatever the number of steps.
    """
    lowest = _shift(torch.tensor(1 / 1000, dtype=torch.float64), shift)
    grid = torch.linspace(1.0, float(lowest), num_inference_steps, dtype=torch.float64)
    return torch.cat([_shift(grid, shift), torch.zeros(1, dtype=torch.float64)]).float()


def _shift(sigma: Tensor, shift: float) -> Tensor:
    return shift * sigma / (1 + (shift - 1) * sigma)


def add_noise(x0: Tensor, noise: Tensor, sigma: Level) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma noise, float32. sigma: one level, or one a latent."""
    s = _level(sigma, x0)
    return (1 - s) * x0.float() + s * noise.float()


def renoise(x: Tensor, sigma: float, higher: float, noise: Tensor) -> Tensor:
    """A state at `sigma` taken to a `higher` one by fresh noise: a x + b z, with a = (1 - s') / (1 - s), b^2 = s'^2 - a^2 s^2.

    Raises ValueError unless sigma <= higher <= 1 and sigma < 1.
    """
    if not (sigma <= higher <= 1 and sigma < 1):
        raise ValueError(f"renoise: {sigma} cannot be taken to {higher}")
    keep = (1 - higher) / (1 - sigma)
    return keep * x.float() + (higher**2 - (keep * sigma) ** 2) ** 0.5 * noise.float()


def predict_x0(x: Tensor, velocity: Tensor, sigma: Level) -> Tensor:
    """The clean latent that a velocity points to: x - sigma v."""
    return x.float() - _level(sigma, x) * velocity.float()


def predict_noise(x: Tensor, velocity: Tensor, sigma: Level) -> Tensor:
    """The noise that a velocity points away from: x + (1 - sigma) v."""
    return x.float() + (1 - _level(sigma, x)) * velocity.float()


def ode_step(
    x: Tensor, velocity: Tensor, sigma: Level, sigma_next: Level, *, noise_level: float = 0.0, sigma_max: Level = 1.0
) -> Step:
    """The Euler step of the probability flow, x + (sigma_next - sigma) v. Deterministic, whatever the noise level."""
    dt = _level(sigma_next, x) - _level(sigma, x)
    return Step(x.float() + dt * velocity.float(), torch.zeros_like(dt))


def flow_sde_step(
    x: Tensor, velocity: Tensor, sigma: Level, sigma_next: Level, *, noise_level: float = 0.7, sigma_max: Level = 1.0
) -> Step:
    """Euler-Maruyama step of Flow-GRPO (arXiv 2505.05470): diffusion g = a sqrt(s / (1 - s)).

    At sigma = 1 the denominator takes `sigma_max`, the schedule's second level, instead; the numerator stays 1.
    """
    s = _level(sigma, x)
    below_one = torch.where(s >= 1, _level(sigma_max, x), s)
    return _euler_maruyama(x, velocity, s, _level(sigma_next, x), noise_level * torch.sqrt(s / (1 - below_one)))


def dance_sde_step(
    x: Tensor, velocity: Tensor, sigma: Level, sigma_next: Level, *, noise_level: float = 0.3, sigma_max: Level = 1.0
) -> Step:
    """Euler-Maruyama step of DanceGRPO (arXiv 2505.07818): constant diffusion g = eta."""
    s = _level(sigma, x)
    return _euler_maruyama(x, velocity, s, _level(sigma_next, x), noise_level * torch.ones_like(s))


def _euler_maruyama(x: Tensor, velocity: Tensor, s: Tensor, s_next: Tensor, g: Tensor) -> Step:
    """dx = [v + g^2 / (2 s) (x + (1 - s) v)] dt + g dW with dt = s_next - s < 0; |dt| under the root."""
    x, v, dt = x.float(), velocity.float(), s_next - s
    drift = v + g.square() / (2 * s) * (x + (1 - s) * v)
    return Step(x + drift * dt, g * torch.sqrt(-dt))


def cps_step(
    x: Tensor, velocity: Tensor, sigma: Level, sigma_next: Level, *, noise_level: float = 0.7, sigma_max: Level = 1.0
) -> Step:
    """Coefficient-preserving step of FlowCPS (arXiv 2509.05952): a share of the noise is drawn anew.

    std = s' sin(a pi / 2), mean = (1 - s') x0_hat + s' cos(a pi / 2) eps_hat: whatever a in [0, 1] is, the next state has
    exactly the sigma_next that a reward model is told. a = 0 is the Euler step, a = 1 renews all noise.
    """
    s_next = _level(sigma_next, x)
    angle = noise_level * math.pi / 2
    mean = (1 - s_next) * predict_x0(x, velocity, sigma) + s_next * math.cos(angle) * predict_noise(x, velocity, sigma)
    return Step(mean, s_next * math.sin(angle))


StepRule = Callable[..., Step]
STEP_RULES: dict[str, StepRule] = {
    "ode": ode_step,
    "flow-sde": flow_sde_step,
    "dance-sde": dance_sde_step,
    "cps": cps_step,
}
"""Step rules by name, all called as rule(x, velocity, sigma, sigma_next, *, noise_level, sigma_max)."""


def sample_step(step: Step, noise: Tensor) -> Tensor:
    """mean + std noise, float32."""
    return step.mean + step.std * noise.float()


def log_prob(x_next: Tensor, step: Step, *, form: str = "gaussian") -> Tensor:
    """Log-probability [B] of a next state, averaged (not summed) over C, H, W as Flow-GRPO does. x_next carries no gradient.

    form "gaussian" is the whole density; "no-const" is -(x' - mean)^2 alone (FlowCPS), which weighs every step alike.
    Raises ValueError where the step is deterministic, for "gaussian".
    """
    off = (x_next.detach().float() - step.mean).square()
    if form == "no-const":
        return -off.flatten(1).mean(1)
    if form != "gaussian":
        raise ValueError(f"log_prob: no form {form!r}; use gaussian or no-const")
    if bool((step.std <= 0).any()):
        raise ValueError("log_prob: a deterministic step has no density")
    density = -off / (2 * step.std.square()) - torch.log(step.std) - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def log_ratio(x_next: Tensor, new: Step, old: Step, *, form: str = "gaussian") -> Tensor:
    """log p_new(x') - log p_old(x'), [B].

    "guard" (GRPO-Guard, arXiv 2510.22319): the Gaussian difference times std, plus mean((mean_new - mean_old)^2) / (2 std),
    which takes out the ratio's negative bias and gives every step the same variance.
    """
    if form != "guard":
        return log_prob(x_next, new, form=form) - log_prob(x_next, old, form=form)
    scale = new.std.flatten(1).mean(1)
    drift = (new.mean - old.mean).square().flatten(1).mean(1)
    return (log_prob(x_next, new) - log_prob(x_next, old)) * scale + drift / (2 * scale)


def kl_divergence(new: Step, reference: Step, *, dt: Level, form: str = "exact") -> Tensor:
    """KL of two steps of one variance, averaged over C, H, W: [B].

    "exact" is (mean - mean_ref)^2 / (2 std^2); "no-dt" divides by std^2 / |dt| instead, as Flow-GRPO does; "mse" is the plain
    squared difference of the means.
    """
    off = (new.mean - reference.mean).square()
    if form == "exact":
        off = off / (2 * new.std.square())
    elif form == "no-dt":
        off = off * _level(dt, off).abs() / (2 * new.std.square())
    elif form != "mse":
        raise ValueError(f"kl_divergence: no form {form!r}; use exact, no-dt or mse")
    return off.flatten(1).mean(1)


def noise_after_step(
    rule: str, sigma: Level, sigma_next: Level, *, noise_level: float, sigma_max: Level = 1.0
) -> tuple[Tensor, Tensor]:
    """(share of x0, total noise std) of the next state under a perfect predictor, float32.

    The share of x0 is 1 - sigma_next for every rule. The noise is sigma_next for CPS; Euler-Maruyama steps leave more.
    """
    s = torch.as_tensor(sigma, dtype=torch.float32).reshape(-1)
    one = torch.ones(len(s), 1, 1, 1)

    def mean(x: Tensor, v: Tensor) -> Step:
        return STEP_RULES[rule](x, v, s, sigma_next, noise_level=noise_level, sigma_max=sigma_max)

    # x = (1 - s) x0 + s eps and v = eps - x0; the mean is linear in both, so feed it x0 = 1 and eps = 1 one at a time.
    levels = s[:, None, None, None]
    clean = mean((1 - levels) * one, -one).mean
    old = mean(levels * one, one)
    return clean.flatten(), torch.sqrt(old.mean.square() + old.std.square()).flatten()


def corrected(
    x_next: Tensor, rule: str, sigma: Level, sigma_next: Level, *, noise_level: float, sigma_max: Level = 1.0
) -> tuple[Tensor, Tensor]:
    """A candidate as a reward model should see it: rescaled to a state of the flow, and that state's sigma [B or 1].

    With A the share of x0 and N the total noise, x' / (A + N) is a state at sigma = N / (A + N). CPS needs no correction.
    """
    clean, noise = noise_after_step(rule, sigma, sigma_next, noise_level=noise_level, sigma_max=sigma_max)
    total = (clean + noise).to(x_next.device)
    return x_next.float() / total[:, None, None, None], noise.to(x_next.device) / total


def _level(sigma: Level, like: Tensor) -> Tensor:
    """A sigma as float32 [B or 1, 1, 1, 1] on the device of `like`."""
    s = torch.as_tensor(sigma, dtype=torch.float32, device=like.device).reshape(-1)
    return s.reshape(-1, *([1] * (like.ndim - 1)))
