"""Make the embedded world's models from nothing: `python -m drmcli.tiny.build [--out FOLDER]`.

A real StableDiffusion3Pipeline, only small: two CLIP text encoders that learn to read captions, a VAE, and an SD3
transformer trained by flow matching (Esser et al. 2024, arXiv 2403.03206) on pictures of which half are flawed, so that
alignment has room; a reward model on top of it; and that one trained further on what the pipeline itself draws. Only
captions of the train split are seen. Saved as safetensors only.

The same seed and the same number of threads give the same weights on the same machine.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from drmcli.cards import reward_card
from drmcli.tiny import world

TOKENS = 16
"""Length of a tokenized caption."""
T5_TOKENS = 1
"""SD3 pads the prompt with zeros where the T5 encoder is absent; the transformer is trained with this many of them."""


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges spell each word of the world as one token; other words fall back to letters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    marks = [*letters, *"0123456789", *",.'-!?:;()\"&"]
    words = sorted({word for split in world.SPLITS for text in world.captions(split) for word in text.split()})
    vocab = [*marks, *(m + "</w>" for m in marks)]
    merges: list[tuple[str, str]] = []
    spelt = [[*word[:-1], word[-1] + "</w>"] for word in words]
    while pairs := Counter(pair for parts in spelt for pair in pairwise(parts)):
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((left, right))
        vocab.append(left + right)
        spelt = [_merge(parts, left, right) for parts in spelt]
    vocab = list(dict.fromkeys([*vocab, "<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(vocab)}, indent=0), encoding="utf-8"
    )
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n", encoding="utf-8"
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise AssertionError(f"the merges do not spell {word!r} as one token: {tokenizer.tokenize(word)}")
    return tokenizer


def _merge(parts: list[str], left: str, right: str) -> list[str]:
    """One merge of byte-pair encoding: every `left right` becomes one part."""
    out: list[str] = []
    for part in parts:
        if out and out[-1] == left and part == right:
            out[-1] = left + right
        else:
            out.append(part)
    return out


def attributes(texts: list[str]) -> torch.Tensor:
    """What a reader should know of a caption, as class indices [B, 8]: size, colour and shape of two things, place, relation."""
    rows = []
    for text in texts:
        caption = world.parse(text)
        row: list[int] = []
        for thing in (*caption.things, None)[:2]:
            row += (
                [0, 0, 0]
                if thing is None
                else [
                    world.SIZES.index(thing.size) + 1,
                    world.COLOR_NAMES.index(thing.color) + 1,
                    world.SHAPES.index(thing.shape) + 1,
                ]
            )
        row.append(list(world.PLACES).index(caption.place) + 1 if caption.place else 0)
        row.append(list(world.RELATIONS).index(caption.relation) + 1 if caption.relation else 0)
        rows.append(row)
    return torch.tensor(rows)


def train_text_encoder(tokenizer: CLIPTokenizer, *, seed: int, steps: int, log) -> CLIPTextModelWithProjection:
    """A small CLIP text encoder whose pooled embedding tells size, colour, shape, place and relation by linear heads."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=64,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    sizes = (3, 7, 4, 3, 7, 4, 6, 5)
    head = torch.nn.Linear(config.projection_dim, sum(sizes))
    texts = list(world.captions("train"))
    ids = tokenizer(texts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    target = attributes(texts)
    params = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(params, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        index = torch.randint(len(texts), (128,))
        pooled = encoder(ids[index]).text_embeds
        logits = head(pooled).split(sizes, dim=-1)
        loss = sum(F.cross_entropy(part, target[index, i]) for i, part in enumerate(logits))
        loss = loss + 1e-3 * pooled.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            log(f"text encoder step {step}: loss {loss.item():.4f}")
    return encoder.eval().requires_grad_(False)


def train_vae(*, seed: int, steps: int, log) -> AutoencoderKL:
    """An AutoencoderKL of factor 2 with 4 latent channels, for 32 x 32 pictures: latents [4, 16, 16]."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=world.SIZE,
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    texts = np.array(world.captions("train"))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        x = to_tensor(world.draw(list(rng.choice(texts, 32)), rng, flawed=0.7))
        posterior = vae.encode(x).latent_dist
        out = vae.decode(posterior.sample()).sample
        loss = F.mse_loss(out, x) + 0.1 * F.l1_loss(out, x) + 1e-5 * posterior.kl().mean() / 1024
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            psnr = -10 * math.log10(F.mse_loss(out, x).item() / 4)
            log(f"vae step {step}: loss {loss.item():.5f}, {psnr:.1f} dB")
    vae.eval().requires_grad_(False)
    latents = encode(vae, world.draw(list(rng.choice(texts, 512)), rng, flawed=0.5))
    vae.register_to_config(scaling_factor=1.0 / latents.std().item(), shift_factor=latents.mean().item())
    return vae


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """Modes of the posterior, before scaling and shift, [B, 4, 16, 16]."""
    return torch.cat(
        [vae.encode(to_tensor(part)).latent_dist.mode() for part in np.array_split(images, -(-len(images) // 256))]
    )


def train_transformer(
    pipe: StableDiffusion3Pipeline, *, seed: int, steps: int, pictures: int, compiled: bool, log
) -> SD3Transformer2DModel:
    """Flow matching on pictures of train captions, half of them flawed, with 10 % of the captions dropped for guidance."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    transformer, vae = pipe.transformer, pipe.vae
    texts = list(world.captions("train"))
    started = time.time()
    with torch.no_grad():
        parts = [
            pipe.encode_prompt(chunk, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS)
            for chunk in (*(texts[i : i + 256] for i in range(0, len(texts), 256)), [""])
        ]
        embeds, pooled = torch.cat([p[0] for p in parts]), torch.cat([p[2] for p in parts])
    which = rng.integers(0, len(texts), pictures)
    latents = torch.cat(
        [
            encode(vae, world.draw([texts[i] for i in part], rng, flawed=0.5))
            for part in np.array_split(which, -(-pictures // 2000))
        ]
    )
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    captions = torch.from_numpy(which)
    log(f"{pictures} pictures drawn and encoded in {time.time() - started:.0f} s")

    ema = EMAModel(transformer.parameters(), decay=0.9992, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = 300

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    forward = torch.compile(transformer) if compiled else transformer
    started, running = time.time(), 0.0
    for step in range(steps):
        index = torch.randint(pictures, (64,))
        x0, caption = latents[index], captions[index]
        caption = torch.where(torch.rand(64) < 0.1, len(texts), caption)
        # Half of the sigmas as SD3 draws them, half as the shifted schedule visits them.
        sigma = torch.sigmoid(torch.randn(64))
        uniform = torch.rand(64)
        sigma = torch.where(torch.arange(64) < 32, sigma, 3 * uniform / (1 + 2 * uniform))[:, None, None, None]
        noise = torch.randn_like(x0)
        velocity = forward(
            hidden_states=(1 - sigma) * x0 + sigma * noise,
            timestep=1000 * sigma.flatten(),
            encoder_hidden_states=embeds[caption],
            pooled_projections=pooled[caption],
            return_dict=False,
        )[0]
        loss = F.mse_loss(velocity, noise - x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(transformer.parameters())
        running = loss.item() if step == 0 else 0.99 * running + 0.01 * loss.item()
        if step % 250 == 0 or step == steps - 1:
            log(f"transformer step {step}: loss {running:.4f}, {(time.time() - started) / (step + 1):.3f} s a step")
        if step and step % 2500 == 0:
            ema.store(transformer.parameters())
            ema.copy_to(transformer.parameters())
            report(pipe, log, guidance=(4.0,), prompts=48)
            ema.restore(transformer.parameters())
            transformer.train().requires_grad_(True)
    ema.copy_to(transformer.parameters())
    return transformer.eval().requires_grad_(False)


@torch.no_grad()
def report(pipe: StableDiffusion3Pipeline, log, *, guidance=(1.0, 4.0), prompts: int = 96) -> None:
    """Judge of plain samples on val captions, 20 steps, as a user would draw them."""
    from drmcli.tiny.judge import judge

    texts = list(world.captions("val"))[:prompts]
    pipe.set_progress_bar_config(disable=True)
    for scale in guidance:
        images = pipe(
            texts,
            num_inference_steps=20,
            guidance_scale=scale,
            max_sequence_length=T5_TOKENS,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        verdict = judge((images * 255 + 0.5).astype(np.uint8), texts)
        named = ", ".join(f"{name} {value.mean():.3f}" for name, value in vars(verdict).items())
        log(f"guidance {scale:g}: {named}")


def build(
    out: Path,
    *,
    seed: int,
    text_steps: int,
    vae_steps: int,
    steps: int,
    pictures: int,
    width: int,
    compiled: bool,
    log=print,
) -> None:
    """Train and save the whole pipeline. See the module's docstring."""
    started = time.time()
    torch.use_deterministic_algorithms(True)
    torch.set_flush_denormal(True)
    work = out.with_name(out.name + ".part")
    shutil.rmtree(work, ignore_errors=True)
    tokenizers = [make_tokenizer(work / name) for name in ("tokenizer", "tokenizer_2")]
    encoders = [train_text_encoder(t, seed=seed + i, steps=text_steps, log=log) for i, t in enumerate(tokenizers)]
    log(f"text encoders done at {time.time() - started:.0f} s")
    vae = train_vae(seed=seed, steps=vae_steps, log=log)
    log(f"vae done at {time.time() - started:.0f} s")
    torch.manual_seed(seed)
    heads = width // 16
    transformer = SD3Transformer2DModel(
        sample_size=world.SIZE // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        num_attention_heads=heads,
        attention_head_dim=16,
        joint_attention_dim=128,
        caption_projection_dim=width,
        pooled_projection_dim=128,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
        dual_attention_layers=(),
    )
    log(f"transformer: {sum(p.numel() for p in transformer.parameters()) / 1e6:.2f} M parameters")
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=None,
        tokenizer_3=None,
    )
    train_transformer(pipe, seed=seed, steps=steps, pictures=pictures, compiled=compiled, log=log)
    report(pipe, log)
    for part in (pipe.transformer, pipe.vae, *encoders):
        part.half().float()  # rounded, so that half precision loses nothing; kept in float32, which every loader takes alike
    pipe.save_pretrained(work, safe_serialization=True)
    shutil.rmtree(out, ignore_errors=True)
    work.rename(out)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    log(f"{out}: {size / 1e6:.1f} MB in {time.time() - started:.0f} s")


def build_reward(out: Path, generator: Path, *, seed: int, steps: int, prompts: int, log=print) -> None:
    """Train the reward model that ships beside the pipeline: `drm train-reward`, only longer."""
    from drmcli.config import resolve
    from drmcli.recipes import train_reward
    from drmcli.run import Silent

    started = time.time()
    inside = generator.resolve() == (Path(__file__).parent / "weights" / "generator").resolve()
    work = out.with_name(out.name + ".part")
    shutil.rmtree(work, ignore_errors=True)
    flags = {
        "generator": "{package}/tiny/weights/generator" if inside else str(generator),
        "out": str(work / "run"),
        "cache_dir": str(work / "cache"),
        "seed": seed,
        "steps": steps,
        "shapes_prompts": prompts,
    }
    summary = train_reward.run(resolve("train-reward", flags=flags), Silent())
    _keep(summary, out, work, started, log)


def build_own_reward(out: Path, *, captions: int, pictures: int, steps: int, log=print) -> None:
    """Train the shipped reward model on: `drm data make` by the step that search takes, `drm train-reward --init`."""
    from drmcli.config import resolve
    from drmcli.recipes import data_make, train_reward
    from drmcli.run import Silent

    started = time.time()
    work = out.with_name(out.name + ".part")
    made = {"limit": captions, "num_images": pictures, "step_rule": "cps", "batch_size": 64, "out": str(work / "own")}
    own = data_make.run(resolve("data-make", flags=made), Silent())["data"]
    flags = {
        "init": "{package}/tiny/weights/reward", "data": [f"{own}=0.85", "shapes=0.15"], "shapes_prompts": 400,
        "steps": steps, "lr": 1e-3, "head_lr": 2e-3, "shared_noise": False,
        "eval_data": ["shapes"], "cache_dir": str(work / "cache"), "out": str(work / "run"),
    }  # fmt: skip
    summary = train_reward.run(resolve("train-reward", flags=flags), Silent())
    _keep(summary, out, work, started, log)


def _keep(summary: dict, out: Path, work: Path, started: float, log) -> None:
    """Move the reward model of a run in a working folder to its place, with a card that says nothing of that folder."""
    shutil.rmtree(out, ignore_errors=True)
    Path(summary["reward"]).rename(out)
    (out / "README.md").write_text(
        reward_card(json.loads((out / "config.json").read_text(encoding="utf-8"))), encoding="utf-8"
    )
    shutil.rmtree(work)
    accuracies = ", ".join(f"{row['accuracy']:.1f} % at {row['sigma']:g}" for row in summary["eval_by_sigma"])
    log(f"{out}: {accuracies}, in {time.time() - started:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "weights",
        help="folder of generator/, reward/ and reward-own/",
    )
    parser.add_argument("--only", choices=("generator", "reward", "reward-own"), help="make one of the three")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text-steps", type=int, default=1200)
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--pictures", type=int, default=40000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--reward-steps", type=int, default=1200)
    parser.add_argument("--reward-prompts", type=int, default=3000)
    parser.add_argument("--own-captions", type=int, default=560)
    parser.add_argument("--own-pictures", type=int, default=12)
    parser.add_argument("--own-steps", type=int, default=1600)
    parser.add_argument("--eager", action="store_true", help="do without torch.compile (no C++ compiler)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        print(line, flush=True)

    if args.only in (None, "generator"):
        build(
            args.out / "generator",
            seed=args.seed,
            text_steps=args.text_steps,
            vae_steps=args.vae_steps,
            steps=args.steps,
            pictures=args.pictures,
            width=args.width,
            compiled=not args.eager,
            log=log,
        )
    if args.only in (None, "reward"):
        sizes = {"steps": args.reward_steps, "prompts": args.reward_prompts}
        build_reward(args.out / "reward", args.out / "generator", seed=args.seed, **sizes, log=log)
    if args.only in (None, "reward-own"):
        sizes = {"captions": args.own_captions, "pictures": args.own_pictures, "steps": args.own_steps}
        build_own_reward(args.out / "reward-own", **sizes, log=log)


if __name__ == "__main__":
    main()
