"""One process or several: what accelerate decides, and what all processes must decide together.

A process never stops, saves or ends on what it alone has seen: the others would wait for it for ever. Every such question goes
through `agreed`, which all processes ask at the same place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    LoggerType,
    broadcast_object_list,
)
from torch import Tensor

from drmcli.config import to_dict
from drmcli.errors import InputError, Interrupted, MissingError
from drmcli.generator import DTYPES, pick_device, pick_dtype
from drmcli.run import default_folder

PATIENCE = timedelta(hours=24)
"""How long a process waits for the others. They wait for the slowest encoding, evaluation or download of all, not for a network."""
SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
"""Variables by which `accelerate launch` asks for sharded weights."""


def start_accelerator(config: Any, *, rounds: int) -> Accelerator:
    """accelerate decides on processes, devices, precision, sharding and trackers."""
    device = pick_device(config.device)
    if device.type == "cuda" and device.index is not None:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    precision = {v: k for k, v in DTYPES.items()}[pick_dtype(config.dtype, device)]
    for name in config.track:
        if name not in {str(t.value) for t in LoggerType}:
            raise InputError(
                f"--track {name}: there is no such tracker", hint="use tensorboard, wandb, comet_ml, mlflow, ..."
            )
        if not any(str(t) == name or getattr(t, "value", None) == name for t in get_available_trackers()):
            raise MissingError(f"--track {name}: not installed", hint="pip install 'drmcli[track]'")
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=rounds, sync_with_dataloader=False),
        log_with=config.track or None,
        project_dir=config.out or "runs",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


@contextmanager
def ended(accelerator: Accelerator) -> Iterator[None]:
    """Trackers and the group of processes are closed when a run ends, was finished before, stops or fails.

    A process that leaves the group open may abort at its exit (exit code 134 in place of its own). After an error of one process
    alone on GPUs the group stays open: closing it would wait for what the others still send.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Interrupted) or accelerator.device.type == "cpu":
            accelerator.end_training()
        raise
    accelerator.end_training()


def refuse_sharding(
    command: str, hint: str = "launch without it: every process holds the whole model; --train lora needs least memory"
) -> None:
    """Raises InputError where `accelerate launch` shards weights and the command holds them whole in every process."""
    for variable, name in SHARDED.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise InputError(
                f"{variable}: drm {command} does not shard weights with {name}",
                hint=hint,
            )


def share_folder(command: str, config: Any, accelerator: Accelerator) -> None:
    """Without --out, every process must name the folder that the main one chose."""
    if accelerator.num_processes > 1 and config.out is None:
        chosen = [str(default_folder(command, to_dict(config), config.resume and not config.overwrite))]
        config.out = broadcast_object_list(chosen)[0]


def agreed(accelerator: Accelerator, *flags: bool) -> tuple[bool, ...]:
    """Flags as all processes see them: raised where any process raises its own. Every process must ask at the same place."""
    if accelerator.num_processes == 1:
        return flags
    raised = accelerator.reduce(torch.tensor([float(f) for f in flags], device=accelerator.device), "sum")
    return tuple(bool(count > 0) for count in raised.tolist())


def summed(accelerator: Accelerator, tensors: list[Tensor]) -> list[Tensor]:
    """Tensors of one dtype, each summed over all processes: one exchange for all of them."""
    if accelerator.num_processes == 1:
        return tensors
    flat = accelerator.reduce(torch.cat([t.flatten() for t in tensors]), "sum")
    parts = flat.split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors)]
