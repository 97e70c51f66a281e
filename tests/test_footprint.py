"""What --dry-run says of memory, against real tensors; and the published configs that it plans with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from drmcli.config import resolve
from drmcli.errors import InputError, MissingError
from drmcli.families import family_named
from drmcli.footprint import alive_in, bytes_of
from drmcli.generator import Generator
from drmcli.recipes import bench, data_plan, grpo, sample, score, train_reward
from drmcli.recipes.footprints import own_encoders
from drmcli.recipes.plan import describe, published_configs
from drmcli.reward import RewardModel
from drmcli.reward_config import RewardConfig

CAPTION = "a large red circle above a small blue square"


@pytest.mark.parametrize(
    ("ref", "parts"),
    [
        ("stabilityai/stable-diffusion-3.5-medium", {"transformer": 2.243e9, "text_encoder_3": 4.762e9}),
        ("stabilityai/stable-diffusion-3.5-large", {"transformer": 8.057e9, "text_encoder_2": 0.695e9, "vae": 83.8e6}),
        ("black-forest-labs/FLUX.1-dev", {"transformer": 11.901e9, "text_encoder": 0.123e9}),
    ],
)
def test_published_configs_have_the_published_sizes(ref: str, parts: dict[str, float]) -> None:
    """Numbers of parameters, with no network: what these models' owners say of them."""
    known = describe(ref, None, 256)
    assert "cannot be reached" in known.download and "published configs" in known.download
    with torch.device("meta"):
        made = known.parts(torch.bfloat16, tuple(parts))
        kind = family_named(known.family.name).denoiser_class
        made["transformer"] = kind.from_config(known.transformer)  # type: ignore[attr-defined]
    for name, count in parts.items():
        assert sum(p.numel() for p in made[name].parameters()) == pytest.approx(count, rel=0.003), name


def test_a_model_that_nobody_knows_is_still_missing() -> None:
    assert published_configs("owner/name") is None
    with pytest.raises(MissingError, match="--generator owner/name"):
        describe("owner/name", None, 256)


def test_the_plan_of_a_gated_model(drm: Callable) -> None:
    """Every preset's plan that a GPU of 24 GB was chosen for, without the model; what is not counted is said."""
    plan = drm("sample", "a prompt", "--preset", "sd35-medium", "--reward", "pickscore", "--dry-run", "--json",
               "--dtype", "bf16", "--set", "text_encoder_3=false").json["plan"]  # fmt: skip
    assert plan["not in the memory plan"] == "pickscore"
    models = plan["memory"]["models"]
    assert set(models) == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    assert models["transformer"] == pytest.approx(2 * (2.243e9 + 384 * 384 * 1536), rel=0.001)
    assert sum(models.values()) < plan["memory"]["total"] < 10 * 2**30


def pictures(folder: Path, count: int, side: int) -> list[str]:
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.new("RGB", (side, side), (20 * i, 90, 200)).save(path)
    return [str(path) for path in paths]


def test_the_plan_of_scoring_is_what_scoring_uses(tmp_path: Path, reward_folder: Path) -> None:
    paths = pictures(tmp_path, 6, 64)
    flags = {"reward": str(reward_folder), "images": paths, "prompts": [CAPTION], "batch_size": 4}
    memory = score.plan(resolve("score", flags=flags))["memory"]
    model = RewardModel.from_pretrained(str(reward_folder))
    pipe = model.generator().pipe
    real = {"reward model": model} | {n: getattr(pipe, n) for n in memory["models"] if n != "reward model"}
    assert memory["models"] == {name: bytes_of(part) for name, part in real.items()}
    assert memory["total"] == sum(memory["models"].values()) + max(memory["passes"].values())
    images = [Image.open(path).convert("RGB") for path in paths]
    used = alive_in(lambda: model.score_images(images, [CAPTION] * 6, batch_size=4))
    assert max(memory["passes"].values()) == pytest.approx(used, rel=0.15)


def test_the_plan_of_a_search_is_what_it_uses(reward_folder: Path, generator_folder: Path) -> None:
    """Guidance doubles the velocity's batch, candidates are scored together, and pictures are decoded at the end."""
    flags = {"reward": str(reward_folder), "prompts": [CAPTION, "a small green triangle"], "mode": "stepwise", "beams": 6,
             "guidance_scale": 3.0, "steps": 3, "max_sequence_length": 1}  # fmt: skip
    memory = sample.plan(resolve("sample", flags=flags))["memory"]
    generator = Generator.load(str(generator_folder), max_sequence_length=1)
    model = RewardModel.from_pretrained(str(reward_folder))
    shape = generator.latent_shape(generator.image_size, generator.image_size)
    cond = generator.encode_prompts(flags["prompts"])
    negative = generator.encode_negative("", 3.0)
    with torch.no_grad():
        used = {
            "velocity": alive_in(lambda: generator.velocity(torch.randn(2, *shape), 0.5, cond, negative, 3.0)),
            "score": alive_in(lambda: model.score(torch.randn(12, *shape), 0.5, cond[torch.arange(12) // 6])),
            "decode pictures": alive_in(lambda: generator.decode(torch.randn(2, *shape))),
        }
    for name, size in used.items():
        assert memory["passes"][name] == pytest.approx(size, rel=0.15), name
    assert memory["models"]["transformer"] == bytes_of(generator.transformer)


def test_encoders_that_are_there_are_counted_once(reward_folder: Path, generator_folder: Path, tmp_path: Path) -> None:
    """What is there decides: not whether T5 is asked for of a pipeline that has none, nor what folders are called."""
    copy = shutil.copytree(generator_folder, tmp_path / "copy")
    other = shutil.copytree(generator_folder, tmp_path / "other")
    (other / "text_encoder" / "model.safetensors").unlink()
    (other / "text_encoder" / "model.safetensors").write_bytes(b"of another training")
    made = Generator.load(str(generator_folder))
    encoder = bytes_of(made.pipe.text_encoder)
    length = resolve("sample").max_sequence_length
    for name, asked, own in (
        ("t5", {"text_encoder_3": False}, 0),
        ("copy", {"generator": str(copy), "revision": None}, 0),
        ("other", {"generator": str(other), "revision": None}, encoder),
        ("length", {"max_sequence_length": length + 1}, 0),  # other embeddings of the same weights
    ):
        flags = asked | {"reward": str(reward_folder)}
        drawn = sample.plan(resolve("sample", flags=flags | {"prompts": [CAPTION]}))["memory"]["models"]
        aligned = grpo.plan(resolve("grpo", flags=flags))["memory"]["beside"]
        for models in (drawn, aligned):
            assert sum(size for part, size in models.items() if part.startswith("reward model: ")) == own, name


def test_a_reward_model_with_t5_brings_it(tmp_path: Path) -> None:
    """The preset of Stable Diffusion 3.5 Medium trains with T5 and aligns without: then it is loaded for the reward model."""
    published = published_configs("stabilityai/stable-diffusion-3.5-medium")
    assert published is not None
    known, sizes = describe(published, None, 256), {}
    for t5 in (False, True):
        settings = RewardConfig(base_model=published, transformer=known.transformer, backbone="lora", text_encoder_3=t5)
        for mine in (False, True):
            config = resolve("grpo", flags={"generator": published, "text_encoder_3": mine})
            sizes[t5, mine] = own_encoders(settings, config, known, torch.bfloat16)
    assert sizes[True, True] == sizes[False, False] == sizes[False, True] == {}
    assert sizes[True, False].keys() == {"text_encoder_3"}
    assert sizes[True, False]["text_encoder_3"] == pytest.approx(2 * 4.762e9, rel=0.003)


def test_the_plan_of_a_benchmark_lets_go_of_the_vae(reward_folder: Path) -> None:
    flags = {"reward": str(reward_folder), "encode_batch_size": 1, "batch_size": 512}
    memory = bench.plan(resolve("bench", flags=flags))["memory"]
    assert memory["total"] == memory["models"]["reward model"] + memory["passes"]["score"]


@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        (train_reward, {"data": ["nowhere.jsonl"]}, "nowhere.jsonl"),
        (sample, {"prompts": ["a"], "reward": "./nowhere"}, "--reward ./nowhere"),
        (sample, {"prompts": ["a"], "reward": "owner/name"}, "--reward owner/name"),
        (sample, {"prompts": ["a"], "height": 61}, "--height 61"),
        (bench, {"scorers": ["math:nothing_like_it"]}, "math:nothing_like_it"),
        (bench, {"dataset": "nowhere.jsonl"}, "nowhere.jsonl"),
        (grpo, {"reward": "./nowhere"}, "--reward ./nowhere"),
        (grpo, {"judge": "./nowhere"}, "--judge ./nowhere"),
        (grpo, {"dtype": "fp16"}, "--dtype fp16"),
        (score, {"images": ["nowhere.png"], "prompts": ["a"]}, "nowhere.png"),
    ],
)
def test_a_dry_run_fails_on_what_would_fail(command, flags: dict, said: str) -> None:
    name = command.__name__.rsplit(".", 1)[1].replace("_", "-")
    with pytest.raises((InputError, MissingError)) as told:
        command.plan(resolve(name, flags=flags))
    assert said in told.value.message


def test_the_plan_of_a_benchmark_counts_its_data(tmp_path: Path) -> None:
    """Pictures of a file, each once, and gigabytes; a published set that nobody points to is named, not an error."""
    side = pictures(tmp_path, 3, 8)
    rows = [{"prompt": "a", "chosen": side[0], "rejected": r} for r in side[1:]]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = bench.plan(resolve("bench", flags={"dataset": str(file), "allow_outside": True}))
    assert (plan["pairs, at most"], plan["prompts"], plan["pictures"]) == (2, 1, 3)
    plan = bench.plan(resolve("bench", flags={"dataset": "hpdv2"}))
    assert "hpdv2" in plan["data not here"].lower() and plan["pictures"] == 0
    with pytest.raises(MissingError):
        bench.plan(resolve("bench", flags={"dataset": "hpdv2", "data_dir": str(tmp_path / "nowhere")}))


def test_a_cache_that_cannot_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    plan = train_reward.plan(resolve("train-reward", flags={"prompt_cache": "disk"}))
    assert "more than is free" in plan["beware"]


def test_live_prompts_need_their_encoders_beside_training(generator_folder: Path) -> None:
    """Encoded live, the text encoders stay: the plan is larger by their real bytes, and names them."""
    disk, live = (train_reward.plan(resolve("train-reward", flags={"prompt_cache": where, "no_cache": where == "live"}))["memory"]
                  for where in ("disk", "live"))  # fmt: skip
    pipe = Generator.load(str(generator_folder)).pipe
    real = {name: sum(p.numel() * 4 for p in getattr(pipe, name).parameters()) for name in live["beside"]}
    assert not disk["beside"] and set(real) == {"text_encoder", "text_encoder_2"}
    assert live["beside"] == pytest.approx(real, rel=0.01)
    for total in ("total", "total_checkpointed"):
        assert live[total] - disk[total] == sum(live["beside"].values())
