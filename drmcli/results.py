"""Tables on disk: the Arrow schema of every table that drm writes, part files, and reading them back.

A Parquet file cannot be appended to, so a growing table is a folder of part files, each written whole or not at all.
Every file carries `drm_schema` (name and version) and `drm_run` in its metadata.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from drmcli.data.parquet import read_table
from drmcli.errors import InputError
from drmcli.run import write_bytes

VERSION = 1

_text, _int, _real, _bool = pa.string(), pa.int64(), pa.float64(), pa.bool_()
SCHEMAS: dict[str, pa.Schema] = {
    "pairs": pa.schema(
        {
            "dataset": _text, "prompt_id": _text, "pair_id": _text, "prompt": _text, "chosen": _text, "rejected": _text,
            "label": _real, "sigma": _real, "score_chosen": _real, "score_rejected": _real,
        }
    ),
    "scores": pa.schema(
        {"dataset": _text, "image": _text, "prompt_id": _text, "prompt": _text, "sigma": _real, "score": _real}
    ),
    "reproduce": pa.schema(
        {
            "table": _text, "row": _text, "column": _text, "published": _real, "ours": _real, "low": _real, "high": _real,
            "protocol": _text, "beware": _text,
        }
    ),
    "images": pa.schema(
        {
            "image_id": _text, "prompt_id": _text, "prompt": _text, "seed": _int, "path": _text, "score": _real, "mode": _text,
        }
    ),
    "candidates": pa.schema(
        {
            "prompt_id": _text, "image_id": _text, "prompt": _text, "seed": _int, "step": _int, "sigma": _real,
            "sigma_next": _real, "candidate": _int, "score": _real, "kept": _bool,
        }
    ),
    "rollouts": pa.schema(
        {
            "update": _int, "prompt_id": _text, "prompt": _text, "group": _int, "step": _int, "sigma": _real, "sigma_next": _real,
            "candidate": _int, "score": _real, "advantage": _real, "log_prob": _real, "kept": _bool,
        }
    ),
    "grpo_metrics": pa.schema(
        {
            "update": _int, "loss": _real, "lr": _real, "grad_norm": _real, "seconds": _real, "reward_mean": _real,
            "group_std": _real, "ratio": _real, "clip_fraction": _real, "kl": _real, "skipped_groups": _real,
        }
    ),
    "grpo_evals": pa.schema(
        {
            "update": _int, "split": _text, "reward": _real, "judge": _real, "diversity": _real, "flawless": _real,
            "diversity_flawless": _real, "seconds": _real, "judge_less_best": _real, "judge_less_best_low": _real,
            "judge_less_best_high": _real,
        }
    ),
    "scorers": pa.schema(
        {
            "dataset": _text, "scorer": _text, "image": _text, "prompt_id": _text, "prompt": _text, "sigma": _real,
            "score": _real,
        }
    ),
    "generated": pa.schema(
        {
            "dataset": _text, "generator": _text, "lora": _text, "prompt_id": _text, "prompt": _text, "seed": _int, "path": _text,
            "scorer": _text, "score": _real,
        }
    ),
    "geneval": pa.schema(
        {
            "item": _int, "image": _int, "task": _text, "prompt": _text, "path": _text, "correct": pa.bool_(), "reason": _text,
        }
    ),
    "preferences": pa.schema(
        {
            "prompt": _text, "prompt_id": _text, "pair_id": _text, "chosen": _text, "rejected": _text, "label": _real, "weight": _real,
        }
    ),
    "drawn": pa.schema({"prompt_id": _text, "prompt": _text, "seed": _int, "path": _text, "score": _real}),
    "partial_scores": pa.schema({"item": _int, "column": _int, "score": _real}),
    "train_reward_metrics": pa.schema(
        {
            "step": _int, "loss": _real, "lr": _real, "grad_norm": _real, "seconds": _real, "accuracy": _real,
            "score_std": _real, "score_scale": _real, "pairs_per_second": _real,
        }
    ),
    "train_reward_evals": pa.schema({"step": _int, "sigma": _real, "accuracy": _real, "n_pairs": _int}),
}  # fmt: skip


def to_table(
    name: str, rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]] | pd.DataFrame, run_id: str
) -> pa.Table:
    """Rows, columns or a data frame as a table of the named schema. A missing or surplus column is a bug and raises."""
    schema = SCHEMAS[name]
    if isinstance(rows, pd.DataFrame):
        table = pa.Table.from_pandas(rows[schema.names], schema=schema, preserve_index=False)
    elif isinstance(rows, Mapping):
        table = pa.table({column: rows[column] for column in schema.names}, schema=schema)
    else:
        table = pa.table({column: [row[column] for row in rows] for column in schema.names}, schema=schema)
    metadata = {"drm_schema": f"{name}/{VERSION}", "drm_run": run_id}
    return table.replace_schema_metadata(metadata)


def write(path: Path, name: str, rows: Any, run_id: str) -> None:
    """Write one table, whole or not at all."""
    buffer = io.BytesIO()
    pq.write_table(to_table(name, rows, run_id), buffer, compression="zstd")
    write_bytes(path, buffer.getvalue())


def read(path: Path) -> pd.DataFrame:
    """A table from its file, or from the part files of its folder in order. Raises InputError when there is none."""
    files = [file for _, file in parts_of(path)] if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise InputError(f"{path}: there is no table", hint="give a run folder of drm")
    return pd.concat([_frame(file) for file in files], ignore_index=True)


def parts_of(folder: Path) -> list[tuple[int, Path]]:
    """Number and file of each part of a growing table, in order."""
    found = [(re.fullmatch(r"part-(\d+)", file.stem), file) for file in folder.glob("part-*.parquet")]
    return sorted((int(match[1]), file) for match, file in found if match)


def _frame(file: Path) -> pd.DataFrame:
    """A Parquet file. Raises InputError that names it when it is damaged."""
    try:
        return read_table(file).to_pandas()
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{file}: a damaged table ({' '.join(str(error).split())[:120]})",
            hint="delete the file and run the command that made it again, or --overwrite",
        ) from None


def readable(file: Path, warn: Callable[[str], None]) -> bool:
    """Is there a whole table? A damaged one is deleted with a warning: its work is done again."""
    if not file.is_file():
        return False
    try:
        _frame(file)
    except InputError as error:
        warn(f"{error.message}; what it held is done again")
        file.unlink()
        return False
    return True


class Parts:
    """A growing table: rows are collected and written as `part-<number>.parquet`, numbered by the step they reach.

    `drop_after(step)` on resume removes the parts beyond the checkpoint, so that no row is there twice.
    """

    def __init__(self, folder: Path, name: str, run_id: str):
        self.folder = folder
        self.name = name
        self.run_id = run_id
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        self.rows.append(row)

    def flush(self, step: int) -> None:
        """Write what was collected up to this step."""
        if self.rows:
            write(self.folder / f"part-{step:06d}.parquet", self.name, self.rows, self.run_id)
            self.rows = []

    def drop_after(self, step: int) -> None:
        for number, file in parts_of(self.folder):
            if number > step:
                file.unlink()

    def whole(self, warn: Callable[[str], None]) -> list[tuple[int, pd.DataFrame]]:
        """Number and rows of the parts that an interrupted run left, in order, up to the first that is damaged.

        That one and the later ones are deleted with a warning: their work is done again.
        """
        found: list[tuple[int, pd.DataFrame]] = []
        for number, file in parts_of(self.folder):
            try:
                rows = _frame(file)
                if list(rows.columns) != SCHEMAS[self.name].names:
                    raise InputError(f"{file}: has other columns", hint="")
            except InputError as error:
                warn(f"{error.message}; what it held is done again")
                self.drop_after(number - 1)
                break
            found.append((number, rows))
        return found
