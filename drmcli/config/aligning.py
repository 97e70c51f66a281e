"""What can be set of `drm grpo`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from drmcli.config.schema import (
    Above,
    Common,
    Count,
    Drawing,
    Finite,
    Guidance,
    Interval,
    Many,
    Rate,
    SamplingSteps,
    Share,
    Sigma,
    Timed,
    Width,
    strict,
)


@dataclass(config=strict, kw_only=True)
class Grpo(Common, Timed, Drawing):
    """`drm grpo`."""

    reward: str = ""
    """The scorer that rewards; a reward model's folder or hub id, a name such as pickscore, NAME=FOLDER, `module:function` or a
    server's URL. Empty: the preset's."""
    add_rewards: list[str] = Field(default_factory=list)
    """More scorers that reward, SCORER=WEIGHT; as a repeated --reward gives them."""
    score_at: Literal["noisy", "clean"] = "noisy"
    """Reward candidates where they are, or by the clean latents that the policy predicts from them."""
    reward_draws: Annotated[int, Field(gt=0, le=10_000)] = 1
    """Draws of a noise ensemble, each a little above the state's own sigma; 1 is the state itself."""
    spread_penalty: Rate = 0.0
    """This many standard deviations over reward models and draws are taken off: against reward hacking."""
    reward_ceiling: Finite | None = None
    """Rewards above are cut to it; None is no limit."""
    judge: str = "none"
    """Independent scorer that watches, or none; shapes is the embedded world's own."""
    prompts: str = "shapes"
    """Prompts to learn from, shapes or a file; of which a tenth each is held out for val and test."""
    algorithm: Literal["step-grpo", "tempflow", "flow-grpo", "nft", "nft-step", "direct"] = "step-grpo"
    """step-grpo scores candidates where they are; tempflow finishes them by the ODE; flow-grpo scores whole trajectories. nft learns
    from noised
    samples without likelihoods (DiffusionNFT), nft-step with the rewards of those noisy states; direct follows the reward's own
    gradient."""
    updates: Many = 40
    """Optimizer updates."""
    max_time: Above | None = None
    """Minutes of training after which the run ends by itself; None is no limit."""
    target: Finite | None = None
    """Level of the judge (of the reward where there is none) on validation prompts at which the run ends; None is no target."""
    prompts_per_update: Count = 16
    """Prompts an update, over all processes."""
    group_size: Annotated[int, Field(ge=2, le=10_000)] = 6
    """Candidates that are compared; of a state, or trajectories or samples of a prompt (k and G)."""
    steps: SamplingSteps = 10
    """Steps of a rollout; and of an evaluation's plain sampling."""
    guidance_scale: Guidance = 1.0
    """Guidance in rollouts and evaluation; 1 is without."""
    step_rule: Literal["flow-sde", "dance-sde", "cps"] = "cps"
    """Stochastic step."""
    noise_level: Annotated[float, Field(gt=0, le=2)] = 0.7
    """Noise that a step adds; a of flow-sde and cps, eta of dance-sde."""
    window: list[Sigma] = Field(default_factory=lambda: [0.3, 1.0], min_length=2, max_length=2)
    """Lowest and highest sigma whose steps are stochastic and trained; the ODE elsewhere."""
    follow: Literal["random", "best", "mean"] = "random"
    """The candidate that a trajectory goes on from; mean is the state without noise."""
    log_prob: Literal["gaussian", "no-const", "guard"] = "gaussian"
    """Form of the log-probability ratio."""
    clip_range: Above = 1e-4
    """Clipping of the ratio, whose log is a mean over latent dimensions."""
    advantage_clip: Above = 5.0
    """Advantages are cut to this."""
    min_std: Rate = 0.05
    """Reward spread below which a group is skipped."""
    global_std: bool = False
    """One reward spread for the whole batch."""
    noise_weight: bool = True
    """Weigh each step by its noise, as TempFlow-GRPO does: late steps, whose ratios are steepest, count less."""
    kl_beta: Rate = 0.0
    """Weight of the KL to the generator as it was; of nft and direct it is the squared difference of
    velocities."""
    kl_form: Literal["exact", "no-dt", "mse"] = "exact"
    """Form of that KL."""
    diversity_bonus: Rate = 0.0
    """Reward for each unit of a candidate's mean distance (latents, root mean square) to the rest of its group; not of direct."""
    refresh_every: Interval = 0
    """Updates after which the heads of the reward models learn from fresh samples of the policy; 0 is never."""
    refresh_by: str = ""
    """The trusted scorer that labels those samples."""
    refresh_prompts: Count = 16
    """Prompts of a refresh, over all processes."""
    refresh_samples: Annotated[int, Field(ge=2, le=10_000)] = 4
    """Samples a prompt, compared with each other and with older ones."""
    refresh_memory: Annotated[int, Field(ge=0, le=1_000)] = 4
    """Older refreshes whose samples are kept, those before the first update among them."""
    refresh_steps: Many = 100
    """Training steps of a refresh."""
    refresh_lr: Rate = 1e-3
    """Their learning rate."""
    nft_levels: Annotated[int, Field(gt=0, le=10_000)] = 4
    """Sigmas within the window that nft learns from at each sample, drawn anew each update."""
    nft_beta: Above = 1.0
    """How far nft's positive and negative velocities lie from the old policy's: beta of DiffusionNFT."""
    old_decay: Share = 0.5
    """Share of itself that nft's old policy keeps at an update, at most."""
    old_decay_rate: Rate = 0.001
    """What that share grows by at each update, from 0."""
    direct_form: Literal["draft", "refl"] = "draft"
    """draft: the gradient of direct goes through the last steps. refl: through one prediction at a step drawn at random within the
    window."""
    direct_steps: SamplingSteps = 1
    """Last steps that the gradient of draft goes through (K of DRaFT-K)."""
    train: Literal["lora", "full"] = "lora"
    """What of the transformer learns. full saves a whole pipeline folder, generator/, in place of lora/."""
    lora_targets: Annotated[list[str], Field(min_length=1)] | None = None
    """Modules that get a LoRA, by the ends of their names; None is the attention projections of both streams."""
    lora_rank: Width = 32
    """Rank of the LoRA."""
    lora_alpha: Width = 64
    """Its scale, alpha / rank."""
    lr: Rate = 1e-4
    """Learning rate."""
    warmup_updates: Interval = 0
    """Updates of linear warm-up."""
    weight_decay: Rate = 1e-4
    """AdamW's weight decay."""
    max_grad_norm: Rate = 1.0
    """Gradient norm above which gradients are scaled down; 0 is off."""
    inner_epochs: Annotated[int, Field(gt=0, le=10_000)] = 1
    """Passes over the same rollouts."""
    ema_decay: Share = 0.0
    """Decay of a moving average of the LoRA, which is what is evaluated and saved; 0 is off."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    micro_batch_size: Count = 16
    """States in one forward and backward pass."""
    max_batch: Count = 64
    """Latents in one forward pass of rollouts."""
    eval_every: Interval = 10
    """Updates between evaluations; 0 only at the start and the end."""
    eval_prompts: Count = 48
    """Held-out prompts of an evaluation."""
    eval_seeds: Annotated[int, Field(gt=0, le=10_000)] = 2
    """Pictures a held-out prompt, with fixed seeds."""
    on_hacking: Literal["stop", "warn", "ignore"] = "stop"
    """What to do when the reward rises while the judge falls beyond noise."""
    save_every: Interval = 10
    """Updates between checkpoints; 0 only when interrupted."""
    keep_checkpoints: Count = 2
    """Checkpoints kept."""
    track: list[str] = Field(default_factory=list)
    """Trackers of accelerate: tensorboard, wandb, ..."""
