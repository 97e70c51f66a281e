"""What the tool costs beyond the model's own forward and backward passes, side by side in one run.

    python examples/overhead.py

Two ratios on the embedded model: `drm bench` on 1,000 pairs against the bare passes of the same pictures (VAE, text encoders,
reward model), and a training step with a warm cache against the bare forward and backward of the truncated transformer.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch

from drmcli.config import resolve
from drmcli.generator import Generator
from drmcli.images import load_image
from drmcli.recipes import bench, train_reward
from drmcli.recipes.pairs import LazyGenerator, PairScorer, encode_pairs, first_pairs, load_preferences
from drmcli.results import read
from drmcli.reward import RewardModel
from drmcli.run import Silent, open_run


def bench_ratio(folder: Path, repeats: int = 3) -> None:
    """The recipe on pictures that no cache knows, after the procedural dataset itself has been drawn."""
    flags = {"pairs": 1000, "cache_dir": str(folder / "cache")}
    config = resolve("bench", flags=flags)
    device = torch.device("cpu")
    data = first_pairs(
        load_preferences("shapes", "test", config, LazyGenerator.of(config, device), Silent(), flag="", prompts=200),
        1000,
    )
    whole, bare = [], []
    for i in range(repeats):
        for encoded in folder.glob("cache/images-*"), folder.glob("cache/prompts-*"):
            for store in encoded:
                for file in store.iterdir():
                    file.unlink()
        started = time.perf_counter()
        summary = bench.run(resolve("bench", flags=flags | {"out": str(folder / f"bench-{i}")}), Silent())
        whole.append(time.perf_counter() - started)
        bare.append(bare_bench(config, data))
    a, b = statistics.median(whole), statistics.median(bare)
    print(f"drm bench, {summary['n_pairs']} pairs, {summary['n_images']} pictures x {len(config.sigmas)} noise levels:")
    print(f"  command {a:.2f} s, bare forward passes {b:.2f} s, ratio {a / b:.2f} (to be at most 1.30)")


def bare_bench(config, data) -> float:
    """Seconds of the same passes with everything already in memory."""
    generator = Generator.load(
        config.generator, components=("text", "vae"), max_sequence_length=config.max_sequence_length
    )
    reward = RewardModel.from_pretrained(config.reward)
    pictures = [load_image(source) for source in data.images]
    pixels = generator.preprocess(pictures)
    prompt_of = dict(zip(data.pairs["chosen"], data.pairs["prompt"])) | dict(
        zip(data.pairs["rejected"], data.pairs["prompt"])
    )
    where = torch.tensor([prompt_of[i] for i in range(len(pictures))])
    size, vae = config.batch_size, generator.pipe.vae
    noise = torch.randn(len(pictures), 4, 16, 16)
    started = time.perf_counter()
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(size)])
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        parts = [generator.encode_prompts(data.prompts[i : i + size]) for i in range(0, len(data.prompts), size)]
        embeds = torch.cat([p.prompt_embeds for p in parts]), torch.cat([p.pooled_prompt_embeds for p in parts])
        for i in range(0, len(pictures), size):
            cond = type(parts[0])(embeds[0][where[i : i + size]], embeds[1][where[i : i + size]])
            for sigma in config.sigmas:
                reward.score((1 - sigma) * latents[i : i + size] + sigma * noise[i : i + size], sigma, cond)
    return time.perf_counter() - started


def step_ratio(folder: Path, steps: int = 40) -> None:
    """Whole steps of the recipe against bare passes of the same batches. Steps alternate so that both see the same machine."""
    flags = {
        "out": str(folder / "train"),
        "cache_dir": str(folder / "cache"),
        "steps": steps,
        "save_every": 0,
        "log_every": 1,
    }
    config = resolve("train-reward", flags=flags | {"eval_pairs": 50, "shapes_prompts": 400})
    train_reward.run(config, Silent())
    seconds = read(folder / "train" / "metrics")["seconds"].tolist()[5:]

    accelerator = train_reward.make_accelerator(config)
    with open_run("train-reward", resolve("train-reward", flags={"out": str(folder / "bare")}), Silent()) as run:
        generator = LazyGenerator.of(config, accelerator.device)
        data = load_preferences("shapes", "train", config, generator, Silent(), flag="")
        pairs, _, _ = encode_pairs(data, config, generator, run, resolution=None)
    assert len(PairScorer(pairs).items)
    batches = train_reward.Batches(config, [pairs], [1.0])
    model = train_reward.make_model(config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    bare = []
    for step in range(steps):
        batch = batches.micro(step, 1, 0)[0]
        noisy = (1 - batch.sigma[:, None, None, None]) * batch.latents + batch.sigma[:, None, None, None] * batch.noise
        started = time.perf_counter()
        loss = model.features(noisy, batch.sigma, batch.cond)[-1].square().mean()
        torch.autograd.grad(
            loss, [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head.")]
        )
        bare.append(time.perf_counter() - started)
    assert trained
    a, b = statistics.median(seconds), statistics.median(bare[5:])
    print(f"training step, {config.batch_size} pairs, {len(batch.latents)} pictures, warm cache:")
    print(
        f"  whole step {1000 * a:.0f} ms, bare forward and backward {1000 * b:.0f} ms, ratio {a / b:.2f} (to be at most 1.15)"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(f"{torch.get_num_threads()} threads")
        step_ratio(Path(name))
        bench_ratio(Path(name))
