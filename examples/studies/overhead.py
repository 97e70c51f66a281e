"""What the tool costs beyond the model's own forward and backward passes, side by side in one run.

    python examples/studies/overhead.py
    python examples/studies/overhead.py --full-size    # Stable Diffusion 3.5 Medium's shape: see full_size.py, and --full-size --help

Ratios on the embedded model: `drm bench` on 1,000 pairs, and on a dataset of HPDv2's layout and size, against the bare passes of the
same pictures (VAE, text encoders, reward model); a training step with a warm cache against the bare forward and backward of the
truncated transformer; step-wise sampling against the forward passes that it counts; an update of `drm grpo` against its forward and
backward passes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from drmcli.config import resolve
from drmcli.data.images import load_image
from drmcli.families.base import Conditioning
from drmcli.flow import add_noise
from drmcli.generator import Generator
from drmcli.recipes import bench, grpo, train_reward
from drmcli.recipes.alignment import Alignment, assemble
from drmcli.recipes.launch import start_accelerator
from drmcli.recipes.pairs import LazyGenerator, encode_pairs, first_pairs, load_preferences
from drmcli.results import read
from drmcli.reward import RewardModel
from drmcli.rollout import Rollouts
from drmcli.run import Silent, open_run
from drmcli.sampling import Search, sample
from drmcli.tiny import world


def bench_ratio(folder: Path, dataset: str = "shapes", repeats: int = 3) -> None:
    """The recipe on pictures that no cache knows, after the pictures themselves have been drawn."""
    flags: dict = {"cache_dir": str(folder / "cache"), "dataset": dataset}
    flags |= {"pairs": 1000} if dataset == "shapes" else {"data_dir": str(folder / dataset)}
    config = resolve("bench", flags=flags)
    drawer = LazyGenerator.of(config, torch.device("cpu"))
    data = load_preferences(dataset, "test", config, drawer, Silent(), flag="", prompts=200)
    data = first_pairs(data, config.pairs or len(data))
    whole, bare = [], []
    for i in range(repeats):
        for encoded in folder.glob("cache/images-*"), folder.glob("cache/prompts-*"):
            for store in encoded:
                for file in store.iterdir():
                    file.unlink()
        started = time.perf_counter()
        summary = bench.run(resolve("bench", flags=flags | {"out": str(folder / f"bench-{dataset}-{i}")}), Silent())
        whole.append(time.perf_counter() - started)
        bare.append(bare_bench(config, data))
    a, b = statistics.median(whole), statistics.median(bare)
    pictures = f"{summary['n_images']} pictures x {len(config.sigmas)} noise levels"
    print(f"drm bench --dataset {dataset}, {summary['n_prompts']} prompts, {summary['n_pairs']} pairs, {pictures}:")
    print(f"  command {a:.2f} s, bare forward passes {b:.2f} s, ratio {a / b:.2f} (to be at most 1.30)")


def write_hpdv2(folder: Path, prompts: int = 400, each: int = 9) -> None:
    """A dataset in HPDv2's published layout and size, with pictures of the embedded world."""
    (folder / "test").mkdir(parents=True)
    captions = [c for c in list(world.captions("test"))[:prompts] for _ in range(each)]
    rng = np.random.default_rng(0)
    for i, pixels in enumerate(world.draw(captions, rng, flawed=0.8)):
        Image.fromarray(pixels).save(folder / "test" / f"{i:05d}.png")
    rows = [
        {
            "prompt": captions[i],
            "image_path": [f"{j:05d}.png" for j in range(i, i + each)],
            "rank": rng.permutation(each).tolist(),
        }
        for i in range(0, len(captions), each)
    ]
    (folder / "test.json").write_text(json.dumps(rows))


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
        embeds = Conditioning.cat(parts)
        for i in range(0, len(pictures), size):
            cond = embeds[where[i : i + size]]
            for sigma in config.sigmas:
                reward.score((1 - sigma) * latents[i : i + size] + sigma * noise[i : i + size], sigma, cond)
    return time.perf_counter() - started


class BareSteps(Silent):
    """After each whole step, outside its time, the bare forward and backward of the same batch: both see the same machine."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.model: RewardModel | None = None
        self.batches: train_reward.Batches | None = None

    def progress(self, task: str, done: int, total: int, **fields: object) -> None:
        if task != "train" or self.model is None or self.batches is None:
            return
        batch = self.batches.micro(done - 1, 1, 0)[0]
        noisy = add_noise(batch.latents, batch.noise, batch.sigma)
        weights = [p for n, p in self.model.named_parameters() if p.requires_grad and not n.startswith("head.")]
        started = time.perf_counter()
        torch.autograd.grad(self.model.features(noisy, batch.sigma, batch.conds)[-1].square().mean(), weights)
        self.seconds.append(time.perf_counter() - started)


def step_ratio(folder: Path, steps: int = 60) -> None:
    """Whole steps of the recipe against bare passes of the same batches, in turns."""
    flags = {"cache_dir": str(folder / "cache"), "steps": steps, "save_every": 0, "log_every": 1, "eval_pairs": 50}
    config = resolve("train-reward", flags=flags | {"out": str(folder / "train"), "shapes_prompts": 400})
    device = torch.device("cpu")
    with open_run("train-reward", resolve("train-reward", flags={"out": str(folder / "bare")}), Silent()) as run:
        generator = LazyGenerator.of(config, device)
        data = load_preferences("shapes", "train", config, generator, Silent(), flag="")
        pairs, _, _ = encode_pairs(data, config, generator, run, resolution=None)
    reporter = BareSteps()
    reporter.batches = train_reward.Batches(config, [pairs], [1.0])
    reporter.model = train_reward.make_model(config).train()
    train_reward.run(config, reporter)
    whole = read(folder / "train" / "metrics")["seconds"].tolist()
    a, b = statistics.median(whole[5:]), statistics.median(reporter.seconds[5:])
    pictures = len(reporter.batches.micro(0, 1, 0)[0].latents)
    print(f"training step, {config.batch_size} pairs, {pictures} pictures, warm cache:")
    print(
        f"  whole step {1000 * a:.0f} ms, bare forward and backward {1000 * b:.0f} ms, ratio {a / b:.2f} (to be at most 1.15)"
    )


def sampling_ratio(pictures: int = 16, repeats: int = 5) -> None:
    """`drm sample --stepwise --beams 4` without loading, against the forward passes that it counts, in turns."""
    config = resolve("sample", flags={"mode": "stepwise", "beams": 4})
    generator = Generator.load(config.generator, max_sequence_length=config.max_sequence_length)
    reward = RewardModel.from_pretrained(config.reward)
    prompts = list(world.captions("test"))[:pictures]
    search = Search(mode="stepwise", beams=4, num_inference_steps=config.steps, max_batch=config.max_batch)
    cond = generator.encode_prompts(prompts)
    whole, bare = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        cond = generator.encode_prompts(prompts)
        out = sample(generator, reward, cond, cond, list(range(pictures)), search, shape=(4, 16, 16))
        generator.decode(out.latents)
        whole.append(time.perf_counter() - started)
        started = time.perf_counter()
        with torch.no_grad():
            cond = generator.encode_prompts(prompts)
            for _ in range(out.calls.generator // pictures):
                generator.velocity(out.latents, 0.5, cond)
            many, owner = out.latents.repeat_interleave(4, 0), torch.arange(pictures).repeat_interleave(4)
            for _ in range((out.calls.reward - pictures) // len(many)):
                for part in torch.arange(len(many)).split(config.max_batch):
                    reward.score(many[part], 0.5, cond[owner[part]])
            reward.score(out.latents, 0.0, cond)
            generator.decode(out.latents)
        bare.append(time.perf_counter() - started)
    a, b = statistics.median(whole), statistics.median(bare)
    print(f"step-wise sampling, {pictures} pictures, 4 candidates, {config.steps} steps:")
    print(f"  whole {a:.2f} s, its forward passes alone {b:.2f} s, ratio {a / b:.2f} (to be at most 1.15)")


def update_ratio(folder: Path, repeats: int = 5) -> None:
    """One update of `drm grpo` against its forward and backward passes alone, in turns; and how it grows with k."""
    times: dict[int, tuple[float, float, float]] = {}
    for k in (6, 12):
        config = resolve("grpo", flags={"out": str(folder / f"grpo-{k}"), "group_size": k})
        with open_run("grpo", config, Silent()) as run:
            aligner = assemble(config, start_accelerator(config, rounds=1), run)
            whole, bare, rewards = [], [], []
            for update in range(repeats):
                started = time.perf_counter()
                drawn = aligner.algorithm.draw(aligner.pick(update)[1], update)
                grpo.learn(aligner, drawn, update)
                whole.append(time.perf_counter() - started)
                seconds, of_rewards = bare_update(aligner, drawn.rollouts, drawn.prompts.cond)
                bare.append(seconds)
                rewards.append(of_rewards)
        times[k] = statistics.median(whole), statistics.median(bare), statistics.median(rewards)
    for k, (a, b, r) in times.items():
        print(f"one update of drm grpo, {config.prompts_per_update} prompts, {k} candidates a state:")
        print(
            f"  whole {a:.2f} s, its passes alone {b:.2f} s ({r:.2f} s of reward), ratio {a / b:.2f} (to be at most 1.20)"
        )
    print(
        f"  12 candidates instead of 6: {times[12][0] - times[6][0]:+.2f} s, reward passes {times[12][2] - times[6][2]:+.2f} s"
    )


def bare_update(aligner: Alignment, rollouts: Rollouts, cond: Conditioning) -> tuple[float, float]:
    """Seconds of an update's passes on the same states, and of its reward passes among them."""
    config, generator, reward = aligner.config, aligner.policy.generator, aligner.rewards.models[0]
    first, started, of_rewards = rollouts.visits[0], time.perf_counter(), 0.0
    with torch.no_grad():
        for _ in range(config.steps):
            generator.velocity(first.states, 0.5, cond)
        for visit in rollouts.visits:
            flat, owner = visit.actions.flatten(0, 1), visit.owner.repeat_interleave(visit.actions.shape[1])
            begun = time.perf_counter()
            for part in torch.arange(len(flat)).split(config.max_batch):
                reward.score(flat[part], visit.sigma_next, cond[owner[part]])
            of_rewards += time.perf_counter() - begun
    for visit in rollouts.visits:
        for part in torch.arange(len(visit.states)).split(config.micro_batch_size):
            if config.kl_beta:
                with torch.no_grad(), aligner.policy.reference_policy():
                    generator.velocity(visit.states[part], visit.sigma, cond[part])
            loss = generator.velocity(visit.states[part], visit.sigma, cond[part]).square().mean()
            torch.autograd.grad(loss, aligner.policy.trained)
    return time.perf_counter() - started, of_rewards


def main() -> None:
    """All ratios of the embedded model."""
    with tempfile.TemporaryDirectory() as name:
        print(f"{torch.get_num_threads()} threads")
        step_ratio(Path(name))
        bench_ratio(Path(name))
        write_hpdv2(Path(name) / "hpdv2")
        bench_ratio(Path(name), "hpdv2", repeats=1)
        sampling_ratio()
        update_ratio(Path(name))


if __name__ == "__main__":
    if "--full-size" in sys.argv[1:]:
        import full_size  # of this folder

        full_size.main([argument for argument in sys.argv[1:] if argument != "--full-size"])
    else:
        argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
        main()
