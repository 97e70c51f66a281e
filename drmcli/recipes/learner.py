"""What train-reward trains: the reward model's weights, their optimizer, learning rate and moving average, in one process or many."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from drmcli.config import TrainReward
from drmcli.data.batches import Batch
from drmcli.errors import RunError
from drmcli.flow import add_noise
from drmcli.losses import bradley_terry, thurstone
from drmcli.quantize import names_of_frozen
from drmcli.recipes import sharding
from drmcli.recipes.checkpoints import Checkpoint, load_optimizer, optimizer_tensors
from drmcli.recipes.launch import agreed
from drmcli.reward import RewardModel


def rate_at(config: TrainReward, step: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then constant or half a cosine down to 0."""
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.lr_schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def preference_loss(config: TrainReward, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss of a micro-batch, its share of the global one, and scores [N, 2] of chosen and rejected. scores: [U]."""
    chosen, rejected = scores[batch.chosen], scores[batch.rejected]
    if config.loss == "thurstone":
        mean = thurstone(chosen, rejected, batch.sigma[batch.chosen], label=batch.label, weight=batch.weight)
    else:
        mean = bradley_terry(chosen, rejected, label=batch.label, weight=batch.weight, margin=config.margin)
    return mean * batch.weight.sum(), torch.stack([chosen, rejected], dim=1).detach()


class Learner:
    """The model, prepared for the processes there are, and one method for an optimizer step.

    checkpoint: where to go on; the weights are loaded before they are split or wrapped.
    """

    def __init__(
        self, config: TrainReward, accelerator: Accelerator, model: RewardModel, checkpoint: Checkpoint | None
    ):
        self.config, self.accelerator, self.bare = config, accelerator, model
        self.lr = config.lr
        self.step = 0 if checkpoint is None else checkpoint.step
        kept = {} if checkpoint is None else checkpoint.tensors()
        if checkpoint is not None:
            own = {name.removeprefix("model."): t for name, t in kept.items() if name.startswith("model.")}
            model.load_tensors(own, str(checkpoint.folder))
        model.gradient_checkpointing = config.gradient_checkpointing
        self.model: Any = model.train()
        if config.shard:
            sharding.shard(model.to(accelerator.device), model.blocks)
        self.base_rates = [config.lr if config.head_lr is None else config.head_lr]
        groups = [{"params": list(model.head.parameters()), "lr": self.base_rates[0]}]
        backbone = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head.")]
        if backbone:
            groups.append({"params": backbone, "lr": config.lr})
            self.base_rates.append(config.lr)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=config.weight_decay, fused=True)
        if config.shard:
            self.optimizer = accelerator.prepare(optimizer)
        else:
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names_of_frozen(model))
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.ema: EMAModel | None = None
        if config.ema_decay:
            self.ema = EMAModel(self.trained, decay=config.ema_decay)
            self.ema.to(accelerator.device)
        if checkpoint is not None:
            self._load(kept, checkpoint.state())

    def learn(self, micro: list[Batch], window: Window) -> None:
        """One optimizer step over this process's micro-batches.

        Raises RunError, in all processes, when the loss is not finite in one.
        """
        config, accelerator = self.config, self.accelerator
        for group, base in zip(self.optimizer.param_groups, self.base_rates):
            group["lr"] = self.lr = base * rate_at(config, self.step)
        finite = []
        for batch in micro:
            with accelerator.accumulate(self.model):
                batch = batch.to(accelerator.device)
                with accelerator.autocast():
                    scores = self.model(add_noise(batch.latents, batch.noise, batch.sigma), batch.sigma, batch.conds)
                loss, shown = preference_loss(config, scores, batch)
                finite.append(torch.isfinite(loss.detach()))
                # accelerate divides by the rounds and averages over processes; the loss is a sum over the global batch.
                accelerator.backward(loss * len(micro) * accelerator.num_processes)
                window.add(loss, shown)
                if accelerator.sync_gradients:
                    self._refuse_broken(finite)
                    if config.max_grad_norm:
                        window.grad_norm = accelerator.clip_grad_norm_(self.trained, config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.trained)
        self.step += 1

    def _refuse_broken(self, finite: list[Tensor]) -> None:
        if agreed(self.accelerator, not bool(torch.stack(finite).all()))[0]:
            raise RunError(
                f"step {self.step}: the loss is not finite",
                hint="lower --lr, use --dtype fp32 or bf16; the last checkpoint is kept, --overwrite starts again",
            )

    def score_scale(self) -> float:
        """The head's scale. All processes must ask."""
        return float(sharding.whole(self.bare.head.log_scale).exp())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average in place of the weights, if there is one, and no training mode."""
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

    # --- what is kept -------------------------------------------------------------------------------------------------

    def saved_tensors(self) -> dict[str, Tensor]:
        """What a saved reward model holds, whole, on the CPU; there the weights themselves, not a copy. All processes must ask."""
        return {name: sharding.whole(t) for name, t in self.bare.saved_tensors().items()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers of a checkpoint: with LoRA not the whole base again. All processes must ask."""
        tensors = {f"model.{name}": t for name, t in self.saved_tensors().items()}
        adam = optimizer_tensors(self.optimizer, self.trained)
        tensors |= {name: sharding.whole(t) for name, t in adam.items()}
        state: dict[str, Any] = {}
        if self.ema is not None:
            tensors |= {f"ema.{i}": sharding.whole(t) for i, t in enumerate(self.ema.shadow_params)}
            state["ema_steps"] = self.ema.optimization_step
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        return tensors, state

    def _load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Put back what `state` gave, but for the weights."""
        adam = {
            name: sharding.spread(t, self.trained[int(name.split(".")[1])])
            for name, t in tensors.items()
            if name.startswith("adam.")
        }
        load_optimizer(self.optimizer, self.trained, adam)
        if self.ema is not None:
            self.ema.shadow_params = [
                sharding.spread(tensors[f"ema.{i}"], p) for i, p in enumerate(self.ema.shadow_params)
            ]
            self.ema.optimization_step = state["ema_steps"]
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])


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
            "grad_norm": math.nan if self.grad_norm is None else sharding.norm(self.grad_norm),
            "seconds": self.seconds,
            "accuracy": float((scores[:, 0] > scores[:, 1]).float().mean()) * 100,
            "score_std": float(scores.std()),
            "pairs_per_second": batch_size * self.steps / max(self.seconds, 1e-9),
        }
        self._clear()
        return row
