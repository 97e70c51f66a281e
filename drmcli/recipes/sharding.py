"""Weights, gradients and optimizer split over the processes (fully sharded data parallel, version 2): torch's own `fully_shard`.

Files never show it: what is saved is gathered by all processes together and written whole, so a run may go on with another number
of processes, sharded or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from drmcli.errors import InputError


def check(wanted: bool, accelerator: Accelerator) -> None:
    """Raises InputError where there is nothing to split over."""
    if wanted and accelerator.num_processes == 1:
        raise InputError(
            "--set shard: there is one process to split the weights over",
            hint="start several: torchrun --nproc_per_node 8 -m drmcli train-reward ...",
        )


def shard(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Split a model in place, each block gathered only while it computes. Parameters become DTensors: make the optimizer afterwards."""
    for block in blocks:
        fully_shard(block)
    fully_shard(model)


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, gathered if it is split. All processes must ask, in the same order."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def spread(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor on the device of another one, and split as that is."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor, like.device_mesh, like.placements)
    return tensor


def norm(value: Tensor) -> float:
    """A gradient norm as a number."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)
