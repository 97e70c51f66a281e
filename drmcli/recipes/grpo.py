"""`drm grpo`: align a generator with a reward model, with rewards at every step, and watch that the gain is real.

How it differs from textbook GRPO:
1. A group is k candidates of *one state* at one step, not k answers to one prompt (flow-grpo, a baseline, has the latter).
2. Rewards come from a model that judges noisy states, so every step has its own (nft learns from clean samples, direct from gradients).
3. The candidates of a state share one velocity: the update needs one forward and one backward pass a state.
4. An independent judge looks at plain samples of validation prompts with fixed seeds; the policy that is kept is the
   best by the judge, and an alarm stops the run when the reward rises while the judge falls. Test prompts, which chose
   nothing, give the figures of the summary.

The loop is `train`; the algorithms are in `drmcli.algorithms`, their formulas in `drmcli.policy_loss`.
"""

from __future__ import annotations

import math
import shutil
import time
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from PIL import Image
from torch import Tensor

from drmcli.algorithms import Prompts
from drmcli.config import Grpo
from drmcli.errors import InputError, RunError
from drmcli.evaluation import Evaluation, evaluate, reward_is_hacked
from drmcli.measure.intervals import mean_ci, paired_ci
from drmcli.recipes.alignment import Alignment, State, assemble, check_config, heads, resume, save
from drmcli.recipes.alignment_files import (
    before_and_after,
    best_folder,
    curve,
    picture_grid,
    product,
    record,
    save_best,
    save_product,
    write_card,
)
from drmcli.recipes.alignment_plan import plan as plan
from drmcli.recipes.checkpoints import finite
from drmcli.recipes.launch import agreed, ended, refuse_sharding, share_folder, start_accelerator, summed
from drmcli.refresh import continue_head
from drmcli.run import SILENT, Interruptions, Reporter, atomic_folder, guarded, open_run, seed_of
from drmcli.sampling import Search, sample

RATIO_TOLERANCE = 1e-5
"""Largest deviation of the first log ratio from 0; in mixed precision 1e-2."""
FLAWLESS = 0.9
"""Score of the judge from which on a picture counts as flawless in the figures of diversity; the world's judge goes from 0 to 1."""


def run(config: Grpo, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Align a generator. Returns what summary.json holds."""
    refuse_sharding("grpo")
    check_config(config)
    accelerator = start_accelerator(config, rounds=1)
    with ended(accelerator):
        return align(config, accelerator, reporter)


def align(config: Grpo, accelerator: Accelerator, reporter: Reporter) -> dict[str, Any]:
    """The part of this process in the run of all."""
    if config.prompts_per_update % accelerator.num_processes:
        raise InputError(
            f"--set prompts_per_update: {config.prompts_per_update} do not split over {accelerator.num_processes} processes",
            hint="choose a multiple: the candidates of a prompt stay together",
        )
    share_folder("grpo", config, accelerator)
    with open_run("grpo", config, reporter, main=accelerator.is_main_process) as folder:
        if folder.finished:
            folder.note(f"{folder.folder} is finished; --overwrite trains again")
            return folder.finished
        alignment = assemble(config, accelerator, folder)
        with Interruptions() as interruptions:
            state = resume(alignment)
            train(alignment, state, interruptions)
        return finish(alignment, state)


def train(a: Alignment, state: State, interruptions: Interruptions) -> None:
    """Updates until the last, the time limit, the target or the alarm. An interruption saves a checkpoint and raises Interrupted."""
    config = a.config
    if not state.history:
        watch(a, state)
    spent, began = state.spent, time.monotonic()
    while state.update < config.updates and state.stopped is None:
        # Is the time up? All processes agree.
        state.spent = spent + time.monotonic() - began
        late = config.max_time is not None and state.spent > 60 * config.max_time
        if agreed(a.accelerator, late)[0]:
            a.run.note(f"time limit of {config.max_time:g} minutes at update {state.update}")
            break

        # Teach the reward model what the policy draws now.
        if (
            config.refresh_every
            and state.update % config.refresh_every == 0
            and (state.update or config.refresh_memory)
        ):
            refresh(a, state)

        # Draw for this process's share of the prompts.
        started = time.monotonic()
        texts, prompts = a.pick(state.update)
        # The noise of an ensemble of draws is the update's own: a resumed run and other processes draw the same.
        a.rewards.seed = seed_of("draws", config.seed, state.update)
        calls = a.reward.generator_calls, a.reward.reward_calls
        drawn = a.algorithm.draw(prompts, state.update)

        # Before the first update: the policy is the one that drew, and has a gradient.
        if state.update == 0:
            check(a, drawn)

        # Learn, micro-batch by micro-batch.
        row = learn(a, drawn, state.update)
        state.update += 1
        seconds = time.monotonic() - started
        state.learning += seconds

        # Log what all processes drew.
        count_calls(a, state, drawn.generator_calls, calls)
        record(a, state, texts, drawn.scored, row, seconds)

        # Evaluate, keep the best policy, and stop if the reward is being fooled.
        last = state.update == config.updates
        if (config.eval_every and state.update % config.eval_every == 0) or last:
            watch(a, state)

        # Save; stop when any process was told to.
        (asked,) = agreed(a.accelerator, interruptions.asked)
        state.spent = spent + time.monotonic() - began
        if asked or (config.save_every and state.update % config.save_every == 0) or last or state.stopped:
            save(a, state)
        if asked and not last and state.stopped is None:
            raise interruptions.stop(f"update {state.update} of {config.updates} is saved in {a.run.folder}")


def learn(a: Alignment, drawn: Any, update: int) -> dict[str, float]:
    """Gradient steps on what was drawn. Returns what the metrics row shows, over all processes."""
    config = a.config
    total = a.algorithm.states(config.prompts_per_update)
    sums = torch.zeros(5, device=a.accelerator.device)  # loss, ratio, clipped, KL, states
    norm = 0.0
    for _ in range(config.inner_epochs):
        for part in a.algorithm.parts(drawn):
            loss = part.loss.loss
            if not bool(torch.isfinite(loss)):
                raise RunError(
                    f"update {update}: the loss is not finite", hint="lower --lr, or use --dtype fp32 or bf16"
                )
            (loss * (part.states / total)).backward()
            shown = torch.cat([loss.detach()[None], part.loss.shown, torch.ones(1, device=loss.device)])
            sums += shown * part.states
        norm = descend(a, update)
    sums = a.accelerator.reduce(sums, "sum")
    loss_mean, ratio, clip_fraction, kl = (sums[:4] / sums[4]).tolist()
    return {"loss": loss_mean, "ratio": ratio, "clip_fraction": clip_fraction, "kl": kl, "grad_norm": norm}


def descend(a: Alignment, update: int) -> float:
    """Sum the gradients over processes and take one optimizer step. Returns the gradient norm."""
    config, trained = a.config, a.policy.trained
    if a.accelerator.num_processes > 1:
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        for parameter, gradient in zip(trained, summed(a.accelerator, own)):
            parameter.grad = gradient
    norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or math.inf)
    rate = min(1.0, (update + 1) / config.warmup_updates) if config.warmup_updates else 1.0
    for group in a.optimizer.param_groups:
        group["lr"] = config.lr * rate
    a.optimizer.step()
    a.optimizer.zero_grad()
    a.policy.follow(min(config.old_decay_rate * update, config.old_decay))
    return float(norm)


def check(a: Alignment, drawn: Any) -> None:
    """Before the first update: the policy is the one that drew, and it has a gradient.

    Raises RunError with the numbers: a run that fails here would only waste time.
    """
    off, largest = a.algorithm.check(drawn)
    tolerance = RATIO_TOLERANCE if a.accelerator.mixed_precision == "no" else 1e-2
    what = "log ratio" if a.config.algorithm in GROUPED else "difference of the policy and the one that draws"
    if not off <= tolerance:
        raise RunError(
            f"self-check: the {what} before the first update is {off:.2e}, not 0",
            hint="use --dtype fp32, or report this",
        )
    if a.config.algorithm in GROUPED and off > a.config.clip_range:
        a.run.warn(
            f"self-check: rounding alone moves the log ratio by {off:.1e}, more than --set clip_range ({a.config.clip_range:.0e}):"
            " candidates will be clipped for it; --dtype fp32, or a wider clip_range, avoids that"
        )
    if not largest > 0:
        raise RunError("self-check: the policy has no gradient", hint="report this with the versions of `drm doctor`")
    a.run.log(f"self-check: {what} {off:.1e}, largest gradient {largest:.1e}")


GROUPED = ("step-grpo", "tempflow", "flow-grpo")


def count_calls(a: Alignment, state: State, drawing: int, before: tuple[int, int]) -> None:
    """Add an update's calls of the models, over all processes. `before`: the reward's own counts before it."""
    made = [drawing + a.reward.generator_calls - before[0], a.reward.reward_calls - before[1]]
    total = a.accelerator.reduce(torch.tensor(made, device=a.accelerator.device), "sum")
    state.calls = [old + int(new) for old, new in zip(state.calls, total.tolist())]


# --- evaluation -------------------------------------------------------------------------------------------------------


def plain_samples(
    a: Alignment, texts: list[str], seeds: list[int], task: str
) -> tuple[Tensor, Tensor, list[Image.Image]]:
    """Latents [B, C, H, W], rewards [B] and pictures of plain ODE samples, as a user would draw them, by the weights as they are."""
    config = a.config
    search = Search(num_inference_steps=config.steps, guidance_scale=config.guidance_scale, max_batch=a.batch)
    latents, rewards, images = [], [], []
    for i in range(0, len(texts), config.max_batch):
        some = slice(i, i + config.max_batch)
        cond, reward_conds = a.cond(texts[some])
        with torch.no_grad(), a.accelerator.autocast():
            x = sample(
                a.policy.generator, None, cond, None, seeds[some], search, negative=a.policy.negative, shape=a.shape
            ).latents
            rewards.append(clean_rewards(a, x, Prompts(texts[some], seeds[some], cond, reward_conds)))
        latents.append(x)
        images += a.policy.generator.decode(x)
        a.run.reporter.progress(task, min(i + config.max_batch, len(texts)), len(texts))
    return torch.cat(latents), torch.cat(rewards), images


def clean_rewards(a: Alignment, x: Tensor, prompts: Prompts) -> Tensor:
    """Rewards [B] of clean latents [B, C, H, W], one a prompt."""
    owner = torch.arange(len(x), device=x.device)
    return torch.cat(a.batch.each(lambda at: a.reward(x[at], 0.0, prompts, owner[at]).float(), len(x)))


def look(a: Alignment, split: str) -> Evaluation:
    """Plain samples of a split's prompts with fixed seeds."""
    config = a.config
    a.rewards.seed = seed_of("draws", "evaluation")
    return evaluate(
        lambda texts, seeds: plain_samples(a, texts, seeds, f"evaluate {split}"),
        a.judge, a.prompts[split][: config.eval_prompts], config.eval_seeds,
        rank=a.share.rank, world=a.accelerator.num_processes, gather=a.share.gather,
    )  # fmt: skip


def refresh(a: Alignment, state: State) -> None:
    """Let the heads of the reward models learn from fresh samples of the policy beside older ones of the same prompts, all labelled by
    the trusted scorer. Before the first update there is nothing to mend: the samples are kept as those of the start."""
    config, train, k = a.config, a.prompts["train"], a.config.refresh_samples
    world = a.accelerator.num_processes
    each = -(-config.refresh_prompts // world)
    rng = np.random.default_rng(seed_of("refresh", config.seed))
    texts = [train[i] for i in rng.choice(len(train), each * world, replace=len(train) < each * world)]
    mine = [text for text in texts[a.share.rank * each : (a.share.rank + 1) * each] for _ in range(k)]
    seeds = [seed_of("refresh", config.seed, state.update, a.share.rank * each * k + i) for i in range(len(mine))]
    latents, _, images = plain_samples(a, mine, seeds, "refresh")
    judged = torch.as_tensor(a.trusted(images, mine), dtype=torch.float32, device=latents.device)
    latents, judged = a.share.gather(latents.contiguous()), a.share.gather(judged)
    state.memory.add(latents.unflatten(0, (-1, k)).cpu(), judged.unflatten(0, (-1, k)).cpu())
    if state.update == 0:
        return
    latents, judged = (t.to(latents.device) for t in state.memory.joined())
    for i, (model, cond) in enumerate(zip(a.rewards.models, a.cond(texts)[1])):
        first, last = continue_head(
            model, latents, cond, judged, steps=config.refresh_steps, lr=config.refresh_lr, fresh=k,
            seed=seed_of("refresh", config.seed, state.update, "steps", i),
        )  # fmt: skip
        a.run.log(f"update {state.update}: reward model {i} learned on, loss {first:.3f} to {last:.3f}")
    broadcast(list(heads(a.rewards).values()))  # equal to the last bit in all processes
    state.refreshes += 1


def watch(a: Alignment, state: State) -> None:
    """Evaluate on validation prompts, keep the best point, and sound the alarm when the reward is being fooled."""
    with a.policy.averaged():
        found = look(a, "val")
    share, among = found.flawless(FLAWLESS)
    row: dict[str, Any] = {
        "update": state.update,
        "reward": mean_ci(found.reward, found.prompt).value,
        "judge": mean_ci(found.judge, found.prompt).value if a.judge else None,
        "diversity": found.diversity,
        "flawless": share,
        "diversity_flawless": among,
        "seconds": state.learning,
        "refreshes": state.refreshes,
    }
    gap = low = high = None
    if a.judge and state.best_judge is not None:  # paired by caption and seed
        gap = paired_ci(found.judge, state.best_judge, found.prompt)
        low, high = gap.ci95
        row |= {"judge_less_best": gap.value, "judge_less_best_ci95": [low, high]}
    state.history.append(row)
    if a.main:
        shown = {k: v for k, v in row.items() if k != "refreshes" and not k.startswith("judge_less")}
        less = {"judge_less_best": gap and gap.value, "judge_less_best_low": low, "judge_less_best_high": high}
        a.tables.evals.add(split="val", **shown, **less)
        picture_grid(a.run, found, a.prompts["val"], a.config.eval_seeds, state.update)
    judged = f", judge {row['judge']:.3f}" if a.judge else ""
    if low is not None:
        judged += f" (less the best {row['judge_less_best']:+.3f}, {low:+.3f} to {high:+.3f})"
    diverse = "" if row["diversity"] is None else f", diversity {row['diversity']:.3f}"
    a.run.note(f"update {state.update}: reward {row['reward']:+.3f}{judged}{diverse}")
    best = state.best(a.measure)
    if best is row:
        state.best_judge = found.judge
        save_best(a, state.update)
    elif a.judge and a.config.on_hacking != "ignore":
        assert state.best_judge is not None
        # Rewards can be compared only while the reward model is the same.
        same = [r for r in state.history if r.get("refreshes", 0) == state.refreshes]
        comparable = best in same
        why = reward_is_hacked(same, found.judge, state.best_judge, found.prompt) if comparable else None
        if why:
            why = f"{why}; {product(a.config)}/ is update {best['update']}"
            a.run.warn(why)
            state.stopped = why if a.config.on_hacking == "stop" else None
    target = a.config.target
    if target is not None and row[a.measure] >= target and state.stopped is None:
        state.stopped = f"update {state.update}: the {a.measure} is at the target of {target:g}"
        a.run.note(state.stopped)


# --- the end ----------------------------------------------------------------------------------------------------------


def finish(a: Alignment, state: State) -> dict[str, Any]:
    """Save what was made, and report before and after on test prompts, which chose nothing."""
    folder, name = a.run.folder, product(a.config)
    save_product(a, folder / f"{name}-last", state.update)
    a.accelerator.wait_for_everyone()  # every process reads the best policy from the run folder
    with a.policy.saved(best_folder(a)):
        after = look(a, "test")
        if a.config.train == "full":
            save_product(a, folder / name, int(state.best(a.measure)["update"]))
    with a.policy.saved(None):
        before = look(a, "test")
    summary = finite(summarise(a, state, before, after))
    if a.main:
        for table in vars(a.tables).values():
            table.flush(state.update)
        with guarded(folder):
            before_and_after(a.run, {"before": before, "after": after}, a.prompts["test"], a.config.eval_seeds)
            curve(a.run, state.history)
        write_card(folder / name, a.config, summary["best_update"], summary)
        summary = a.run.finish(summary)
        if state.refreshes:
            for i, model in enumerate(a.rewards.models):
                with atomic_folder(folder / f"reward{i or ''}") as part:
                    model.save_pretrained(part)  # type: ignore[operator]
        if a.config.train == "full":
            shutil.rmtree(best_folder(a))  # generator/ holds it now
    return summary


def summarise(a: Alignment, state: State, before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """What summary.json says beside the command and the folder."""
    config, folder = a.config, a.run.folder
    lora = config.train == "lora"
    summary: dict[str, Any] = {
        "lora": str(folder / "lora") if lora else None,
        "lora_last": str(folder / "lora-last") if lora else None,
        "generator": config.generator if lora else str(folder / "generator"),
        "seed": config.seed,
        "device": str(a.accelerator.device),
        "dtype": a.accelerator.mixed_precision if a.accelerator.mixed_precision != "no" else "fp32",
        "seconds": round(time.monotonic() - a.run.started, 2),
        "train_seconds": round(state.spent, 2),
        "learn_seconds": round(state.learning, 2),
        "algorithm": config.algorithm,
        "updates": state.update,
        "best_update": int(state.best(a.measure)["update"]),
        "stopped": state.stopped,
    }
    for name in ("reward", "judge"):
        x, y = getattr(before, name), getattr(after, name)
        there = name == "reward" or bool(a.judge)
        summary |= {
            f"{name}_before": float(x.mean()) if there else None,
            f"{name}_after": float(y.mean()) if there else None,
            f"{name}_gain_ci95": list(paired_ci(y, x, before.prompt).ci95) if there else None,
        }
    for moment, found in (("before", before), ("after", after)):
        share, among = found.flawless(FLAWLESS)
        summary |= {f"diversity_{moment}": found.diversity, f"flawless_{moment}": share}
        summary |= {f"diversity_flawless_{moment}": among}
    return summary | {"generator_calls": state.calls[0], "reward_calls": state.calls[1], "history": state.history}
