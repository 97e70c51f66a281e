"""`drm grpo`: align a generator with a reward model, with rewards at every step, and watch that the gain is real.

How it differs from the textbook: a group is k candidates of *one state* at one step, not k answers to one prompt; their rewards
come from a model that judges noisy states; and since they share one velocity, the update needs one forward and one backward
pass a state. flow-grpo and tempflow, the baselines, share everything but the rollout.

An independent judge looks at plain samples of validation prompts with fixed seeds. The LoRA that is kept is the best by the
judge; test prompts, which chose nothing, give the figures of the summary.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from peft import LoraConfig
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor

from drmcli.config import Grpo, local_or_hub, package_path
from drmcli.data.preferences import text_id
from drmcli.data.prompts import read_prompts as read_prompt_file
from drmcli.errors import InputError, RunError
from drmcli.families.base import Conditioning, Family
from drmcli.flow import STEP_RULES, Step, kl_divergence, log_ratio, predict_x0
from drmcli.generator import Generator, PromptEmbeds, load_denoiser, pick_device, pick_dtype
from drmcli.losses import clipped_policy_loss
from drmcli.measure.intervals import mean_ci, paired_ci
from drmcli.memory import plan_policy
from drmcli.plots import reward_and_judge
from drmcli.recipes.plan import Known
from drmcli.recipes.train_reward import share_folder, start_accelerator
from drmcli.results import Parts
from drmcli.reward import RewardModel
from drmcli.reward_config import read_config
from drmcli.rollout import Plan, Rollouts, Visit, roll_out
from drmcli.run import (
    Interruptions,
    Reporter,
    Run,
    atomic_folder,
    checkpoint_folder,
    guarded,
    latest_checkpoint,
    open_run,
    retire_checkpoints,
    seal,
    seed_of,
    write_text,
)
from drmcli.sampling import Search, sample
from drmcli.scorers import load_scorer
from drmcli.scorers.combine import Rewards, parse_term
from drmcli.tiny import world

RATIO_TOLERANCE = 1e-5
"""Largest deviation of the first log ratio from 0."""

ALARM_SHARE = 0.25
"""Share of its gain that the judge must have lost, beyond noise, before the alarm sounds: the best of many noisy points is a lucky one."""


def run(config: Grpo, reporter: Reporter) -> dict[str, Any]:
    """Align a generator. Returns what summary.json holds."""
    accelerator = start_accelerator(config, rounds=1)
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
        aligner = Aligner(config, accelerator, folder)
        with Interruptions() as interruptions:
            aligner.resume()
            aligner.train(interruptions)
        return aligner.finish()


def read_prompts(config: Grpo) -> dict[str, list[str]]:
    """Prompts of train, val and test, disjoint by text."""
    if config.prompts == "shapes":
        return {split: list(world.captions(split)) for split in world.SPLITS}
    lines = read_prompt_file(package_path(config.prompts))
    texts = sorted(set(lines), key=lambda t: hashlib.sha256(t.encode()).digest())
    if len(texts) < 10:
        raise InputError(f"--prompts {config.prompts}: {len(texts)} prompts", hint="give 10 or more: some are held out")
    tenth = max(1, len(texts) // 10)
    return {"val": texts[:tenth], "test": texts[tenth : 2 * tenth], "train": texts[2 * tenth :]}


def lora_config(config: Grpo, family: Family) -> LoraConfig:
    """The LoRA that is asked for."""
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=config.lora_targets or list(family.lora_targets),
    )


class Judge:
    """The independent yardstick, any scorer; none where the name is `none`."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype):
        self.name = name
        self.scorer = None if name == "none" else load_scorer(name, device=device, dtype=dtype, flag="--judge")

    def __bool__(self) -> bool:
        return self.scorer is not None

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        """A score a picture, higher is better."""
        assert self.scorer is not None
        return self.scorer.score_images(images, prompts).numpy().astype(float)


def stacked(each: Sequence[PromptEmbeds]) -> PromptEmbeds:
    """Conditionings of one prompt each as one."""
    return Conditioning.cat(each)


@dataclass
class Evaluation:
    """Plain samples of held-out prompts with fixed seeds; arrays of one value a picture."""

    reward: np.ndarray
    judge: np.ndarray
    """NaN without a judge."""
    diversity: float
    """Mean distance between a prompt's pictures in latent space, root mean square."""
    prompt: np.ndarray
    images: list[Image.Image]


class Aligner:
    """The generator with its LoRA, its optimizer, and the loop."""

    def __init__(self, config: Grpo, accelerator: Accelerator, folder: Run):
        self.config, self.accelerator, self.folder = config, accelerator, folder
        device = accelerator.device
        frozen = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[accelerator.mixed_precision]
        self.prompts = read_prompts(config)
        self.generator = Generator.load(
            config.generator,
            revision=config.revision,
            device=device,
            dtype=frozen,
            text_encoder_3=config.text_encoder_3,
            max_sequence_length=config.max_sequence_length,
            attention=config.attention,
        )
        self.rewards = Rewards(
            [(config.reward, 1.0), *map(parse_term, config.add_rewards)],
            device=device,
            dtype=frozen,
            attention=config.attention,
            draws=config.reward_draws,
            spread_penalty=config.spread_penalty,
            ceiling=config.reward_ceiling,
        )
        for text in self.rewards.share_encoders(self.generator):
            folder.warn(text)
        self.rewards.check_latents(self.generator)
        if config.spread_penalty and len(self.rewards.states) * config.reward_draws < 2:
            raise InputError(
                "--spread-penalty: one reward model with one draw has no spread",
                hint="add a reward model by --add-reward, or --set reward_draws=4",
            )
        self.judge = Judge(config.judge, device, frozen)
        if self.judge.scorer is not None:
            for split in ("val", "test"):
                self.judge.scorer.check_prompts(self.prompts[split][: config.eval_prompts])
        self.embeds: dict[str, PromptEmbeds] = {}
        self.reward_embeds: dict[str, list[PromptEmbeds]] = {}
        self.negative = self.generator.encode_negative("", config.guidance_scale)
        side = config.resolution or self.generator.image_size
        self.shape = self.generator.latent_shape(side, side)
        self.reference = None
        """With full fine-tuning the frozen first policy, where the KL asks for it; a LoRA is switched off instead."""
        self.trained = self.start_learning()
        self.optimizer = torch.optim.AdamW(self.trained, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.ema = EMAModel(self.trained, decay=config.ema_decay) if config.ema_decay else None
        self.plan = Plan(
            algorithm=config.algorithm,
            num_inference_steps=config.steps,
            guidance_scale=config.guidance_scale,
            step_rule=config.step_rule,
            noise_level=config.noise_level,
            group_size=config.group_size,
            window=(config.window[0], config.window[1]),
            follow=config.follow,
            min_std=config.min_std,
            global_std=config.global_std,
        )
        self.update = 0
        self.spent = 0.0
        """Seconds of training with its evaluations, over all starts of the run."""
        self.learning = 0.0
        """Seconds of rollouts and updates alone."""
        self.calls = [0, 0]
        self.history: list[dict[str, float]] = []
        self.stopped: str | None = None
        self.metrics = Parts(folder.folder / "metrics", "grpo_metrics", folder.id)
        self.rollouts = Parts(folder.folder / "rollouts", "rollouts", folder.id)
        self.evals = Parts(folder.folder / "evals", "grpo_evals", folder.id)
        if config.track and accelerator.is_main_process:
            accelerator.init_trackers("drm-grpo")

    def start_learning(self) -> list[torch.nn.Parameter]:
        """Make the transformer's LoRA, or all of it, trainable in float32. Raises InputError for targets that are not there."""
        config, transformer, family = self.config, self.generator.transformer, self.generator.family
        transformer.requires_grad_(config.train == "full")
        if config.train == "lora":
            torch.manual_seed(seed_of("lora", config.seed))
            try:
                transformer.add_adapter(lora_config(config, family))
            except ValueError as error:
                fact = " ".join(str(error).split())
                raise InputError(
                    f"--set lora_targets: {fact}", hint=f"for example {list(self.generator.family.lora_targets)[:4]}"
                ) from None
        elif config.kl_beta:
            self.reference = copy.deepcopy(transformer).requires_grad_(False)
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        for parameter in family.unread(family.blocks(transformer)):
            parameter.requires_grad_(False)
        return [p for p in transformer.parameters() if p.requires_grad]

    # --- prompts ------------------------------------------------------------------------------------------------------

    def cond(self, texts: Sequence[str]) -> tuple[PromptEmbeds, list[PromptEmbeds]]:
        """Conditioning for the generator and for each reward model; each text is encoded once."""
        # One by one: in a batch the last bits depend on the company, and so on where a run was taken up again.
        for text in texts:
            if text not in self.embeds:
                own = self.embeds[text] = self.generator.encode_prompts([text])
                self.reward_embeds[text] = self.rewards.encode([text], own, self.generator)
        many = [self.reward_embeds[t] for t in texts]
        return stacked([self.embeds[t] for t in texts]), [stacked(list(one)) for one in zip(*many)]

    def reward_of(
        self, x: Tensor, sigma: float, cond: PromptEmbeds, reward_cond: list[PromptEmbeds], texts: list[str]
    ) -> Tensor:
        """Rewards [B] of states [B, C, H, W] where they are, or of the clean latents that the policy predicts from them."""
        rewards, clean = self.rewards, x
        if sigma > 0 and (rewards.needs_pictures or self.config.score_at == "clean"):
            self.calls[0] += len(x) * (1 if self.negative is None else 2)
            velocity = self.generator.velocity(x, sigma, cond, self.negative, self.config.guidance_scale)
            clean = predict_x0(x, velocity, sigma)
        if self.config.score_at == "clean":
            x, sigma = clean, 0.0
        return rewards(x, sigma, reward_cond, texts, lambda: self.generator.decode(clean))

    # --- one update ---------------------------------------------------------------------------------------------------

    def collect(self) -> tuple[Rollouts, list[str], PromptEmbeds]:
        """Trajectories for this process's share of the update's prompts."""
        config, accelerator = self.config, self.accelerator
        rng = np.random.default_rng(seed_of("prompts", config.seed, self.update))
        train = self.prompts["train"]
        picked = [
            train[i]
            for i in rng.choice(len(train), config.prompts_per_update, replace=len(train) < config.prompts_per_update)
        ]
        share = config.prompts_per_update // accelerator.num_processes
        mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        seeds = [seed_of("rollout", config.seed, self.update, i) for i in range(config.prompts_per_update)][mine]
        texts = picked[mine]
        cond, reward_cond = self.cond(texts)

        # The noise of an ensemble of draws is the update's own, so that a resumed run draws the same.
        self.rewards.rng.manual_seed(seed_of("draws", config.seed, self.update, accelerator.process_index))

        def score(x: Tensor, sigma: float, owner: Tensor) -> Tensor:
            return self.reward_of(
                x, sigma, cond[owner], [c[owner] for c in reward_cond], [texts[i] for i in owner.tolist()]
            )

        with accelerator.autocast():
            rollouts = roll_out(
                self.generator,
                score,
                cond,
                self.plan,
                negative=self.negative,
                shape=self.shape,
                seeds=seeds,
                max_batch=config.max_batch,
            )
        return rollouts, texts, cond

    def learn(self, rollouts: Rollouts, cond: PromptEmbeds) -> dict[str, float]:
        """Gradient steps on one batch of rollouts. Returns what the metrics row shows."""
        config, accelerator = self.config, self.accelerator
        total = (
            len(rollouts.visits)
            * config.prompts_per_update
            * (config.group_size if config.algorithm == "flow-grpo" else 1)
        )
        sums = torch.zeros(5, device=accelerator.device)  # loss, ratio, clipped, kl, states
        norm = 0.0
        for _ in range(config.inner_epochs):
            for visit in rollouts.visits:
                for part in torch.arange(len(visit.states), device=accelerator.device).split(config.micro_batch_size):
                    with accelerator.autocast():
                        loss, shown = self.part_loss(visit, part, cond)
                    weight = len(part) / total
                    if not bool(torch.isfinite(loss)):
                        raise RunError(
                            f"update {self.update}: the loss is not finite",
                            hint="lower --lr, or use --dtype fp32 or bf16",
                        )
                    (loss * weight).backward()
                    sums += torch.cat(
                        [
                            loss.detach()[None] * len(part),
                            shown * len(part),
                            torch.ones(1, device=loss.device) * len(part),
                        ]
                    )
            norm = self._step()
        sums = accelerator.reduce(sums, "sum")
        loss, ratio, clipped, kl = (sums[:4] / sums[4]).tolist()
        return {"loss": loss, "ratio": ratio, "clip_fraction": clipped, "kl": kl, "grad_norm": norm}

    def part_loss(self, visit: Visit, part: Tensor, cond: PromptEmbeds) -> tuple[Tensor, Tensor]:
        """Loss of some states of a visit, and [mean ratio, clip fraction, KL]. One velocity serves all their candidates."""
        config = self.config
        new = self._law(visit, part, cond)
        old = Step(visit.mean[part], new.std)
        k = visit.actions.shape[1]

        def spread(step: Step) -> Step:
            return Step(step.mean.repeat_interleave(k, 0), step.std.expand(len(part), 1, 1, 1).repeat_interleave(k, 0))

        ratio = log_ratio(visit.actions[part].flatten(0, 1), spread(new), spread(old), form=config.log_prob)
        advantages = visit.advantages[part].flatten().clamp(-config.advantage_clip, config.advantage_clip)
        policy = clipped_policy_loss(ratio, advantages, clip_range=config.clip_range)
        loss = policy.loss * (visit.std if config.noise_weight else 1.0)
        kl = torch.zeros((), device=loss.device)
        if config.kl_beta:
            with torch.no_grad(), self.before_training():
                reference = self._law(visit, part, cond)
            kl = kl_divergence(new, reference, dt=visit.sigma_next - visit.sigma, form=config.kl_form).mean()
            loss = loss + config.kl_beta * kl
        return loss, torch.stack([policy.ratio, policy.clip_fraction, kl.detach()])

    @contextmanager
    def before_training(self):
        """The policy as it was at the start: the LoRA switched off, or the copy that full fine-tuning keeps for its KL."""
        now = self.generator.transformer
        if self.reference is not None:
            self.generator.pipe.transformer = self.reference
        else:
            now.disable_adapters()
        try:
            yield
        finally:
            if self.reference is not None:
                self.generator.pipe.transformer = now
            else:
                now.enable_adapters()

    def _law(self, visit: Visit, part: Tensor, cond: PromptEmbeds) -> Step:
        velocity = self.generator.velocity(
            visit.states[part], visit.sigma, cond[visit.owner[part]], self.negative, self.config.guidance_scale
        )
        second = float(self.generator.sigmas(self.config.steps, self.shape[1:])[1])
        return STEP_RULES[self.config.step_rule](
            visit.states[part],
            velocity,
            visit.sigma,
            visit.sigma_next,
            noise_level=self.config.noise_level,
            sigma_max=second,
        )

    def _step(self) -> float:
        """Sum the gradients over processes and take one optimizer step. Returns the gradient norm."""
        config = self.config
        if self.accelerator.num_processes > 1:
            for parameter in self.trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad = self.accelerator.reduce(parameter.grad, "sum")
        norm = torch.nn.utils.clip_grad_norm_(self.trained, config.max_grad_norm or math.inf)
        rate = min(1.0, (self.update + 1) / max(1, config.warmup_updates)) if config.warmup_updates else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.trained)
        return float(norm)

    def check(self, rollouts: Rollouts, cond: PromptEmbeds) -> None:
        """Before the first update: the ratio is 1, the KL 0, and the KL has a gradient once weights differ.

        Raises RunError with the numbers: a run that fails here would only waste time.
        """
        if not rollouts.visits:
            raise InputError(
                f"--set window: {list(self.plan.window)} holds none of the {self.config.steps} steps",
                hint="widen the window",
            )
        visit, part = (
            rollouts.visits[0],
            torch.arange(min(4, len(rollouts.visits[0].states)), device=self.accelerator.device),
        )
        with self.accelerator.autocast():
            new = self._law(visit, part, cond)
        old = Step(visit.mean[part], new.std)
        off = float(log_ratio(visit.actions[part][:, 0], new, old).abs().max().detach())
        tolerance = RATIO_TOLERANCE if self.accelerator.mixed_precision == "no" else 1e-2
        if not off <= tolerance:
            raise RunError(
                f"self-check: the log ratio before the first update is {off:.2e}, not 0",
                hint="use --dtype fp32, or report this",
            )
        gradient = torch.autograd.grad(
            (new.mean - old.mean.detach() + 1e-3).square().mean(), self.trained, allow_unused=True
        )
        largest = max((float(g.abs().max()) for g in gradient if g is not None), default=0.0)
        if not largest > 0:
            raise RunError(
                "self-check: the policy has no gradient", hint="report this with the versions of `drm doctor`"
            )
        self.folder.log(f"self-check: log ratio {off:.1e}, largest gradient {largest:.1e}")

    # --- evaluation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, split: str) -> Evaluation:
        """Plain ODE samples of a split's prompts with fixed seeds, as a user would draw them."""
        config = self.config
        texts = [t for t in self.prompts[split][: config.eval_prompts] for _ in range(config.eval_seeds)]
        seeds = [s for _ in self.prompts[split][: config.eval_prompts] for s in range(config.eval_seeds)]
        search = Search(
            num_inference_steps=config.steps, guidance_scale=config.guidance_scale, max_batch=config.max_batch
        )
        if self.ema is not None:
            self.ema.store(self.trained)
            self.ema.copy_to(self.trained)
        latents, rewards = [], []
        self.rewards.rng.manual_seed(seed_of("draws", "evaluation"))
        for i in range(0, len(texts), config.max_batch):
            some = texts[i : i + config.max_batch]
            cond, reward_cond = self.cond(some)
            with self.accelerator.autocast():
                out = sample(
                    self.generator, None, cond, None, seeds[i : i + config.max_batch], search,
                    negative=self.negative, shape=self.shape,
                )  # fmt: skip
                rewards.append(self.reward_of(out.latents, 0.0, cond, reward_cond, some).float().cpu())
            latents.append(out.latents)
            self.folder.reporter.progress(f"evaluate {split}", min(i + config.max_batch, len(texts)), len(texts))
        x = torch.cat(latents)
        images = [image for part in x.split(config.max_batch) for image in self.generator.decode(part)]
        if self.ema is not None:
            self.ema.restore(self.trained)
        groups = x.unflatten(0, (-1, config.eval_seeds)).flatten(2)
        n = config.eval_seeds
        apart = torch.cdist(groups, groups).sum((1, 2)) / max(1, n * (n - 1)) / math.sqrt(groups.shape[2])
        judged = self.judge(images, texts) if self.judge else np.full(len(texts), np.nan)
        prompt = np.repeat(np.arange(len(texts) // n), n)
        return Evaluation(torch.cat(rewards).numpy().astype(float), judged, float(apart.mean()), prompt, images)

    @property
    def measure(self) -> str:
        """What the best point is chosen by."""
        return "judge" if self.judge else "reward"

    def watch(self) -> None:
        """Evaluate on validation prompts, keep the best point, and sound the alarm when the reward is being fooled."""
        found = self.evaluate("val")
        judged = mean_ci(found.judge, found.prompt) if self.judge else None
        reward = mean_ci(found.reward, found.prompt)
        row = {
            "update": self.update,
            "reward": reward.value,
            "judge": judged.value if judged else math.nan,
            "diversity": found.diversity,
            "seconds": self.learning,
        }
        self.history.append(row)
        self.evals.add(split="val", **row)
        grid = [
            i.resize((96, 96), Image.Resampling.NEAREST if i.width < 96 else Image.Resampling.LANCZOS)
            for i in found.images[:32]
        ]
        if self.accelerator.is_main_process:
            with guarded(self.folder.folder):
                make_image_grid(grid[: len(grid) // 8 * 8] or grid, max(1, len(grid) // 8), min(8, len(grid))).save(
                    self.folder.path("samples", f"step-{self.update:06d}", "grid.png")
                )
        best = max(self.history, key=lambda r: r[self.measure])
        if best is row:
            self.best_judge = found.judge
            self.save_policy(self.folder.folder / self.product)
        judge_text = f", judge {row['judge']:.3f}" if self.judge else ""
        self.folder.note(
            f"update {self.update}: reward {row['reward']:+.3f}{judge_text}, diversity {row['diversity']:.3f}"
        )
        if self.judge and best is not row and self.config.on_hacking != "ignore":
            gap = paired_ci(found.judge, self.best_judge, found.prompt)
            lost = -gap.value > ALARM_SHARE * (best["judge"] - self.history[0]["judge"])
            if row["reward"] > best["reward"] and gap.ci95[1] < 0 and lost:
                text = (
                    f"update {self.update}: the reward rose to {row['reward']:+.3f} while the judge fell by {-gap.value:.3f} since"
                    f" update {int(best['update'])}: the reward model is being fooled; {self.product}/ is update {int(best['update'])}"
                )
                self.folder.warn(text)
                if self.config.on_hacking == "stop":
                    self.stopped = text
        target = self.config.target
        if target is not None and row[self.measure] >= target and self.stopped is None:
            self.stopped = f"update {self.update}: the {self.measure} is at the target of {target:g}"
            self.folder.note(self.stopped)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def train(self, interruptions: Interruptions) -> None:
        """Updates until the last, the time limit, or the alarm."""
        config = self.config
        if not self.history:
            self.watch()
        began = time.monotonic()
        while self.update < config.updates and self.stopped is None:
            if config.max_time is not None and self.spent + time.monotonic() - began > 60 * config.max_time:
                self.folder.note(f"time limit of {config.max_time:g} minutes at update {self.update}")
                break
            started = time.monotonic()
            rollouts, texts, cond = self.collect()
            if self.update == 0:
                self.check(rollouts, cond)
            row = self.learn(rollouts, cond)
            self.update += 1
            self.learning += time.monotonic() - started
            self.calls[0] += rollouts.generator_calls
            self.calls[1] += rollouts.reward_calls
            self.record(rollouts, texts, row, time.monotonic() - started)
            last = self.update == config.updates
            if (config.eval_every and self.update % config.eval_every == 0) or last:
                self.watch()
            asked = interruptions.asked
            if asked or (config.save_every and self.update % config.save_every == 0) or last or self.stopped:
                self.save(self.spent + time.monotonic() - began)
            if asked and not last and self.stopped is None:
                raise interruptions.stop(f"update {self.update} of {config.updates} is saved in {self.folder.folder}")
        self.spent += time.monotonic() - began

    def record(self, rollouts: Rollouts, texts: list[str], row: dict[str, float], seconds: float) -> None:
        """A row of metrics, and every reward of the rollouts."""
        rewards = torch.cat([v.rewards for v in rollouts.visits])
        shown = row | {
            "reward_mean": float(rewards.mean()),
            "group_std": float(rewards.std(1).mean()),
            "skipped_groups": float(1 - torch.cat([v.signal for v in rollouts.visits]).float().mean()),
            "seconds": seconds,
        }
        self.metrics.add(update=self.update, lr=self.optimizer.param_groups[0]["lr"], **shown)
        self.accelerator.log(shown, step=self.update)
        for visit in rollouts.visits:
            advantages = visit.advantages.reshape(visit.rewards.shape).tolist()
            for i, text in enumerate(texts):
                for k, reward in enumerate(visit.rewards[i].tolist()):
                    self.rollouts.add(
                        update=self.update, prompt_id=text_id(text), prompt=text, group=i, step=visit.step, sigma=visit.sigma,
                        sigma_next=visit.sigma_next, candidate=k, score=reward, advantage=advantages[i][k],
                        log_prob=self._log_prob(visit, i, k), kept=bool(visit.kept[i, k]),
                    )  # fmt: skip
        pictures = sum(len(v.rewards.flatten()) for v in rollouts.visits)
        judge = {"judge": self.history[-1]["judge"]} if self.judge else {}
        self.folder.reporter.progress(
            "align",
            self.update,
            self.config.updates,
            reward=shown["reward_mean"],
            **judge,
            spread=shown["group_std"],
            ratio=shown["ratio"],
            clipped=shown["clip_fraction"],
            kl=shown["kl"],
            **{"images/s": pictures / max(seconds, 1e-9)},
        )

    def _log_prob(self, visit: Visit, i: int, k: int) -> float:
        """Mean log-density of one action under the policy that drew it."""
        state, action = (i, k) if visit.actions.shape[1] > 1 else (i * visit.rewards.shape[1] + k, 0)
        z = (visit.actions[state, action] - visit.mean[state]) / visit.std
        return float((-0.5 * z.square() - math.log(visit.std) - 0.5 * math.log(2 * math.pi)).mean())

    # --- files --------------------------------------------------------------------------------------------------------

    @property
    def product(self) -> str:
        """Folder of the best policy; the last one has -last in its name."""
        return "lora" if self.config.train == "lora" else "generator"

    def save_policy(self, target: Path) -> None:
        """The policy as plain diffusers loads it, with a card: a LoRA, or a whole pipeline."""
        if not self.accelerator.is_main_process:
            return
        config, transformer = self.config, self.generator.transformer
        if self.ema is not None:
            self.ema.store(self.trained)
            self.ema.copy_to(self.trained)
        pipeline = type(self.generator.pipe).__name__
        with atomic_folder(target) as part:
            if config.train == "lora":
                self.generator.family.save_lora(part, transformer, type(self.generator.pipe))
                use = f"pipe = {pipeline}.from_pretrained(BASE)\npipe.load_lora_weights(THIS_FOLDER)"
                what = f"A LoRA of rank {config.lora_rank}, alpha {config.lora_alpha}"
            else:
                self.generator.pipe.save_pretrained(part, safe_serialization=True)
                use, what = f"pipe = {pipeline}.from_pretrained(THIS_FOLDER)", "A whole pipeline"
            (part / "README.md").write_text(
                f"---\nlibrary_name: diffusers\ntags: [{config.train}, text-to-image]\n---\n\n# Aligned by `drm grpo`\n\n"
                f"{what}: {config.algorithm}, update {self.update}, base `{config.generator}`, reward `{config.reward}`.\n\n"
                f"```python\n{use}\n```\n\nThe licence of the base model applies.\n"
            )
        if self.ema is not None:
            self.ema.restore(self.trained)

    def load_policy(self, where: Path | None) -> None:
        """Weights that `save_policy` left, in place of the current ones; with full fine-tuning None is the run's first policy."""
        from peft.utils import set_peft_model_state_dict

        config, transformer = self.config, self.generator.transformer
        if where is None or config.train == "full":
            source = str(where or local_or_hub(config.generator, "--generator"))
            revision = None if where else config.revision
            kept = load_denoiser(self.generator.family, source, revision=revision, dtype=torch.float32)
            transformer.load_state_dict(kept.state_dict())
            return
        layers = load_file(where / "pytorch_lora_weights.safetensors")
        set_peft_model_state_dict(
            transformer, {k.removeprefix(f"{self.generator.family.denoiser}."): v for k, v in layers.items()}
        )

    def save(self, spent: float) -> None:
        """A complete checkpoint of this update."""
        if self.accelerator.is_main_process:
            for parts in (self.metrics, self.rollouts, self.evals):
                parts.flush(self.update)
            state = {
                "spent": spent,
                "learning": self.learning,
                "calls": self.calls,
                "history": self.history,
                "stopped": self.stopped,
            }
            tensors = {f"lora.{i}": p.detach().cpu() for i, p in enumerate(self.trained)}
            for i, p in enumerate(self.trained):
                tensors |= {f"adam.{i}.{k}": torch.as_tensor(v).cpu() for k, v in self.optimizer.state[p].items()}
            if self.ema is not None:
                tensors |= {f"ema.{i}": t.cpu().contiguous() for i, t in enumerate(self.ema.shadow_params)}
                state["ema_step"] = self.ema.optimization_step
            if self.judge:
                tensors["best_judge"] = torch.from_numpy(np.asarray(self.best_judge, dtype=np.float64))
            with atomic_folder(checkpoint_folder(self.folder, self.update)) as part:
                save_file({k: v.contiguous() for k, v in tensors.items()}, part / "state.safetensors")
                write_text(part / "state.json", json.dumps(state))
                seal(part)
            retire_checkpoints(self.folder, self.config.keep_checkpoints, set())
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Take up the newest complete checkpoint, if there is one."""
        found = latest_checkpoint(self.folder)
        if found is not None:
            self.update, where = found
            state = json.loads((where / "state.json").read_text())
            tensors = load_file(where / "state.safetensors")
            self.spent, self.learning, self.calls, self.history, self.stopped = (
                state[k] for k in ("spent", "learning", "calls", "history", "stopped")
            )
            with torch.no_grad():
                for i, p in enumerate(self.trained):
                    p.copy_(tensors[f"lora.{i}"])
                    kept = {k.split(".")[2]: v for k, v in tensors.items() if k.startswith(f"adam.{i}.")}
                    if kept:
                        self.optimizer.state[p] = {k: v.to(p.device) for k, v in kept.items()}
            if self.ema is not None:
                self.ema.shadow_params = [tensors[f"ema.{i}"].to(p.device) for i, p in enumerate(self.trained)]
                self.ema.optimization_step = state["ema_step"]
            if self.judge:
                self.best_judge = tensors["best_judge"].numpy()
            self.folder.note(f"went on from update {self.update}")
        if self.accelerator.is_main_process:
            for parts in (self.metrics, self.rollouts, self.evals):
                parts.drop_after(self.update if found else -1)

    def finish(self) -> dict[str, Any]:
        """Report before and after on test prompts, which chose nothing."""
        config, folder = self.config, self.folder
        self.save_policy(folder.folder / f"{self.product}-last")
        before, after = self.evaluate_saved()
        pairs = {"reward": (before.reward, after.reward)} | (
            {"judge": (before.judge, after.judge)} if self.judge else {}
        )
        gains = {name: paired_ci(b, a, before.prompt) for name, (a, b) in pairs.items()}
        best = max(self.history, key=lambda r: r[self.measure])
        summary: dict[str, Any] = {
            "lora": str(folder.folder / "lora") if config.train == "lora" else None,
            "lora_last": str(folder.folder / "lora-last") if config.train == "lora" else None,
            "generator": str(folder.folder / "generator") if config.train == "full" else config.generator,
            "seed": config.seed,
            "device": str(self.accelerator.device),
            "dtype": self.accelerator.mixed_precision if self.accelerator.mixed_precision != "no" else "fp32",
            "seconds": round(time.monotonic() - folder.started, 2),
            "train_seconds": round(self.spent, 2),
            "learn_seconds": round(self.learning, 2),
            "algorithm": config.algorithm,
            "updates": self.update,
            "best_update": int(best["update"]),
            "stopped": self.stopped,
            "reward_before": float(before.reward.mean()),
            "reward_after": float(after.reward.mean()),
            "reward_gain_ci95": list(gains["reward"].ci95),
            "judge_before": float(before.judge.mean()) if self.judge else None,
            "judge_after": float(after.judge.mean()) if self.judge else None,
            "judge_gain_ci95": list(gains["judge"].ci95) if self.judge else None,
            "diversity_before": before.diversity,
            "diversity_after": after.diversity,
            "generator_calls": self.calls[0],
            "reward_calls": self.calls[1],
            "history": [{k: None if math.isnan(v) else v for k, v in row.items()} for row in self.history],
        }
        if self.accelerator.is_main_process:
            for parts in (self.metrics, self.rollouts, self.evals):
                parts.flush(self.update)
            with guarded(folder.folder):
                self.before_and_after(before, after)
                reward_and_judge(folder.folder / "curve.png", self.history, title=folder.folder.name)
            summary = folder.finish(summary)
        self.accelerator.end_training()
        return summary

    def evaluate_saved(self) -> tuple[Evaluation, Evaluation]:
        """Test prompts before the run and with the best policy it saved."""
        now, ema, self.ema = [p.detach().clone() for p in self.trained], self.ema, None
        self.load_policy(self.folder.folder / self.product)
        after = self.evaluate("test")
        if self.config.train == "full":
            self.load_policy(None)
            before = self.evaluate("test")
        else:
            with self.before_training():
                before = self.evaluate("test")
        with torch.no_grad():
            for p, value in zip(self.trained, now):
                p.copy_(value)
        self.ema = ema
        return before, after

    def before_and_after(self, before: Evaluation, after: Evaluation) -> None:
        """Test pictures before, and under them after."""
        n = self.config.eval_seeds
        tiles = [e.images[i * n] for e in (before, after) for i in range(min(8, len(before.images) // n))]
        small = tiles[0].width < 128
        tiles = [t.resize((128, 128), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS) for t in tiles]
        tiles = [ImageOps.expand(t, border=2, fill="#c8ccd0") for t in tiles]
        make_image_grid(tiles, 2, len(tiles) // 2).save(self.folder.path("before_after.png"))


def plan(config: Grpo) -> dict[str, Any]:
    """What `--dry-run` prints."""
    from drmcli.flow import schedule
    from drmcli.recipes.plan import describe_generator
    from drmcli.rollout import trained

    known = describe_generator(config)
    prompts = read_prompts(config)
    made = Plan(
        algorithm=config.algorithm, num_inference_steps=config.steps, window=(config.window[0], config.window[1])
    )
    sigmas = schedule(config.steps)
    steps = sum(trained(made, sigmas, i) for i in range(config.steps))
    each = config.group_size if config.algorithm == "flow-grpo" else 1
    device = pick_device(config.device)
    return {
        "updates": config.updates,
        "prompts": {split: len(texts) for split, texts in prompts.items()},
        "trained steps of a trajectory": steps,
        "states an update (a forward and a backward pass each)": steps * config.prompts_per_update * each,
        "rewards an update": config.prompts_per_update * config.group_size * (1 if each > 1 else steps),
        "memory": memory_plan(config, known, device),
        "download": known.download,
    }


def memory_plan(config: Grpo, known: Known, device: torch.device) -> dict[str, Any]:
    """Bytes of an update's tensors, and the frozen models beside the policy."""
    mixed = pick_dtype(config.dtype, device)
    policy = plan_policy(
        known.family,
        known.transformer,
        lora=lora_config(config, known.family) if config.train == "lora" else None,
        states=min(config.micro_batch_size, config.prompts_per_update),
        latent_side=(config.resolution or known.image_size) // known.vae_factor,
        tokens=known.prompt_tokens,
        mixed=mixed,
        ema=config.ema_decay > 0,
        guided=config.guidance_scale != 1,
    )
    beside = dict(known.beside(mixed))
    if not config.text_encoder_3:
        beside.pop("text_encoder_3", None)
    where = Path(package_path(config.reward))
    if where.is_dir():
        reward = read_config(where, f"--reward {config.reward}")
        with torch.device("meta"):
            model = RewardModel.from_config(reward)
        beside["reward model"] = sum(p.numel() for p in model.parameters()) * mixed.itemsize
    if config.train == "full" and config.kl_beta:
        beside["reference policy"] = policy.parameters * mixed.itemsize
    cuda = device.type == "cuda"
    total = {c: policy.total(checkpointed=c, cuda=cuda) + sum(beside.values()) for c in (False, True)}
    return policy.to_dict() | {"beside": beside, "total": total[False], "total_checkpointed": total[True]}
