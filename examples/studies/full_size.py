"""Stable Diffusion 3.5 Medium's shape with random weights on this machine: speed, memory against the plan, sampling against its passes.

    python examples/studies/overhead.py --full-size
    python examples/studies/overhead.py --full-size --only sample --resolution 256 --out runs/full-size

With a GPU: 24 blocks, 512 px, bf16, the sizes of the preset `sd35-medium`. Without one it is reduced so that it ends in minutes: 4
blocks, 128 px, no room for T5's tokens, float32, small batches; the titles say so. T5 is left out (zeros in its place, as `grpo` of that
preset has it), which changes no size of the transformer's work. Weights are random: what is drawn is noise, what is scored means nothing.

Four parts: `train`, a step of train-reward; `score`, pictures and prompts encoded and scored; `sample`, step-wise search with 1, 2, 4 and
6 candidates against the forward passes that it counts; `update`, an update of grpo. Operations are counted by
torch.utils.flop_counter, recomputed ones included, and told as a share of what a large matrix product reaches in the same number format.
Memory is that of tensors (on CUDA the allocator's peak; on the CPU weights, and what is alive at once beside them), beside the plan that
`--dry-run` prints. Writes full-size.json and full-size.parquet.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from random_pipeline import DROPPED, build
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from drmcli.config import resolve
from drmcli.data.batches import micro_batches
from drmcli.families.base import Conditioning
from drmcli.footprint import PeakBytes
from drmcli.generator import DTYPES, Generator
from drmcli.memory import store_frozen_in
from drmcli.recipes import grpo, score, train_reward
from drmcli.recipes import sample as sampling
from drmcli.recipes.alignment import assemble
from drmcli.recipes.launch import start_accelerator
from drmcli.recipes.learner import Learner, Window
from drmcli.recipes.plan import as_set, describe_generator
from drmcli.recipes.timing import made_up_batch
from drmcli.reward import RewardModel
from drmcli.run import Silent, open_run
from drmcli.sampling import Search, sample

PARTS = ("train", "score", "sample", "update")
CANDIDATES = (1, 2, 4, 6)
PROMPT = "a large red circle above a small blue square"
BLOCKS = 24
"""Of the whole transformer."""


@dataclass
class Size:
    """What is run, and on what."""

    depth: int
    resolution: int
    dtype: str
    device: torch.device
    folder: Path
    """base/ and reward/ lie here."""
    small: bool
    """Small batches, and few steps."""
    peak: float = 0.0
    """Operations a second of a large matrix product."""
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """That a prompt's T5 part takes."""
        return 0 if self.small else 256

    @property
    def dropped(self) -> int:
        """Blocks that the reward model leaves out."""
        return DROPPED if self.depth > 2 * DROPPED else 1

    @property
    def title(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        whole = "" if self.depth == BLOCKS and not self.small else ", reduced"
        return (
            f"{name}{whole}: {self.depth} of {BLOCKS} blocks, {self.resolution} px, {77 + self.tokens} tokens of text,"
            f" {self.dtype}, random weights, torch {torch.__version__}"
        )

    def flags(self, **more: Any) -> dict[str, Any]:
        """Of every command."""
        return {
            "generator": str(self.folder / "base"), "device": str(self.device), "dtype": self.dtype, "max_sequence_length": self.tokens,
            "resolution": self.resolution,
        } | more  # fmt: skip

    def add(self, what: str, unit: str, items: float, found: Measured, planned: float | None) -> None:
        """A row of the first table. items: in one run of what was measured; planned: bytes."""
        self.rows.append(
            {
                "what": what, "unit": unit, "items_per_second": items / found.seconds, "seconds": found.seconds, "flops": found.flops,
                "share_of_peak": found.flops / found.seconds / self.peak, "bytes": found.bytes, "planned_bytes": planned,
            }
        )  # fmt: skip


@dataclass
class Measured:
    seconds: float
    flops: int
    bytes: int
    """At the peak, weights included."""


# --- measuring --------------------------------------------------------------------------------------------------------


def _forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
"""Kernels that PyTorch's counter does not know."""


def operations(work: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products, convolutions and attention in some work."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        work()
    return counter.get_total_flops()


def weights_of(modules: Iterable[nn.Module]) -> int:
    """Bytes of weights and buffers, shared ones once, those on the meta device not."""
    tensors = (t for m in modules for t in (*m.parameters(), *m.buffers()) if not t.is_meta)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measured(
    work: Callable[[], Any],
    modules: Iterable[nn.Module],
    device: torch.device,
    repeats: int,
    *,
    flops: int | None = None,
) -> Measured:
    """The median time of some work after a first run, and the peak of all runs. flops: where they are known; else the first run counts."""
    cuda, seconds = device.type == "cuda", []
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    held = weights_of(modules)
    with nullcontext() if cuda else PeakBytes() as alive:
        if flops is None:
            flops = operations(work)
        elif cuda:
            work()
        for _ in range(repeats):
            settle(device)
            started = time.perf_counter()
            work()
            settle(device)
            seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) if alive is None else held + alive.peak
    return Measured(statistics.median(seconds), flops, peak)


def settle(device: torch.device) -> None:
    """Wait for what the GPU was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product: the best of several."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(12):
        settle(device)
        started = time.perf_counter()
        a @ b
        settle(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def forget() -> None:
    """Give memory back between the parts."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- the parts --------------------------------------------------------------------------------------------------------


def train(size: Size, repeats: int) -> None:
    """An optimizer step of train-reward: all its micro-batches, and AdamW."""
    small = {"batch_size": 4, "micro_batch_size": 2} if size.small else {}
    config = resolve("train-reward", preset="sd35-medium", flags=size.flags(drop_layers=size.dropped, **small))
    rounds, pairs = micro_batches(config, 1)
    model = train_reward.make_model(config, DTYPES[config.dtype])
    store_frozen_in(model, DTYPES[config.dtype])
    learner = Learner(config, start_accelerator(config, rounds=rounds), model, None)
    pictures = train_reward.pictures_in(config, pairs)
    known = describe_generator(config)
    micro = [made_up_batch(config, known, pictures, pairs, known.latent_side(size.resolution)) for _ in range(rounds)]
    found = measured(lambda: learner.learn(micro, Window()), [model], size.device, repeats)
    memory = train_reward.plan(config)["memory"]
    planned = as_set(config, memory)
    size.add(f"training step, {config.batch_size} pairs", "pairs", config.batch_size, found, planned)


def scoring(size: Size, repeats: int) -> None:
    """Pictures and prompts through the encoders, and latents through the reward model, of one batch of `drm score`."""
    count = 2 if size.small else 16
    reward = load_reward(size)
    generator = reward.generator()
    pixels = np.random.default_rng(0).integers(0, 255, (size.resolution, size.resolution, 3), dtype=np.uint8)
    picture, prompts = Image.fromarray(pixels), [PROMPT] * count
    modules = [reward, *parts_of(generator)]
    latents = generator.encode_images([picture] * count, size.resolution)
    cond = generator.encode_prompts(prompts)
    picture.save(size.folder / "picture.png")
    flags = size.flags(
        reward=str(size.folder / "reward"), images=[str(size.folder / "picture.png")] * count, prompts=[PROMPT]
    )
    flags = {k: v for k, v in flags.items() if k not in ("generator", "max_sequence_length")}
    memory = score.plan(resolve("score", preset="sd35-medium", flags=flags | {"batch_size": count}))["memory"]
    held = sum(memory["models"].values())

    @torch.no_grad()
    def scores() -> Tensor:
        return reward.score(latents, 0.25, cond)

    ways: list[tuple[str, str, str, Callable[[], Any]]] = [
        (f"encoding {count} pictures", "pictures", "encode pictures",
         lambda: generator.encode_images([picture] * count, size.resolution)),
        (f"scoring {count} latents at one noise level", "pictures", "score", scores),
    ]  # fmt: skip
    for what, unit, kind, work in ways:
        found = measured(work, modules, size.device, repeats)
        size.add(what, unit, count, found, held + memory["passes"][kind])


def load_reward(size: Size, beside: Generator | None = None) -> RewardModel:
    return RewardModel.from_pretrained(
        str(size.folder / "reward"), dtype=DTYPES[size.dtype], device=size.device, beside=beside
    )


def parts_of(generator: Generator) -> list[nn.Module]:
    """A pipeline's models that are loaded."""
    return [part for part in generator.pipe.components.values() if isinstance(part, nn.Module)]


def searching(size: Size, repeats: int) -> list[dict[str, Any]]:
    """One picture by step-wise search of k candidates: its seconds and its counted forward passes, each over those of k = 1."""
    steps, rows = 4 if size.small else 50, []
    flags = size.flags(reward=str(size.folder / "reward"), prompts=[PROMPT], steps=steps, mode="stepwise")
    flags |= {"height": size.resolution, "width": size.resolution}
    generator = Generator.load(
        str(size.folder / "base"), dtype=DTYPES[size.dtype], device=size.device, max_sequence_length=size.tokens
    )
    reward = load_reward(size, beside=generator)
    shape = generator.latent_shape(size.resolution, size.resolution)
    modules = [reward, *parts_of(generator)]
    cond = generator.encode_prompts([PROMPT])
    one, other = operations_of_passes(generator, reward, cond, torch.randn(1, *shape, device=size.device))
    for k in CANDIDATES:
        config = resolve("sample", preset="sd35-medium", flags=flags | {"beams": k})
        plan = sampling.plan(config)
        negative = generator.encode_negative("", config.guidance_scale)
        search = Search(
            mode="stepwise", beams=k, num_inference_steps=steps, guidance_scale=config.guidance_scale, max_batch=config.max_batch
        )  # fmt: skip
        calls = sample(generator, reward, cond, cond, [0], search, negative=negative, shape=shape).calls
        counted = plan["generator calls a picture, about"], plan["scores a picture, about"]
        if (calls.generator, calls.reward) != counted:
            raise SystemExit(f"k = {k}: {calls.generator} and {calls.reward} passes, where the plan counts {counted}")

        def draw(search: Search = search, negative: Conditioning | None = negative) -> None:
            sample(generator, reward, cond, cond, [0], search, negative=negative, shape=shape)

        found = measured(draw, modules, size.device, repeats, flops=calls.generator * one + calls.reward * other)
        memory = plan["memory"]
        planned = sum(memory["models"].values()) + max(memory["passes"][kind] for kind in ("velocity", "score"))
        size.add(f"sampling, {steps} steps, k = {k}", "pictures", 1, found, planned)
        rows.append({"k": k, "generator_passes": calls.generator, "reward_passes": calls.reward, **vars(found)})
    for row in rows:
        row["counted"], row["measured"] = row["flops"] / rows[0]["flops"], row["seconds"] / rows[0]["seconds"]
    return rows


@torch.no_grad()
def operations_of_passes(
    generator: Generator, reward: RewardModel, cond: Conditioning, latent: Tensor
) -> tuple[int, int]:
    """Of a forward pass of the generator and one of the reward model, of a single latent [1, C, H, W]."""
    return operations(lambda: generator.velocity(latent, 0.5, cond)), operations(
        lambda: reward.score(latent, 0.5, cond)
    )


def update(size: Size, repeats: int) -> None:
    """An update of grpo: rollouts, rewards, a forward and a backward pass a state, AdamW."""
    small = {"prompts_per_update": 2, "micro_batch_size": 2, "group_size": 3, "steps": 4} if size.small else {}
    flags = size.flags(
        reward=str(size.folder / "reward"), prompts="shapes", judge="none", out=str(size.folder / "grpo"), overwrite=True
    )  # fmt: skip
    config = resolve("grpo", preset="sd35-medium", flags=flags | small)
    with open_run("grpo", config, Silent()) as run:
        aligner = assemble(config, start_accelerator(config, rounds=1), run)
        prompts = aligner.pick(0)[1]

        def work() -> None:
            grpo.learn(aligner, aligner.algorithm.draw(prompts, 0), 0)

        modules = [*aligner.rewards.models, *parts_of(aligner.policy.generator)]
        found = measured(work, modules, size.device, repeats)
    memory = grpo.plan(config)["memory"]
    learning = memory["total_checkpointed" if config.gradient_checkpointing else "total"]
    idle = memory["total_drawing"] - max(memory["drawing"].values())
    drawing = idle + max(memory["drawing"][kind] for kind in ("velocity", "score"))
    what = f"policy update, {config.prompts_per_update} prompts, k = {config.group_size}, {config.steps} steps"
    size.add(what, "updates", 1, found, max(learning, drawing))


# --- telling ----------------------------------------------------------------------------------------------------------


def show(size: Size, searched: list[dict[str, Any]]) -> None:
    """The tables, the machine in their titles."""
    console = Console(width=170)
    columns = ("", "a second", "share of the matrix peak", "peak memory, GiB", "planned, GiB", "measured / planned")
    made = titled(f"{size.title}; matrix peak {size.peak / 1e12:.3g} TFLOP/s", *columns)
    for row in size.rows:
        made.add_row(
            row["what"], f"{row['items_per_second']:.3g} {row['unit']}", f"{100 * row['share_of_peak']:.0f} %",
            f"{row['bytes'] / 2**30:.2f}", f"{row['planned_bytes'] / 2**30:.2f}", f"{row['bytes'] / row['planned_bytes']:.2f}",
        )  # fmt: skip
    console.print(made)
    if searched:
        made = titled(
            f"{size.title}: seconds of step-wise search against its counted forward passes, k = 1 is 1",
            "k", "passes of the generator", "of the reward model", "counted", "measured", "measured / counted",
        )  # fmt: skip
        for row in searched:
            ratios = (row["counted"], row["measured"], row["measured"] / row["counted"])
            made.add_row(
                str(row["k"]),
                str(row["generator_passes"]),
                str(row["reward_passes"]),
                *(f"{ratio:.2f}" for ratio in ratios),
            )
        console.print(made)


def titled(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for i, name in enumerate(columns):
        made.add_column(name, justify="right" if i else "left")
    return made


def write(size: Size, searched: list[dict[str, Any]], folder: Path) -> None:
    """full-size.json with everything, full-size.parquet with the rows of the first table."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"title": size.title, "matrix_peak": size.peak, "rows": size.rows, "sampling": searched}
    (folder / "full-size.json").write_text(json.dumps(found, indent=2) + "\n")
    pd.DataFrame(size.rows).to_parquet(folder / "full-size.parquet")


def main(arguments: list[str] | None = None) -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="overhead.py --full-size", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument(
        "--depth", type=int, help=f"blocks of the transformer: {BLOCKS} on a GPU, 4 on the CPU; 2 or more"
    )
    parser.add_argument("--resolution", type=int, help="pixels, a multiple of 16: 512 on a GPU, 128 on the CPU")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="bf16 on a GPU, fp32 on the CPU")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, help="runs that are timed: 3 on a GPU, 1 on the CPU")
    parser.add_argument(
        "--folder", type=Path, help="where the weights are written, used again if there; else a temporary one"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/full-size"))
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    small = device.type == "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        size = Size(
            args.depth or (4 if small else BLOCKS), args.resolution or (128 if small else 512), args.dtype or ("fp32" if small else "bf16"),
            device, folder, small,
        )  # fmt: skip
        if size.depth < 2:
            parser.error("--depth: the reward model leaves blocks out, so there must be 2 or more")
        if not (folder / "reward").is_dir():
            print("writing random weights", flush=True)
            build(
                folder, size.depth, 0, "lora", clip_blocks=1 if small else None, dropped=size.dropped, tokens=size.tokens,
            )  # fmt: skip
        size.peak = matrix_peak(device, DTYPES[size.dtype])
        searched: list[dict[str, Any]] = []
        repeats = args.repeats or (1 if small else 3)
        for part in args.only:
            print(part, flush=True)
            made = {"train": train, "score": scoring, "sample": searching, "update": update}[part](size, repeats)
            searched = made or searched
            forget()
        show(size, searched)
        write(size, searched, args.out)


if __name__ == "__main__":
    main()
