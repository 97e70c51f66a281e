"""`drm train-reward`: preference pairs -> cached latents and embeddings -> noised alike -> scores -> preference loss.

The loop draws everything random from the seed and the step's number, for the whole global batch: a resumed run, another
split into micro-batches, or another number of processes sees the same pairs, noise levels and noise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling
from safetensors.torch import load_file, save_file
from torch import Tensor

from drmcli.config import TrainReward
from drmcli.data import cache
from drmcli.data.preferences import Preferences
from drmcli.errors import InputError, RunError
from drmcli.families.base import Conditioning
from drmcli.flow import add_noise
from drmcli.generator import pick_device, pick_dtype, use_attention
from drmcli.losses import bradley_terry, thurstone
from drmcli.measure.protocols import Pairs, accuracy
from drmcli.memory import plan_training, store_frozen_in
from drmcli.recipes.initial import learns, make_model
from drmcli.recipes.launch import agreed, share_folder, start_accelerator
from drmcli.recipes.pairs import (
    EncodedPairs,
    LazyGenerator,
    PairScorer,
    PairStream,
    encode_pairs,
    first_pairs,
    load_preferences,
    parse_ratio,
    strict,
)
from drmcli.results import Parts
from drmcli.reward import RewardModel
from drmcli.reward_config import RewardConfig
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
from drmcli.tiny.shapes import GROUP


def run(config: TrainReward, reporter: Reporter) -> dict[str, Any]:
    """Train a reward model. Returns what summary.json holds."""
    accelerator = make_accelerator(config)
    share_folder("train-reward", config, accelerator)
    with open_run("train-reward", config, reporter, main=accelerator.is_main_process) as folder:
        if folder.finished:
            folder.note(f"{folder.folder} is finished; --overwrite trains again")
            return folder.finished
        device = accelerator.device
        check_sizes(config, accelerator.num_processes)
        model = make_model(config)  # first: encoding takes long, and a model that does not fit should be said before
        generator = LazyGenerator.of(config, device)
        sets, ratios, held_out = load_data(config, generator, folder.reporter)
        encoded = []
        for data in (*sets, held_out):
            pairs, _, warnings = encode_pairs(
                data,
                config,
                generator,
                folder,
                resolution=config.resolution,
                workers=cache.Workers(accelerator.process_index, accelerator.num_processes, gather_object),
            )
            for text in warnings:
                folder.warn(text)
            encoded.append(pairs)
        generator.free()
        train, evaluation = encoded[:-1], encoded[-1]
        use_attention(model.transformer, config.attention)
        store_frozen_in(model, pick_dtype(config.dtype, device))
        trainer = Trainer(config, accelerator, folder, model, train, ratios, PairScorer(evaluation))
        with Interruptions() as interruptions:
            trainer.resume()
            trainer.train(interruptions)
        return trainer.finish()


def make_accelerator(config: TrainReward) -> Accelerator:
    """One accumulation round is one optimizer step, also at the end of the data: the stream has no end."""
    accelerator = start_accelerator(config, rounds=micro_batches(config, 1)[0])
    accelerator.gradient_accumulation_steps = micro_batches(config, accelerator.num_processes)[0]
    return accelerator


def micro_batches(config: TrainReward, processes: int) -> tuple[int, int]:
    """(number of forward passes a step and process, pairs in each)."""
    share = config.batch_size // max(1, processes)
    size = min(config.micro_batch_size or share, max(1, share))
    return max(1, share // size), size


def check_sizes(config: TrainReward, processes: int) -> None:
    count, size = micro_batches(config, processes)
    if count * size * processes != config.batch_size:
        raise InputError(
            f"--set batch_size: {config.batch_size} pairs do not split into {processes} processes of whole micro-batches of {size}",
            hint="choose a batch_size that is a multiple of processes x micro_batch_size",
        )
    if config.sigma_min > config.sigma_max:
        raise InputError(f"--set sigma_min: {config.sigma_min} is above sigma_max {config.sigma_max}", hint="swap them")


def load_data(
    config: TrainReward, generator: LazyGenerator, reporter: Reporter
) -> tuple[list[Preferences], list[float], Preferences]:
    """Training sets with their ratios, and the held-out pairs."""
    named = [parse_ratio(item) for item in config.data]
    sets = [load_preferences(name, "train", config, generator, reporter, flag="--data") for name, _ in named]
    ratios = [ratio for _, ratio in named]
    if config.eval_data:
        held = [
            load_preferences(name, "test", config, generator, reporter, flag="--eval-data") for name in config.eval_data
        ]
        return sets, ratios, held[0] if len(held) == 1 else combine(held)
    if any(name == "shapes" for name, _ in named):
        prompts = -(-config.eval_pairs // 5)
        held_out = load_preferences("shapes", "test", config, generator, reporter, flag="--eval-data", prompts=prompts)
        return sets, ratios, first_pairs(strict(held_out), config.eval_pairs)
    parts = []
    for i, data in enumerate(sets):
        sets[i], held_out = data.split_by_prompt(min(0.2, max(0.02, config.eval_pairs / len(data))), config.seed)
        parts.append(first_pairs(strict(held_out), -(-config.eval_pairs // len(sets))))
    return sets, ratios, parts[0] if len(parts) == 1 else combine(parts)


def combine(sets: list[Preferences]) -> Preferences:
    """Several sets end to end."""
    from drmcli.data.datasets import mix

    return mix(sets, [float(len(s)) for s in sets], seed=0)


@dataclass
class Batch:
    """One micro-batch: pictures once each, pairs as positions among them. U pictures, N pairs."""

    latents: Tensor
    """[U, C, H, W] clean."""
    noise: Tensor
    """[U, C, H, W]."""
    sigma: Tensor
    """[U]."""
    cond: Conditioning
    """U rows."""
    chosen: Tensor
    """[N] positions among the pictures."""
    rejected: Tensor
    """[N]."""
    label: Tensor
    """[N]."""
    weight: Tensor
    """[N]; the weights of a global batch sum to 1."""

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


class Batches:
    """Micro-batches of any step, the same whatever came before."""

    def __init__(self, config: TrainReward, sets: list[EncodedPairs], ratios: list[float]):
        self.config = config
        self.sets = sets
        self.streams = [PairStream(s.prompt, seed_of(config.seed, i)) for i, s in enumerate(sets)]
        shares = np.array(ratios) / sum(ratios)
        counts = np.floor(shares * config.batch_size).astype(int)
        order = np.argsort(counts - shares * config.batch_size, kind="stable")
        counts[order[: config.batch_size - counts.sum()]] += 1
        self.counts = counts.tolist()

    def global_batch(self, step: int) -> list[tuple[int, int]]:
        """(set, pair) of every pair of a step."""
        return [
            (i, int(pair))
            for i, (stream, count) in enumerate(zip(self.streams, self.counts))
            if count
            for pair in stream.take(step * count, count)
        ]

    def micro(self, step: int, processes: int, process: int) -> list[Batch]:
        """The micro-batches of one process. Noise levels and noise are drawn for the global batch and then cut."""
        config = self.config
        members = self.global_batch(step)
        rng = torch.Generator().manual_seed(seed_of("step", config.seed, step))
        groups = {key: g for g, key in enumerate(dict.fromkeys((i, int(self.sets[i].prompt[p])) for i, p in members))}
        sigma = draw_sigmas(config, len(groups), rng)
        pictures = [(i, int(side[p])) for i, p in members for side in (self.sets[i].chosen, self.sets[i].rejected)]
        seeds = {key: g for g, key in enumerate(dict.fromkeys(pictures))} if not config.shared_noise else groups
        shape = self.sets[0].encoded.latents([int(self.sets[0].chosen[0])]).shape[1:]
        noise = torch.randn((len(seeds), *shape), generator=rng)
        total = sum(float(self.sets[i].weight[p]) for i, p in members)
        count, size = micro_batches(config, processes)
        start = process * count * size
        return [
            self._cut(members[start + m * size : start + (m + 1) * size], groups, seeds, sigma, noise, total)
            for m in range(count)
        ]

    def _cut(
        self,
        members: list[tuple[int, int]],
        groups: dict[tuple[int, int], int],
        seeds: dict[tuple[int, int], int],
        sigma: Tensor,
        noise: Tensor,
        total: float,
    ) -> Batch:
        # A picture counts once for each prompt it is judged by.
        place: dict[tuple[int, int, int], int] = {}
        chosen: list[int] = []
        rejected: list[int] = []
        label: list[float] = []
        weight: list[float] = []
        for i, p in members:
            s = self.sets[i]
            prompt = int(s.prompt[p])
            for side, out in ((s.chosen, chosen), (s.rejected, rejected)):
                out.append(place.setdefault((i, prompt, int(side[p])), len(place)))
            label.append(float(s.label[p]))
            weight.append(float(s.weight[p]) / total)
        items = list(place)
        group = torch.tensor([groups[(i, prompt)] for i, prompt, _ in items])
        source = group if self.config.shared_noise else torch.tensor([seeds[(i, image)] for i, _, image in items])
        latents, conds = [], []
        for i, s in enumerate(self.sets):
            mine = [(prompt, image) for j, prompt, image in items if j == i]
            if mine:
                latents.append(s.encoded.latents([image for _, image in mine]))
                unique = list(dict.fromkeys(prompt for prompt, _ in mine))
                cond = s.encoded.prompts(unique)
                at = torch.tensor([unique.index(prompt) for prompt, _ in mine])
                conds.append(cond[at])
        return Batch(
            latents=torch.cat(latents),
            noise=noise[source],
            sigma=sigma[group],
            cond=Conditioning.cat(conds),
            chosen=torch.tensor(chosen),
            rejected=torch.tensor(rejected),
            label=torch.tensor(label),
            weight=torch.tensor(weight),
        )


def draw_sigmas(config: TrainReward, count: int, rng: torch.Generator) -> Tensor:
    """Noise levels [count] in [sigma_min, sigma_max] by the config's density."""
    if config.sigma_density == "fixed":
        return torch.full((count,), config.sigma_max)
    scheme = {"uniform": "none", "logit-normal": "logit_normal"}[config.sigma_density]
    u = compute_density_for_timestep_sampling(scheme, count, config.logit_mean, config.logit_std, generator=rng)
    return config.sigma_min + (config.sigma_max - config.sigma_min) * u.float()


class Trainer:
    """The loop, its state and its checkpoints."""

    def __init__(
        self,
        config: TrainReward,
        accelerator: Accelerator,
        folder: Run,
        model: RewardModel,
        train: list[EncodedPairs],
        ratios: list[float],
        evaluation: PairScorer,
    ):
        self.config, self.accelerator, self.folder = config, accelerator, folder
        self.train_pairs = sum(len(s) for s in train)
        self.batches = Batches(config, train, ratios)
        self.evaluation = evaluation
        self.step = 0
        self.best: tuple[float, int] | None = None
        model.gradient_checkpointing = config.gradient_checkpointing
        backbone = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head.")]
        groups = [
            {"params": list(model.head.parameters()), "lr": config.lr if config.head_lr is None else config.head_lr}
        ]
        if backbone:
            groups.append({"params": backbone, "lr": config.lr})
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=config.weight_decay, fused=True)
        name = "constant_with_warmup" if config.lr_schedule == "constant" else "cosine"
        schedule = get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.steps)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.schedule = schedule  # stepped once an optimizer step, whatever the number of processes
        accelerator.register_for_checkpointing(schedule)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.ema: EMAModel | None = None
        if config.ema_decay:
            self.ema = EMAModel(self.trained, decay=config.ema_decay)
            self.ema.to(accelerator.device)
            accelerator.register_for_checkpointing(self.ema)
        if accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            accelerator.register_save_state_pre_hook(self._save_trained)
            accelerator.register_load_state_pre_hook(self._load_trained)
        self.metrics = Parts(folder.folder / "metrics", "train_reward_metrics", folder.id)
        self.evals = Parts(folder.folder / "evals", "train_reward_evals", folder.id)
        if config.track and accelerator.is_main_process:
            accelerator.init_trackers("drm-train-reward")

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _bare(self) -> RewardModel:
        return self.accelerator.unwrap_model(self.model)

    def _save_trained(self, models: list[Any], weights: list[Any], output_dir: str) -> None:
        """Only what `reward/` would hold goes into a checkpoint: with LoRA, not the whole base again."""
        if self.accelerator.is_main_process:
            tensors = {name: t.detach().cpu().contiguous() for name, t in self._bare().saved_tensors().items()}
            save_file(tensors, Path(output_dir) / "trained.safetensors")
        weights.clear()

    def _load_trained(self, models: list[Any], input_dir: str) -> None:
        self._bare().load_tensors(load_file(Path(input_dir) / "trained.safetensors"), str(input_dir))
        models.clear()

    def save(self) -> None:
        """A complete checkpoint of this step, with the tables up to it."""
        target = checkpoint_folder(self.folder, self.step)
        if self.accelerator.is_main_process:
            self.metrics.flush(self.step)
            self.evals.flush(self.step)
            with atomic_folder(target) as part:
                self._save_state(part)
                write_text(part / "best.txt", "" if self.best is None else f"{self.best[0]!r} {self.best[1]}")
                seal(part)
            keep = set() if self.best is None else {self.best[1]}
            retire_checkpoints(self.folder, self.config.keep_checkpoints, keep)
        elif self.accelerator.distributed_type not in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            self._save_state(target.with_name(f".{target.name}.part"))
        self.accelerator.wait_for_everyone()

    def _save_state(self, part: Path) -> None:
        self.accelerator.save_state(str(part), safe_serialization=True)

    def resume(self) -> None:
        """Take up the newest complete checkpoint, if there is one."""
        found = latest_checkpoint(self.folder)
        if found is None:
            self.step = 0
        else:
            self.step, where = found
            self.accelerator.load_state(str(where))
            best = (where / "best.txt").read_text().split()
            self.best = (float(best[0]), int(best[1])) if best else None
            self.folder.note(f"went on from step {self.step}")
        if self.accelerator.is_main_process:
            self.metrics.drop_after(self.step)
            self.evals.drop_after(self.step)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def train(self, interruptions: Interruptions) -> None:
        """Optimizer steps until the last. An interruption saves a checkpoint and raises Interrupted."""
        config, accelerator = self.config, self.accelerator
        self.model.train()
        processes, process = accelerator.num_processes, accelerator.process_index
        window = Window()
        started = time.monotonic()
        for micro in self._upcoming(processes, process):
            lr = self.schedule.get_last_lr()[-1]
            for batch in micro:
                with accelerator.accumulate(self.model):
                    loss, scores = self._forward(batch.to(accelerator.device))
                    # accelerate divides by the rounds and averages over processes; the loss is a sum over the global batch.
                    accelerator.backward(loss * len(micro) * processes)
                    window.add(loss, scores)
                    if accelerator.sync_gradients and config.max_grad_norm:
                        window.grad_norm = accelerator.clip_grad_norm_(self.trained, config.max_grad_norm)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            self.schedule.step()
            if self.ema is not None:
                self.ema.step(self.trained)
            self.step += 1
            window.close_step(time.monotonic() - started)
            self._after_step(window, lr, interruptions)
            started = time.monotonic()

    def _upcoming(self, processes: int, process: int) -> Iterator[list[Batch]]:
        """The micro-batches of each step left. On a GPU the next ones are read while these are computed.

        Not so on the CPU: a second thread's OpenMP team spins beside the first one's and halves the speed.
        """
        left = range(self.step, self.config.steps)
        if self.accelerator.device.type == "cpu":
            yield from (self.batches.micro(step, processes, process) for step in left)
            return
        with ThreadPoolExecutor(1) as ahead:
            following = None
            for step in left:
                micro = following.result() if following else self.batches.micro(step, processes, process)
                if step + 1 < self.config.steps:
                    following = ahead.submit(self.batches.micro, step + 1, processes, process)
                yield micro

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of a micro-batch (its share of the global one) and scores [N, 2]. Raises RunError when it is not finite."""
        noisy = add_noise(batch.latents, batch.noise, batch.sigma)
        scores = self.model(noisy, batch.sigma, batch.cond)
        chosen, rejected = scores[batch.chosen], scores[batch.rejected]
        if self.config.loss == "thurstone":
            mean = thurstone(chosen, rejected, batch.sigma[batch.chosen], label=batch.label, weight=batch.weight)
        else:
            mean = bradley_terry(chosen, rejected, label=batch.label, weight=batch.weight, margin=self.config.margin)
        loss = mean * batch.weight.sum()
        if not bool(torch.isfinite(loss)):
            raise RunError(
                f"step {self.step}: the loss is not finite",
                hint="lower --lr, use --dtype fp32 or bf16; the last checkpoint is kept, --overwrite starts again",
            )
        return loss, torch.stack([chosen, rejected], dim=1).detach()

    def _after_step(self, window: Window, lr: float, interruptions: Interruptions) -> None:
        config = self.config
        last = self.step == config.steps
        if self.step % config.log_every == 0 or last:
            row = window.row(self.accelerator, config.batch_size)
            scale = float(self._bare().head.log_scale.detach().exp())
            self.metrics.add(step=self.step, lr=lr, score_scale=scale, **row)
            self.accelerator.log(row, step=self.step)
            shown = {"loss": row["loss"], "accuracy": row["accuracy"], "pairs/s": row["pairs_per_second"]}
            self.folder.reporter.progress("train", self.step, config.steps, **shown)
        if config.eval_every and self.step % config.eval_every == 0 and not last:
            self._evaluate_and_note()
        (stop,) = agreed(self.accelerator, interruptions.asked)
        if stop or (config.save_every and self.step % config.save_every == 0) or last:
            self.save()
        if stop and not last:
            raise interruptions.stop(f"step {self.step} of {config.steps} is saved in {self.folder.folder}")

    # --- evaluation ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _averaged(self):
        """The moving average in place of the weights, if there is one."""
        if self.ema is not None:
            self.ema.store(self.trained)
            self.ema.copy_to(self.trained)
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()
            if self.ema is not None:
                self.ema.restore(self.trained)

    @torch.no_grad()
    def evaluate(self) -> list[dict[str, float]]:
        """Accuracy in percent on the held-out pairs at each noise level; every process scores its share."""
        accelerator, config, scorer = self.accelerator, self.config, self.evaluation
        world, size = accelerator.num_processes, config.eval_batch_size
        total = len(scorer.items)
        mine = np.arange(-(-total // world) * world)[accelerator.process_index :: world] % total
        parts = []
        for i in range(0, len(mine), size):
            some = mine[i : i + size]
            with accelerator.autocast():
                parts.append(
                    scorer.score(
                        self.model,
                        some,
                        config.eval_sigmas,
                        noise_samples=1,
                        seed=config.seed,
                        device=accelerator.device,
                    )
                )
            self.folder.reporter.progress("evaluate", min(i + size, len(mine)), len(mine))
        gathered = accelerator.gather(torch.cat(parts)).cpu()
        if world > 1:
            gathered = (
                gathered.reshape(world, -1, len(config.eval_sigmas))
                .transpose(0, 1)
                .reshape(-1, len(config.eval_sigmas))
            )
        scores = gathered[:total].double().numpy()
        return [
            {"sigma": sigma, "accuracy": evaluation_accuracy(scorer, scores[:, j])}
            for j, sigma in enumerate(config.eval_sigmas)
        ]

    def _evaluate_and_note(self) -> None:
        with self._averaged():
            by_sigma = self.evaluate()
        self._record(by_sigma)
        headline = headline_accuracy(by_sigma, self.config.eval_sigma)
        if self.best is None or headline > self.best[0]:
            self.best = (headline, self.step)
        self.folder.note(
            f"step {self.step}: held-out accuracy {headline:.1f} % at noise level {self.config.eval_sigma:g}"
        )

    def _record(self, by_sigma: list[dict[str, float]]) -> None:
        for row in by_sigma:
            self.evals.add(step=self.step, n_pairs=len(self.evaluation.pairs), **row)

    def finish(self) -> dict[str, Any]:
        """Evaluate, save the reward model and the summary."""
        config, folder = self.config, self.folder
        with self._averaged():
            by_sigma = self.evaluate()
            if self.accelerator.is_main_process:
                with atomic_folder(folder.folder / "reward") as part:
                    self._bare().save_pretrained(part)  # type: ignore[operator]
        self._record(by_sigma)
        summary = {
            "reward": str(folder.folder / "reward"),
            "seed": config.seed,
            "device": str(self.accelerator.device),
            "dtype": self.accelerator.mixed_precision if self.accelerator.mixed_precision != "no" else "fp32",
            "seconds": round(time.monotonic() - folder.started, 2),
            "steps": config.steps,
            "train_pairs": self.train_pairs,
            "eval_pairs": len(self.evaluation.pairs),
            "eval_sigma": config.eval_sigma,
            "eval_accuracy": headline_accuracy(by_sigma, config.eval_sigma),
            "eval_by_sigma": by_sigma,
        }
        if self.accelerator.is_main_process:
            with guarded(folder.folder):
                self.evals.flush(self.step)
            summary = folder.finish(summary)
        self.accelerator.end_training()
        return summary


def evaluation_accuracy(scorer: PairScorer, scores: np.ndarray) -> float:
    """Strict accuracy in percent of item scores [N] on the scorer's pairs."""
    pairs = scorer.pairs
    table = Pairs(
        prompt=pairs.prompt,
        label=pairs.label.astype(float),
        score_chosen=scores[scorer.left],
        score_rejected=scores[scorer.right],
        chosen_first=pairs.data.pairs["chosen_first"].to_numpy(bool),
    )
    return accuracy(table, "strict").value


def headline_accuracy(by_sigma: list[dict[str, float]], sigma: float) -> float:
    """Accuracy at the asked noise level, or at the nearest one that was evaluated."""
    return min(by_sigma, key=lambda row: abs(row["sigma"] - sigma))["accuracy"]


class Window:
    """Running sums between two rows of the metrics."""

    def __init__(self) -> None:
        self.grad_norm: Any = None
        self._clear()

    def _clear(self) -> None:
        self.loss: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.seconds = 0.0
        self.steps = 0

    def add(self, loss: Tensor, scores: Tensor) -> None:
        self.loss.append(loss.detach())
        self.scores.append(scores)

    def close_step(self, seconds: float) -> None:
        self.seconds += seconds
        self.steps += 1

    def row(self, accelerator: Accelerator, batch_size: int) -> dict[str, float]:
        """Means since the last row, over all processes."""
        scores = accelerator.gather(torch.cat(self.scores)).float()
        loss = accelerator.reduce(torch.stack(self.loss).sum(), "sum")
        row = {
            "loss": float(loss) / self.steps,
            "grad_norm": math.nan if self.grad_norm is None else float(self.grad_norm),
            "seconds": self.seconds,
            "accuracy": float((scores[:, 0] > scores[:, 1]).float().mean()) * 100,
            "score_std": float(scores.std()),
            "pairs_per_second": batch_size * self.steps / max(self.seconds, 1e-9),
        }
        self._clear()
        return row


def pictures_in(config: TrainReward, pairs: int) -> int:
    """Pictures in a micro-batch of so many pairs: two a pair, but rankings share theirs, as those of `shapes` surely do."""
    if all(parse_ratio(item)[0] == "shapes" for item in config.data):
        return math.ceil(pairs * GROUP / math.comb(GROUP, 2))
    return 2 * pairs


def plan(config: TrainReward) -> dict[str, Any]:
    """What `--dry-run` prints: sizes, memory with and without gradient checkpointing, what would be downloaded."""
    from drmcli.recipes.plan import describe_generator

    check_sizes(config, 1)
    known = describe_generator(config)
    rounds, pairs = micro_batches(config, 1)
    settings = RewardConfig(
        base_model=config.generator,
        transformer=known.transformer,
        family=known.family.name,
        drop_layers=config.drop_layers,
        tap_layers=config.tap_layers,
        head_width=config.head_width,
        head_pool=config.head_pool,
        backbone=learns(config),
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
    )
    device = pick_device(config.device)
    side = (config.resolution or known.image_size) // known.vae_factor
    memory = plan_training(
        settings,
        images=pictures_in(config, pairs),
        latent_side=side,
        tokens=known.prompt_tokens,
        mixed=pick_dtype(config.dtype, device),
        ema=config.ema_decay > 0,
        device_type=device.type,
    )
    return {
        "steps": config.steps,
        "pairs a step": config.batch_size,
        "micro-batches a step": rounds,
        "pictures a micro-batch, at most": pictures_in(config, pairs),
        "image tokens": math.prod(known.family.grid(known.transformer, (side, side))),
        "blocks kept": known.family.depth(known.transformer) - config.drop_layers,
        "memory": memory.to_dict()
        | {
            "total": memory.total(checkpointed=False, cuda=device.type == "cuda"),
            "total_checkpointed": memory.total(checkpointed=True, cuda=device.type == "cuda"),
        },
        "download": known.download,
    }
