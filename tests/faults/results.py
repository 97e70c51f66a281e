"""What is asked and would not be read, sides that no model places, pairs that decide nothing, and results that were written by hand."""

# ruff: noqa: E501, a row stays on a line

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from faults import fault
from faults.data import parquet, pictures, row, rows

BENCH = "bench --dry-run "
SAMPLE = "sample x --dry-run "
TINY = "train-reward --data a.jsonl --steps 1 --batch-size 2 --out o "
PAIRS = {"a.jsonl": rows(*(row(prompt=f"a circle {i}") for i in range(8)))}
TIES = {"t.jsonl": rows(*(row(prompt=f"a circle {i}", label=0.5) for i in range(8)))}
FOUR = pictures(4)


def complex_latents(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"latents": torch.zeros([4, 8, 8], dtype=torch.complex64)}, folder / "c.safetensors")


def wide_latents(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"latents": torch.zeros([4, 256, 256])}, folder / "w.safetensors")


def finished(summary: str) -> Callable[[Path], None]:
    """A finished run of `drm score` in o whose summary is this."""

    def make(folder: Path) -> None:
        from drmcli.config import resolve
        from drmcli.recipes import score

        flags = {"images": ["0.png"], "prompts": ["x"], "out": "o", "noise_samples": 1}
        score.run(resolve("score", flags=flags))
        (folder / "o" / "summary.json").write_text(summary)

    return make


FAULTS = [
    # Prompts and pictures are matched one by one.
    fault("two prompts for three pictures", "score 0.png 1.png 2.png --prompt a --prompt b", 2, "2 prompts for 3 images", FOUR),
    # Sides that the transformer has no positions for.
    fault("score at a side too large", "score 0.png --prompt a --resolution 512", 2, "--resolution 512: the transformer knows 128 pixels at most", FOUR),
    fault("bench at a side too large", "bench --resolution 512 --dataset a.jsonl", 2, "--resolution 512: the transformer knows 128", FOUR | PAIRS),
    fault("bench planned at a side too large", BENCH + "--resolution 512", 2, "--resolution 512: the transformer knows 128"),
    fault("train at a side too large", TINY + "--resolution 512", 2, "--resolution 512: the transformer knows 128", FOUR | PAIRS),
    fault("latents too large", "score w.safetensors --prompt a", 2, "latents of 256 x 256: the transformer knows 64 x 64 at most", make=wide_latents),
    fault("complex latents", "score c.safetensors --prompt a", 2, "c.safetensors: `latents` are complex", make=complex_latents),
    # Held-out pairs that decide nothing.
    fault("held-out ties", TINY + "--eval-data t.jsonl", 2, "t.jsonl: every held-out pair is a tie", FOUR | PAIRS | TIES),
    fault("ties alone", "train-reward --data t.jsonl --steps 1 --batch-size 2", 2, "every held-out pair is a tie", FOUR | TIES),
    fault("bench of ties", "bench --dataset t.jsonl --out o", 1, "t.jsonl: no pair counts under 'strict'", FOUR | TIES),
    # Several datasets at once.
    fault("a dataset twice", BENCH + "--dataset a.jsonl,a.jsonl", 2, "a.jsonl is there twice", FOUR | PAIRS),
    fault("pairs and prompts", "bench --dataset a.jsonl,p.txt", 2, "p.txt is of generators", FOUR | PAIRS | {"p.txt": "a cat\n"}),
    fault("pairs and geneval", BENCH + "--dataset a.jsonl,geneval", 2, "geneval is of generators", FOUR | PAIRS),
    fault("a comma for datasets", BENCH + "--dataset ,", 2, "--dataset ',': names nothing"),
    fault("no dataset", ["bench", "--dry-run", "--dataset", ""], 2, "--dataset '': names nothing"),
    # What is named and would not be read.
    fault("pictures for a bench of pairs", BENCH + "--images . --dataset a.jsonl", 2, "--images: is not read, a.jsonl is of pairs", FOUR | PAIRS),
    fault("prompts for a bench of pairs", BENCH + "--prompts 3", 2, "--prompts: is not read, shapes is of pairs"),
    fault("steps by --set for a bench of pairs", BENCH + "--set steps=3", 2, "--steps: is not read"),
    fault("pairs for a bench of prompts", BENCH + "--dataset shapes-prompts --pairs 3", 2, "--pairs: is not read, shapes-prompts is of generators"),
    fault("a detector for prompts", BENCH + "--dataset shapes-prompts --detector shapes", 2, "--detector: is not read"),
    fault("a split of a file", BENCH + "--dataset a.jsonl --split test", 2, "--split test: a.jsonl is a file", FOUR | PAIRS),
    fault("a split beside a folder of the dataset's name", BENCH + "--dataset shapes --split train", 0, "dataset: shapes", {"shapes/x": ""}),
    fault("beams of plain sampling", SAMPLE + "--beams 4", 2, "--beams: is not read by --mode plain"),
    fault("one beam of plain sampling", SAMPLE + "--beams 1", 0, "mode: plain"),
    fault("a budget without auto", SAMPLE + "--stepwise --budget 30", 2, "--budget: is not read by --mode stepwise"),
    fault("halving sigmas of best-of-n", SAMPLE + "--mode best-of-n --set halving_sigmas=[0.5]", 2, "--halving-sigmas: is not read"),
    # Numbers beyond what counts or sums.
    fault("a rank of 400 digits", "data check r.jsonl", 2, "is not a rank", FOUR | {"r.jsonl": '{"prompt": "a", "images": ["0.png", "1.png"], "ranking": [1%s, 2]}\n' % ("0" * 400)}),
    fault("a weight that float32 makes 0", "data check a.jsonl", 2, "weight is 4.94066e-324", FOUR | {"a.jsonl": rows(row(weight=5e-324))}),
    fault("a weight that float32 cannot hold", "data check a.jsonl", 2, "weight is 1e\\+308", FOUR | {"a.jsonl": rows(row(weight=1e308))}),
    # A run's own files, written by hand.
    fault("a summary without its keys", "score 0.png --prompt x --noise-samples 1 --out o", 2, "--out o: its summary.json is damaged", FOUR, make=finished('{"command": "score"}')),
    fault("show of wrong types", "show o", 2, "its summary.json", FOUR, make=finished(json.dumps({"command": "score", "run": "o", "seconds": 1, "scores": 3}))),
    fault("labels of a damaged folder", "data label l", 2, "DIR l: its summary.json is damaged", {"l/config.yaml": "command: data-make\n", "l/summary.json": "[]"}),
    fault("labels without pictures", "data label l", 2, "drawn.parquet: lacks a prompt or a path", {"l/config.yaml": "command: data-make\n", "l/summary.json": '{"label": ["people"]}'}, make=parquet("l/drawn.parquet", lambda: {"prompt": ["a"]})),
]  # fmt: skip
