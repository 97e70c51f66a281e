"""`drm grpo`."""

from __future__ import annotations

from typing import Annotated

import typer

from drmcli.cli import options as o


def grpo(
    algorithm: Annotated[
        str | None, typer.Option(help="step-grpo (default), tempflow, flow-grpo, nft, nft-step or direct.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="shapes|FILE", help="Prompts to learn from; some are held out.")
    ] = None,
    add_rewards: Annotated[
        list[str] | None,
        typer.Option(
            "--add-reward",
            metavar="REF=WEIGHT",
            help="A further reward: a reward model, a scorer such as clip, or module:function; may be repeated.",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="shapes|SCORER|REF|none", help="Independent yardstick against reward hacking."),
    ] = None,
    updates: Annotated[int | None, typer.Option(help="Optimizer updates.")] = None,
    max_time: Annotated[
        float | None, typer.Option(help="Minutes of training after which the run ends by itself.")
    ] = None,
    target: Annotated[float | None, typer.Option(help="Level of the judge at which the run ends by itself.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Candidates of a state, or trajectories of a prompt.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    train: Annotated[str | None, typer.Option(help="lora (default), or full: all weights of the transformer.")] = None,
    spread_penalty: Annotated[
        float | None, typer.Option(help="Take so many standard deviations over reward models and draws off the reward.")
    ] = None,
    kl_beta: Annotated[float | None, typer.Option(help="Weight of the KL to the reference.")] = None,
    diversity_bonus: Annotated[
        float | None, typer.Option(help="Reward for each unit of distance to the rest of the group.")
    ] = None,
    refresh_every: Annotated[
        int | None, typer.Option(help="Updates after which the reward model learns from fresh samples.")
    ] = None,
    refresh_by: Annotated[
        str | None, typer.Option(metavar="SCORER", help="The trusted scorer that labels those samples.")
    ] = None,
    on_hacking: Annotated[str | None, typer.Option(help="stop (default), warn or ignore.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of a rollout.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Guidance in rollouts and evaluation; 1 is without.")
    ] = None,
    step_rule: Annotated[str | None, typer.Option(help="cps, flow-sde or dance-sde.")] = None,
    noise_level: Annotated[float | None, typer.Option(help="Noise of the step rule.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Updates between evaluations.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Updates between checkpoints.")] = None,
    track: Annotated[list[str] | None, typer.Option(help="Tracker: tensorboard, wandb, ...; may be repeated.")] = None,
    preset: o.Preset = None,
    generator: o.GeneratorRef = None,
    reward: o.RewardRef = None,
    resolution: o.Resolution = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    attention: o.Attention = None,
    config: o.ConfigFile = None,
    sets: o.Sets = None,
    out: o.Out = None,
    seed: o.Seed = None,
    dry_run: o.DryRun = False,
    resume: o.Resume = None,
    overwrite: o.Overwrite = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Align a generator with a reward model: Step-wise GRPO, its baselines, and an alarm against reward hacking.

    [bold]Examples[/]

      drm grpo

      drm grpo --algorithm flow-grpo --updates 20 --lr 1e-3 --out runs/flow

      drm grpo --preset sd35-medium --reward runs/sd35/reward --prompts prompts.txt --judge none --dry-run
    """
    o.execute("grpo", locals())
