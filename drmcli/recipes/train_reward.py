"""`drm train-reward`: preference pairs -> cached latents and embeddings -> noised alike -> scores -> preference loss.

The loop is `train`. Pairs, sigmas and noise come from `drmcli.data.batches`, weights and optimizer are a `Learner`'s, the sharing of
work among processes is `launch` and `sharding`, what is kept `checkpoints`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from drmcli.cards import reward_card
from drmcli.config import TrainReward, to_dict
from drmcli.data import cache
from drmcli.data.batches import Batches, EncodedPairs, check_sizes, micro_batches
from drmcli.data.preferences import Preferences
from drmcli.data.sources import LivePrompts
from drmcli.errors import InputError
from drmcli.generator import pick_dtype
from drmcli.kernels import Kernels, check_trainable
from drmcli.measure.protocols import Accuracy, Pairs, accuracy
from drmcli.memory import store_frozen_in
from drmcli.quantize import refuse_learning
from drmcli.recipes import sharding
from drmcli.recipes.checkpoints import Checkpoints
from drmcli.recipes.initial import check_frozen, learns, make_model
from drmcli.recipes.launch import agreed, ended, refuse_sharding, share_folder, start_accelerator
from drmcli.recipes.learner import Learner, Window
from drmcli.recipes.pairs import (
    MADE,
    LazyGenerator,
    PairScorer,
    encode_pairs,
    first_pairs,
    load_preferences,
    parse_ratio,
    strict,
)
from drmcli.recipes.reward_plan import pictures_in, plan
from drmcli.results import Parts
from drmcli.run import SILENT, Interruptions, Reporter, Run, atomic_folder, guarded, open_run

__all__ = ["Batches", "check_sizes", "make_model", "micro_batches", "pictures_in", "plan", "run", "train"]


def run(config: TrainReward, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Train a reward model. Returns what summary.json holds."""
    refuse_sharding("train-reward", hint="launch without it, and split the weights by --set shard=true")
    accelerator = start_accelerator(config, rounds=micro_batches(config, 1)[0])
    with ended(accelerator):
        return learn(config, accelerator, reporter)


def learn(config: TrainReward, accelerator: Accelerator, reporter: Reporter) -> dict[str, Any]:
    """The part of this process in the run of all."""
    # One accumulation round is one optimizer step, also at the end of the data: the stream has no end.
    accelerator.gradient_accumulation_steps = micro_batches(config, accelerator.num_processes)[0]
    share_folder("train-reward", config, accelerator)
    with open_run("train-reward", config, reporter, main=accelerator.is_main_process) as folder:
        if folder.finished:
            folder.note(f"{folder.folder} is finished; --overwrite trains again")
            return folder.finished
        check_sizes(config, accelerator.num_processes)
        sharding.check(config.shard, accelerator)
        if config.no_cache and accelerator.num_processes > 1:
            raise InputError(
                "--no-cache: several processes share what they encode", hint="name a folder with --cache-dir"
            )
        check_frozen(config)
        frozen = pick_dtype(config.dtype, accelerator.device)
        kernels = Kernels.of(config, accelerator.device)
        if learns(config) != "frozen":
            check_trainable(config.attention)
        model = make_model(
            config, frozen
        )  # first: encoding takes long, and a model that does not fit should be said before
        if model.config.backbone == "full":
            refuse_learning(config.quantize, f"--init {config.init} saves a whole backbone, which")
        sets, ratios, held_out = encoded_data(config, accelerator, folder)
        store_frozen_in(model, frozen)
        kernels.use(model.transformer, model.family, accelerator.device)
        training = Training(config, accelerator, folder, held_out)
        learner = Learner(config, accelerator, model, training.resume())
        with Interruptions() as interruptions:
            train(training, learner, Batches(config, sets, ratios), interruptions)
        return finish(training, learner, sum(len(s) for s in sets))


@dataclass
class Training:
    """What the loop writes and looks at, besides the weights."""

    config: TrainReward
    accelerator: Accelerator
    folder: Run
    held_out: PairScorer
    best: tuple[float, int] | None = None
    """Best headline accuracy, percent, and its step."""
    metrics: Parts = field(init=False)
    evals: Parts = field(init=False)
    checkpoints: Checkpoints = field(init=False)

    def __post_init__(self) -> None:
        folder = self.folder
        self.metrics = Parts(folder.folder / "metrics", "train_reward_metrics", folder.id)
        self.evals = Parts(folder.folder / "evals", "train_reward_evals", folder.id)
        self.checkpoints = Checkpoints(folder, [self.metrics, self.evals], self.config.keep_checkpoints)
        if self.config.track and self.accelerator.is_main_process:
            self.accelerator.init_trackers("drm-train-reward")

    def resume(self):
        """The newest complete checkpoint of this run, None where there is none."""
        found = self.checkpoints.newest()
        if found is not None:
            best = found.state()["best"]
            self.best = None if best is None else (best[0], best[1])
            self.folder.note(f"went on from step {found.step}")
        return found

    def save(self, learner: Learner) -> None:
        """A checkpoint of the learner's step: gathered by all processes, written by the main one."""
        tensors, state = learner.state()
        if self.accelerator.is_main_process:
            also = set() if self.best is None else {self.best[1]}
            self.checkpoints.save(learner.step, tensors, state | {"best": self.best}, also=also)
        self.accelerator.wait_for_everyone()

    def record(self, step: int, by_sigma: list[dict[str, Any]]) -> None:
        """A row of the evaluations a sigma."""
        for row in by_sigma:
            self.evals.add(step=step, n_pairs=len(self.held_out.pairs), sigma=row["sigma"], accuracy=row["accuracy"])


def train(training: Training, learner: Learner, batches: Batches, interruptions: Interruptions) -> None:
    """Optimizer steps until the last. An interruption saves a checkpoint and raises Interrupted, in all processes at the same step."""
    config, accelerator, folder = training.config, training.accelerator, training.folder
    window = Window()
    left = range(learner.step, config.steps)
    started = time.monotonic()
    for micro in batches.upcoming(
        left, accelerator.num_processes, accelerator.process_index, ahead=accelerator.device.type != "cpu"
    ):
        # One optimizer step over this process's micro-batches of the global batch.
        learner.learn(micro, window)
        window.close_step(time.monotonic() - started)
        last = learner.step == config.steps

        # A row of the metrics, over all processes.
        if learner.step % config.log_every == 0 or last:
            row = window.row(accelerator, config.batch_size)
            training.metrics.add(step=learner.step, lr=learner.lr, score_scale=learner.score_scale(), **row)
            accelerator.log(row, step=learner.step)
            shown = {"loss": row["loss"], "accuracy": row["accuracy"], "pairs/s": row["pairs_per_second"]}
            folder.reporter.progress("train", learner.step, config.steps, **shown)

        # Evaluate now and then, and remember the best step.
        if config.eval_every and learner.step % config.eval_every == 0 and not last:
            evaluate_and_note(training, learner)

        # Save; stop where any process was told to.
        (stop,) = agreed(accelerator, interruptions.asked)
        if stop or (config.save_every and learner.step % config.save_every == 0) or last:
            training.save(learner)
        if stop and not last:
            raise interruptions.stop(f"step {learner.step} of {config.steps} is saved in {folder.folder}")
        started = time.monotonic()


def evaluate_and_note(training: Training, learner: Learner) -> None:
    """Evaluate the weights that would be saved, and keep the step in mind if it is the best."""
    with learner.averaged():
        by_sigma = evaluate(training, learner)
    training.record(learner.step, by_sigma)
    sigma = training.config.eval_sigma
    found = headline_accuracy(by_sigma, sigma)
    if training.best is None or found > training.best[0]:
        training.best = (found, learner.step)
    training.folder.note(f"step {learner.step}: held-out accuracy {found:.1f} % at sigma {sigma:g}")


@torch.no_grad()
def evaluate(training: Training, learner: Learner) -> list[dict[str, Any]]:
    """Accuracy in percent, with its 95 % interval, on the held-out pairs at each sigma; every process scores its share."""
    accelerator, config, scorer = training.accelerator, training.config, training.held_out
    world, size, levels = accelerator.num_processes, config.eval_batch_size, len(config.eval_sigmas)
    total = len(scorer.items)
    mine = np.arange(-(-total // world) * world)[accelerator.process_index :: world] % total
    parts = []
    for i in range(0, len(mine), size):
        with accelerator.autocast():
            parts.append(
                scorer.score(
                    learner.model,
                    mine[i : i + size],
                    config.eval_sigmas,
                    noise_samples=1,
                    seed=config.seed,
                    device=accelerator.device,
                )
            )
        training.folder.reporter.progress("evaluate", min(i + size, len(mine)), len(mine))
    gathered = accelerator.gather(torch.cat(parts)).cpu()
    scores = gathered.reshape(world, -1, levels).transpose(0, 1).reshape(-1, levels)[:total].double().numpy()
    found = [evaluation_accuracy(scorer, scores[:, j]) for j in range(levels)]
    return [
        {"sigma": sigma, "accuracy": result.value, "ci95": list(result.ci95)}
        for sigma, result in zip(config.eval_sigmas, found)
    ]


def evaluation_accuracy(scorer: PairScorer, scores: np.ndarray) -> Accuracy:
    """Strict accuracy of item scores [N] on the scorer's pairs."""
    pairs = scorer.pairs
    table = Pairs(
        prompt=pairs.prompt,
        label=pairs.label.astype(float),
        score_chosen=scores[scorer.left],
        score_rejected=scores[scorer.right],
        chosen_first=pairs.data.pairs["chosen_first"].to_numpy(bool),
    )
    return accuracy(table, "strict")


def headline(by_sigma: list[dict[str, Any]], sigma: float) -> dict[str, Any]:
    """The row of the asked sigma, or of the nearest one that was evaluated."""
    return min(by_sigma, key=lambda row: abs(row["sigma"] - sigma))


def headline_accuracy(by_sigma: list[dict[str, Any]], sigma: float) -> float:
    """Accuracy at the asked sigma."""
    return headline(by_sigma, sigma)["accuracy"]


def finish(training: Training, learner: Learner, train_pairs: int) -> dict[str, Any]:
    """Evaluate, save the reward model with its card, and the summary."""
    config, accelerator, folder = training.config, training.accelerator, training.folder
    with learner.averaged():
        by_sigma = evaluate(training, learner)
        tensors = learner.saved_tensors()
        summary = summarise(training, by_sigma, train_pairs)
        if accelerator.is_main_process:
            card = reward_card(asdict(learner.bare.config), config=to_dict(config), summary=summary)
            with atomic_folder(folder.folder / "reward") as part:
                learner.bare.write(part, tensors, card)
    training.record(learner.step, by_sigma)
    if accelerator.is_main_process:
        with guarded(folder.folder):
            training.evals.flush(learner.step)
        summary = folder.finish(summary | {"seconds": round(time.monotonic() - folder.started, 2)})
    return summary


def summarise(training: Training, by_sigma: list[dict[str, Any]], train_pairs: int) -> dict[str, Any]:
    """What summary.json says beside the command and the folder."""
    config, accelerator, folder = training.config, training.accelerator, training.folder
    found = headline(by_sigma, config.eval_sigma)
    return {
        "reward": str(folder.folder / "reward"),
        "seed": config.seed,
        "device": str(accelerator.device),
        "dtype": accelerator.mixed_precision if accelerator.mixed_precision != "no" else "fp32",
        "seconds": round(time.monotonic() - folder.started, 2),
        "steps": config.steps,
        "train_pairs": train_pairs,
        "eval_pairs": len(training.held_out.pairs),
        "eval_sigma": config.eval_sigma,
        "eval_accuracy": found["accuracy"],
        "eval_ci95": found["ci95"],
        "eval_by_sigma": by_sigma,
    }


# --- before the loop --------------------------------------------------------------------------------------------------


def encoded_data(
    config: TrainReward, accelerator: Accelerator, folder: Run
) -> tuple[list[EncodedPairs], list[float], PairScorer]:
    """Training sets with their ratios, and the held-out pairs, encoded by all processes together."""
    generator = LazyGenerator.of(config, accelerator.device)
    workers = cache.Workers(accelerator.process_index, accelerator.num_processes, gather_object)
    with accelerator.main_process_first():  # what is drawn, fetched or unpacked for a data set is so once
        sets, ratios, held_out = load_data(config, generator, folder.reporter)
    encoded = []
    for data in (*sets, held_out):
        pairs, _, warnings = encode_pairs(
            data, config, generator, folder, resolution=config.resolution, workers=workers
        )
        for text in warnings:
            folder.warn(text)
        encoded.append(pairs)
    generator.free(keep_text=any(isinstance(pairs.encoded.source, LivePrompts) for pairs in encoded))
    return encoded[:-1], ratios, PairScorer(encoded[-1])


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
        return sets, ratios, decided(held, sets)
    if made := [name for name, _ in named if name in MADE]:
        prompts = -(-config.eval_pairs // 5)
        held_out = load_preferences(made[0], "test", config, generator, reporter, flag="--eval-data", prompts=prompts)
        return sets, ratios, decided([first_pairs(strict(held_out), config.eval_pairs)], sets)
    parts = []
    for i, data in enumerate(sets):
        sets[i], held_out = data.split_by_prompt(min(0.2, max(0.02, config.eval_pairs / len(data))), config.seed)
        parts.append(first_pairs(strict(held_out), -(-config.eval_pairs // len(sets))))
    return sets, ratios, decided(parts, sets)


def decided(held: list[Preferences], sets: list[Preferences]) -> Preferences:
    """Held-out sets end to end. Raises InputError where all their pairs are ties: accuracy counts the others.

    sets: those to train on; without a pair of any weight, that is what is told first, where they are encoded.
    """
    if all(data.is_tie.all() for data in held) and any((data.pairs["weight"] > 0).any() for data in sets):
        raise InputError(
            f"{held[0].name}: every held-out pair is a tie, and accuracy counts the others",
            hint="hold out pairs of which one picture is better: name a file with --eval-data",
        )
    some = [data for data in held if len(data)] or held[:1]
    return some[0] if len(some) == 1 else combine(some)


def combine(sets: list[Preferences]) -> Preferences:
    """Several sets end to end."""
    from drmcli.data.datasets import mix

    return mix(sets, [float(len(s)) for s in sets], seed=0)
