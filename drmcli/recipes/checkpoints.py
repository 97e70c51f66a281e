"""Checkpoints of a run, for both trainers: tensors, a state in JSON and the tables up to a step, whole or not at all.

They are sealed with checksums (`drmcli.files`): a damaged one is noticed when a run goes on, and the one before it taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from drmcli.results import Parts
from drmcli.run import Run, atomic_folder, checkpoint_folder, latest_checkpoint, retire_checkpoints, seal


@dataclass
class Checkpoint:
    """One that was found complete."""

    step: int
    folder: Path

    def state(self) -> dict[str, Any]:
        """What `save` was given as state."""
        return json.loads((self.folder / "state.json").read_text(encoding="utf-8"))

    def tensors(self) -> dict[str, Tensor]:
        """What `save` was given as tensors, on the CPU."""
        return load_file(self.folder / "state.safetensors")


class Checkpoints:
    """Writer and reader for one run. Only the main process writes; every process may read.

    tables: growing tables that a checkpoint completes, and that are cut back to it when a run goes on. keep: how many are kept.
    """

    def __init__(self, run: Run, tables: Sequence[Parts], keep: int):
        self.run, self.tables, self.keep = run, tables, keep

    @contextmanager
    def saving(self, step: int, *, also: set[int] = frozenset()) -> Iterator[Path]:  # type: ignore[assignment]
        """A folder to fill for a step. Tables are written first; older checkpoints go afterwards, but those of the steps in `also`."""
        for table in self.tables:
            table.flush(step)
        with atomic_folder(checkpoint_folder(self.run, step)) as part:
            yield part
            seal(part)
        retire_checkpoints(self.run, self.keep, set(also))

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        *,
        also: set[int] = frozenset(),  # type: ignore[assignment]
    ) -> None:
        """Tensors and a state that JSON can hold (numbers that are not finite become null). also: see `saving`."""
        with self.saving(step, also=also) as part:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part / "state.safetensors")
            (part / "state.json").write_text(json.dumps(finite(state), allow_nan=False) + "\n", encoding="utf-8")

    def newest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint, None where there is none; the main process cuts the tables back to it.

        Raises InputError when there are checkpoints and all are damaged.
        """
        found = latest_checkpoint(self.run)
        if self.run.main:
            for table in self.tables:
                table.drop_after(found[0] if found else -1)
        return Checkpoint(*found) if found else None


def finite(value: Any) -> Any:
    """A value for JSON, which knows no NaN: numbers that are not finite become None, at any depth."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state of each parameter by its number: `adam.<number>.<name>`."""
    return {
        f"adam.{i}.{name}": torch.as_tensor(value)
        for i, p in enumerate(parameters)
        for name, value in optimizer.state[p].items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave."""
    for i, p in enumerate(parameters):
        kept = {k.split(".")[2]: v for k, v in tensors.items() if k.startswith(f"adam.{i}.")}
        if kept:
            optimizer.state[p] = {k: v.to(p.device) for k, v in kept.items()}
