"""What `score`, `bench` and `sample` hold in memory, put together from their configs for `--dry-run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from drmcli.config import Bench, Grpo, Sample, Score, package_path
from drmcli.expected import widest
from drmcli.fingerprints import same_part
from drmcli.fitting import at_once, tile
from drmcli.footprint import Footprint, bytes_of, generator_pass, reward_pass, text_pass, vae_passes
from drmcli.generator import pick_device, pick_dtype
from drmcli.hub import explained
from drmcli.quantize import saving
from drmcli.recipes.plan import Known, describe
from drmcli.reward_config import RewardConfig, read_config
from drmcli.sampling import Search
from drmcli.scorers import parse_term, read_reference
from drmcli.scorers.drm import KINDS, dina
from drmcli.scorers.plain import named_callable


def describe_reward(ref: str, flag: str) -> RewardConfig | None:
    """The config of a reward model of drm; None for a scorer whose weights no plan counts.

    Raises what loading it would for a reference that leads nowhere.
    """
    found = read_reference(ref, flag)
    if found.kind == "function":
        named_callable(ref, flag)
    if found.kind != "model":
        return None
    place = Path(package_path(ref))
    if ref == dina.REPOSITORY or (place.is_dir() and any(kind.is_published_layout(place) for kind in KINDS.values())):
        return None
    if not place.is_dir():
        with explained(ref, flag):
            place = Path(hf_hub_download(ref, "config.json")).parent
    return read_config(place, f"{flag} {ref}")


def encoders(
    known: Known,
    dtype: torch.dtype,
    *,
    prompts: int,
    encode: int,
    decode: int,
    size: tuple[int, int],
    t5: bool,
    tiling: str = "auto",
    bits: str = "none",
) -> Footprint:
    """A pipeline's models beside the denoiser, and their passes over so many prompts and pictures.

    size: of the latents; tiling: does the VAE work on tiles? bits: `Kernels.quantize`, of the text encoders.
    """
    parts = {name: part for name, part in known.parts(dtype).items() if t5 or name != "text_encoder_3"}
    models = {name: encoder_bytes(known, name, part, bits) for name, part in parts.items()}
    texts = [
        text_pass(part, prompts=prompts, tokens=known.max_sequence_length, bits=bits)
        for name, part in parts.items()
        if name in known.family.text
    ]
    passes = {"encode prompts": max(texts, default=0)}
    if "vae" in parts:
        pixels = size[0] * size[1] * known.vae_factor**2
        tile(parts["vae"], tiling, pixels)
        decode = min(decode, at_once(pixels))
        channels = known.family.channels(known.transformer)
        passes |= vae_passes(
            known.family, parts["vae"], channels, encode=encode, decode=decode, size=size, factor=known.vae_factor
        )
    return Footprint(models, passes)


def encoder_bytes(known: Known, name: str, part: Any, bits: str) -> int:
    """Of a part of a pipeline beside its denoiser: its text encoders are kept in 8 bits where the blocks are."""
    return bytes_of(part) - (saving([part], bits)[0] if name in known.family.text else 0)


def of_scoring(
    reward: RewardConfig,
    dtype: torch.dtype,
    *,
    resolution: int | None,
    prompts: int,
    encode: int,
    score: int,
    bits: str,
) -> Footprint:
    """A reward model with the encoders of its base, for so many prompts and pictures at once."""
    known = base_of(reward)
    side = known.latent_side(resolution or reward.resolution)
    size = (side, side)
    made = encoders(
        known, dtype, prompts=prompts, encode=encode, decode=0, size=size, t5=reward.text_encoder_3, bits=bits
    )
    weights, one = reward_pass(reward, count=score, size=size, tokens=known.prompt_tokens, dtype=dtype, bits=bits)
    return Footprint({"reward model": weights, **made.models}, {**made.passes, "score": one})


def of_score(config: Score) -> dict[str, Any]:
    """The plan of `drm score`."""
    reward = describe_reward(config.reward, "--reward")
    if reward is None:
        return _without(config.reward)
    device = pick_device(config.device)
    count = min(config.batch_size, len(config.images))
    made = of_scoring(
        reward, pick_dtype(config.dtype, device), resolution=config.resolution, encode=count, score=count,
        prompts=min(config.batch_size, len(set(config.prompts))), bits=config.quantize,
    )  # fmt: skip
    return {"memory": made.to_dict(cuda=device.type == "cuda")}


def of_bench(config: Bench) -> dict[str, Any]:
    """The plan of `drm bench` of preferences: of the model that needs most, since one is loaded at a time."""
    device = pick_device(config.device)
    cuda, dtype = device.type == "cuda", pick_dtype(config.dtype, device)
    asked, others = described_scorers(config)
    largest = None
    for reward in asked.values():
        made = of_scoring(
            reward, dtype, resolution=config.resolution, prompts=config.encode_batch_size,
            encode=config.encode_batch_size, score=config.batch_size, bits=config.quantize,
        )  # fmt: skip
        made.gone["score"] = tuple(
            name for name in made.models if name == "vae" or (name != "reward model" and config.prompt_cache != "live")
        )
        if largest is None or made.total(cuda=cuda) > largest.total(cuda=cuda):
            largest = made
    return ({"memory": largest.to_dict(cuda=cuda)} if largest else {}) | _without(*others)


def of_sample(config: Sample, known: Known, search: Search, pictures: int, size: tuple[int, int]) -> dict[str, Any]:
    """The plan of `drm sample`. pictures: to draw in all; size: of their latents."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    together = max(1, min(config.batch_size, pictures))
    drawn, scored = widest(search, trace=config.trace)
    guided = known.family.guides(known.transformer, config.guidance_scale)
    shared: dict[str, Any] = {"size": size, "dtype": dtype, "bits": config.quantize}
    made = encoders(
        known, dtype, prompts=min(together, len(set(config.prompts)) or 1), encode=0, decode=together,
        size=size, t5=config.text_encoder_3, tiling=config.vae_tiling, bits=config.quantize,
    )  # fmt: skip
    count = min(config.max_batch, together * drawn) * (2 if guided else 1)
    weights, one = generator_pass(known.family, known.transformer, count=count, tokens=known.prompt_tokens, **shared)
    models, passes = {known.family.denoiser: weights} | made.models, {"velocity": one} | made.passes
    rewards, others = described_rewards(config, needed=False)
    for name, reward in rewards.items():
        models[name], one = reward_pass(
            reward, count=min(config.max_batch, together * scored), tokens=base_of(reward).prompt_tokens,
            lent=lent(reward, config, known), **shared,
        )  # fmt: skip
        passes["score"] = max(passes.get("score", 0), one)
        models |= {f"{name}: {part}": size for part, size in own_encoders(reward, config, known, dtype).items()}
    return {"memory": Footprint(models, passes).to_dict(cuda=device.type == "cuda")} | _without(*others)


def lent(reward: RewardConfig, config: Grpo | Sample, known: Known) -> bool:
    """Are a reward model's blocks the generator's own, as far as can be told without a download?"""
    base, own = (reward.base_model, reward.base_revision), (config.generator, config.revision)
    return reward.backbone != "full" and same_part(base, own, known.family.denoiser)


def base_of(reward: RewardConfig) -> Known:
    """The pipeline that a reward model was made of."""
    return describe(reward.base_model, reward.base_revision, reward.max_sequence_length, "base_model")


def own_encoders(reward: RewardConfig, config: Grpo | Sample, known: Known, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the text encoders and VAE that a reward model loads beside the generator's, by name.

    As `encoders.share` decides, as far as can be told without a download: none where the text encoders and their length are the same,
    else every part that differs. A pipeline may have no T5, whatever is asked for.
    """
    base = base_of(reward)
    there = {name for name in known.makers() if config.text_encoder_3 or name != "text_encoder_3"}
    needed = {n: part for n, part in base.parts(dtype).items() if reward.text_encoder_3 or n != "text_encoder_3"}
    one, other = (known.where, known.revision), (base.where, base.revision)
    own = {
        n: encoder_bytes(base, n, part, config.quantize)
        for n, part in needed.items()
        if n not in there or not same_part(one, other, n)
    }
    text = set(base.family.text)
    same = not own.keys() & text and there & text == needed.keys() & text
    return {} if same and known.max_sequence_length == base.max_sequence_length else own


def described_rewards(config: Grpo | Sample, *, needed: bool) -> tuple[dict[str, RewardConfig], list[str]]:
    """A command's reward models, by their names in its plan; and scorers whose weights no plan counts.

    needed: none is no scorer. Raises what `describe_reward` does.
    """
    found, others = {}, []
    for i, ref in enumerate([config.reward, *config.add_rewards]):
        if ref == "none" and not needed:
            continue
        flag = "--add-reward" if i else "--reward"
        reward = describe_reward(parse_term(ref, flag)[0], flag)
        if reward is None:
            others.append(ref)
        else:
            found[f"reward model {i + 1}" if config.add_rewards else "reward model"] = reward
    return found, others


def described_scorers(config: Bench) -> tuple[dict[str, RewardConfig], list[str]]:
    """What `drm bench` compares: reward models by their references, and scorers whose weights no plan counts.

    Raises what `describe_reward` does.
    """
    flags = [("--reward", config.reward), *(("--scorer", s) for s in config.scorers), ("--against", config.against)]
    asked = {ref: describe_reward(ref, flag) for flag, ref in flags if ref and ref != "none"}
    found = {ref: reward for ref, reward in asked.items() if reward is not None}
    return found, [ref for ref in asked if ref not in found]


def _without(*refs: str) -> dict[str, Any]:
    return {"not in the memory plan": ", ".join(refs)} if refs else {}
