"""Frozen weights in 8 bits: nearly the same results, LoRAs that learn on them and are saved as ever, plans with their bytes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from safetensors.torch import load_file
from test_kernels import PROMPTS, states
from tiny_pipelines import PIPELINES
from torch import nn

from drmcli import kernels
from drmcli.config import resolve
from drmcli.errors import InputError, MissingError
from drmcli.footprint import generator_pass, reward_pass
from drmcli.generator import Generator
from drmcli.kernels import Kernels
from drmcli.memory import SavedBytes
from drmcli.policy import Policy
from drmcli.quantize import FrozenLinear, check, linears, quantize, saving
from drmcli.recipes import timing
from drmcli.recipes.footprints import encoders
from drmcli.recipes.plan import describe, describe_generator
from drmcli.reward import RewardModel

INT8, FP8 = Kernels(quantize="int8"), Kernels(quantize="fp8")
TOLERANCE = {"int8": 0.02, "fp8": 0.06}
"""Of the norm of what changes, to that of the whole."""


def own_bytes(module: nn.Module) -> int:
    """Of all numbers that a module's tensors hold, those inside 8-bit weights too."""
    total = 0
    for tensor in (*module.parameters(), *module.buffers()):
        parts = [tensor]
        if hasattr(tensor, "qdata"):
            parts = [p for n in ("qdata", "scale", "zero_point") if (p := getattr(tensor, n, None)) is not None]
        total += sum(p.numel() * p.element_size() for p in parts)
    return total


def change(found: torch.Tensor, plain: torch.Tensor) -> float:
    return float((found - plain).norm() / plain.norm())


def frozen(root: nn.Module) -> list[FrozenLinear]:
    return [m for m in root.modules() if isinstance(m, FrozenLinear)]


# --- without torchao --------------------------------------------------------------------------------------------------


def test_a_missing_torchao_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, drm: Callable) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    result = drm("sample", PROMPTS[0], "--reward", "none", "--quantize", "int8")
    assert result.code == 3 and "--quantize int8: torchao is not installed" in result.err, result.err
    assert "pip install 'drmcli[quantize]'" in result.err and "Traceback" not in result.err


def test_a_peft_that_does_not_know_8_bits_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, drm: Callable) -> None:
    torchao = SimpleNamespace(Float8WeightOnlyConfig=None, Int8Tensor=None, Int8WeightOnlyConfig=None)
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(quantization=torchao))
    monkeypatch.setitem(sys.modules, "torchao.quantization", torchao)
    monkeypatch.setattr("drmcli.quantize.version", lambda name: "0.18.0")
    result = drm("sample", PROMPTS[0], "--reward", "none", "--quantize", "int8")
    assert result.code == 3 and "--quantize int8: peft 0.18.0 is too old" in result.err, result.err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("train-reward", "--backbone", "full", "--quantize", "int8"), "--quantize int8: frozen weights alone"),
        (("train-reward", "--backbone", "full", "--quantize", "fp8", "--dry-run"), "--quantize fp8: frozen weights alone"),
        (("train-reward", "--backbone", "lora", "--quantize", "int8", "--set", "shard=true", "--dry-run"), "cannot be split"),
        (("grpo", "--reward", "none", "--train", "full", "--quantize", "fp8"), "and --train full trains them"),
        (("sample", PROMPTS[0], "--reward", "none", "--dtype", "fp16", "--quantize", "int8"), "can exceed fp16"),
    ],
)  # fmt: skip
def test_what_it_does_not_go_with(command: tuple[str, ...], said: str, drm: Callable) -> None:
    result = drm(*command)
    assert result.code == 2 and said in " ".join(result.err.split()), result.err


def test_fp8_compiled_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(MissingError, match="needs a GPU with fp8"):
        check("fp8", "bf16", torch.device("cuda"), compiled=True)


def test_layers_that_are_meant() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 4)
            self.mid, self.norm, self.conv = nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv2d(4, 4, 1)
            self.tied, self.lm_head = nn.Linear(4, 5, bias=False), nn.Linear(4, 5)
            self.tied.weight = self.words.weight

    model = Model()
    assert linears(model) == [model.mid]
    less, largest = saving([model], "int8")
    assert (less, largest) == (4 * 16 - 16 - 5 * 4, 4 * 16) and saving([model], "none") == (0, 0)


def test_the_plan_is_smaller_by_the_linear_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    PIPELINES["flux"].build().save_pretrained(tmp_path)
    known = describe(str(tmp_path), None, 256)
    shared = {"count": 1, "size": (16, 16), "tokens": 4, "dtype": torch.bfloat16}
    plain, less = (generator_pass(known.family, known.transformer, bits=b, **shared)[0] for b in ("none", "fp8"))
    whole = known.family.denoiser_class.from_config(known.transformer)
    weights = [m.weight for b in known.family.blocks(whole) for m in linears(b)]
    assert plain - less == sum(w.numel() - 4 * len(w) for w in weights) > 0


# --- with torchao -----------------------------------------------------------------------------------------------------


@pytest.fixture
def torchao() -> None:
    pytest.importorskip("torchao", minversion="0.18")


@torch.no_grad()
@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("kind", [INT8, FP8], ids=lambda k: k.quantize)
def test_scores_and_velocities_are_nearly_the_same(kind: Kernels, reward_folder: Path, generator_folder: Path) -> None:
    plain, made = (Generator.load(str(generator_folder), kernels=k) for k in (kernels.PLAIN, kind))
    kept = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind.quantize]
    roots = [made.pipe.text_encoder, made.pipe.text_encoder_2, *made.family.blocks(made.transformer)]
    for root in roots:
        assert frozen(root) and {m.weight.qdata.dtype for m in frozen(root)} == {kept}  # type: ignore[attr-defined]
    assert not frozen(made.pipe.vae) and not frozen(plain.transformer)
    latents, sigma, cond = states(made, 3)
    changed = change(made.velocity(latents, sigma, cond), plain.velocity(latents, sigma, cond))
    assert 0 < changed < TOLERANCE[kind.quantize]
    here, there = (g.encode_prompts(PROMPTS).tensors["prompt_embeds"] for g in (made, plain))
    assert 0 < change(here, there) < TOLERANCE[kind.quantize]
    assert made.fingerprint(("text",)) != plain.fingerprint(("text",))
    assert made.fingerprint(("vae",)) == plain.fingerprint(("vae",))

    models = [RewardModel.from_pretrained(reward_folder, kernels=k) for k in (kernels.PLAIN, kind)]
    one, other = (m.score(*states(m, 8)) for m in models)
    assert 0 < (one - other).norm() < TOLERANCE[kind.quantize] * max(1.0, float(one.norm()))


@torch.no_grad()
@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("kind", [INT8, FP8], ids=lambda k: k.quantize)
def test_planned_bytes_are_the_real_ones(kind: Kernels, generator_folder: Path, tmp_path: Path) -> None:
    generator = Generator.load(str(generator_folder), kernels=kind, dtype=torch.bfloat16)
    known = describe(str(generator_folder), None, 256)
    shared = {"count": 1, "size": (16, 16), "tokens": 4, "dtype": torch.bfloat16, "bits": kind.quantize}
    weights, _ = generator_pass(known.family, known.transformer, **shared)
    assert weights == own_bytes(generator.transformer)
    planned = encoders(known, torch.bfloat16, prompts=1, encode=0, decode=0, size=(16, 16), t5=True, bits=kind.quantize)
    for name in known.family.text:
        if isinstance(part := getattr(generator.pipe, name, None), nn.Module):
            assert planned.models[name] == own_bytes(part), name

    reward = RewardModel.from_generator(
        str(generator_folder), backbone="lora", drop_layers=2, head_width=8, lora_rank=2
    )
    reward.save_pretrained(tmp_path)
    loaded = RewardModel.from_pretrained(tmp_path, dtype=torch.bfloat16, kernels=kind)
    assert reward_pass(reward.config, **shared)[0] == own_bytes(loaded)


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("kind", [INT8, FP8, replace(INT8, compile=True)], ids=["int8", "fp8", "compiled"])
def test_gradients_go_through_and_no_full_weight_is_kept(
    kind: Kernels, generator_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(kernels, "BACKEND", "eager")
    found = []
    for k in (kernels.PLAIN, kind):
        generator = Generator.load(str(generator_folder), components=("transformer",), kernels=k)
        policy_of = LoraConfig(r=2, target_modules=list(generator.family.lora_targets))
        generator.transformer.add_adapter(policy_of)
        trained = [p for p in generator.transformer.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        latents, sigma, cond = states(generator, 2)
        with SavedBytes(generator.transformer) as counter:
            v = generator.velocity(latents, sigma, cond)
        found.append((counter.total, torch.cat([g.flatten() for g in torch.autograd.grad(v.square().sum(), trained)])))
    (plain, one), (less, other) = found
    assert 0 < change(other, one) < 3 * TOLERANCE[kind.quantize]
    if not kind.compile:
        assert less <= 1.02 * plain, (less, plain)
    torch._dynamo.reset()


@pytest.mark.usefixtures("torchao")
def test_products_under_autocast_are_those_of_pytorch() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 8).bfloat16()
    plain = nn.Linear(16, 8).bfloat16()
    quantize([linear], "fp8", "cpu")
    plain.load_state_dict({"weight": linear.weight.dequantize(), "bias": linear.bias})  # type: ignore[operator]
    x = torch.randn(3, 16)
    results = []
    for layer in (linear, plain):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(given)
        y.float().square().sum().backward()
        results.append((y, given.grad))
    for a, b in zip(*results):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("torchao")
def test_a_reward_model_uses_a_generators_weights(generator_folder: Path, tmp_path: Path) -> None:
    reward = RewardModel.from_generator(
        str(generator_folder), backbone="lora", drop_layers=2, head_width=8, lora_rank=2, max_sequence_length=1
    )
    reward.save_pretrained(tmp_path)
    generator = Generator.load(str(generator_folder), max_sequence_length=1, kernels=INT8)
    beside = RewardModel.from_pretrained(tmp_path, beside=generator, kernels=INT8)
    alone = RewardModel.from_pretrained(tmp_path, kernels=INT8)
    mine, theirs = frozen(beside.blocks[0])[0], frozen(generator.family.blocks(generator.transformer)[0])[0]
    assert mine is not theirs and mine.weight.qdata.data_ptr() == theirs.weight.qdata.data_ptr()  # type: ignore
    latents, sigma, cond = states(alone, 2)
    with torch.no_grad():
        torch.testing.assert_close(beside.score(latents, sigma, cond), alone.score(latents, sigma, cond))
    full = RewardModel.from_pretrained(tmp_path, beside=generator)
    assert not frozen(full), "a model that is asked for in full takes no weights of 8 bits"
    assert alone.generator(beside=generator).pipe.text_encoder is generator.pipe.text_encoder
    assert full.generator(beside=generator).pipe.text_encoder is not generator.pipe.text_encoder


@pytest.mark.usefixtures("torchao")
def test_all_weights_do_not_learn_in_8_bits(generator_folder: Path) -> None:
    generator = Generator.load(str(generator_folder), kernels=INT8)
    with pytest.raises(InputError, match="frozen weights alone"):
        Policy(generator, lora=None, seed=0)


@pytest.mark.usefixtures("torchao")
def test_every_command_takes_it(
    tmp_path: Path, drm: Callable, generator_folder: Path, reward_folder: Path, pairs_file: Path
) -> None:
    def ran(*args: object) -> dict:
        result = drm(*args, "--json")
        assert result.code == 0, result.err
        return result.json

    cached = ("--cache-dir", tmp_path / "cache")
    trained = ran("train-reward", "--data", pairs_file, "--backbone", "lora", "--steps", 2, "--batch-size", 2, "--quantize",
                  "int8", "--set", "lora_rank=2", "--set", "eval_pairs=2", *cached, "--out", tmp_path / "reward")  # fmt: skip
    layers = load_file(Path(trained["reward"]) / "model.safetensors")
    assert any(".lora_B." in name for name in layers) and not any("base_layer" in name for name in layers)
    plain = ran("bench", "--reward", trained["reward"], "--dataset", pairs_file, *cached, "--out", tmp_path / "plain")
    kept = {p.name for p in (tmp_path / "cache").iterdir() if p.name.startswith("prompts-")}
    assert len(kept) == 2, "embeddings of 8-bit encoders have a place of their own"
    bits = ran("bench", "--reward", trained["reward"], "--dataset", pairs_file, "--quantize", "int8", *cached,
               "--out", tmp_path / "bits")  # fmt: skip
    assert kept == {p.name for p in (tmp_path / "cache").iterdir() if p.name.startswith("prompts-")}
    assert plain["command"] == bits["command"]
    drawn = ran("sample", "--reward", trained["reward"], PROMPTS[0], "--steps", 2, "--stepwise", "--beams", 2, "--quantize",
                "int8", "--out", tmp_path / "sample")  # fmt: skip
    ran("score", "--reward", reward_folder, drawn["images"][0]["path"], "--prompt", PROMPTS[0], "--quantize", "fp8",
        "--out", tmp_path / "score")  # fmt: skip
    ran("grpo", "--reward", trained["reward"], "--updates", 1, "--steps", 3, "--judge", "none", "--lr", 0.01, "--quantize", "int8",
        "--set", "prompts_per_update=2", "--set", "group_size=2", "--set", "lora_rank=2", "--set", "min_std=0",
        "--set", "eval_prompts=2", "--set", "eval_seeds=1", "--out", tmp_path / "grpo")  # fmt: skip
    pipe = StableDiffusion3Pipeline.from_pretrained(generator_folder, text_encoder_3=None, tokenizer_3=None)
    pipe.load_lora_weights(tmp_path / "grpo" / "lora-last")
    assert any(p.abs().max() > 0 for n, p in pipe.transformer.named_parameters() if ".lora_B." in n)
    ran("sample", "--reward", "none", PROMPTS[0], "--steps", 2, "--lora", tmp_path / "grpo" / "lora-last", "--quantize", "fp8",
        "--out", tmp_path / "drawn")  # fmt: skip


@pytest.mark.usefixtures("torchao")
def test_random_weights_of_timed_passes_are_in_8_bits() -> None:
    known = describe_generator(resolve("train-reward"))
    model = timing.random_denoiser(known, torch.bfloat16, torch.device("cpu"), INT8)
    assert frozen(model) and not any(p.is_meta for p in model.parameters())
    seconds, per_prompt = timing.encoding(
        resolve("sample", flags={"quantize": "int8", "device": "cpu"}), known, (4, 4), prompts=2
    )
    assert seconds == 0 and per_prompt > 0


@pytest.mark.usefixtures("torchao")
def test_two_processes_train_what_one_does(pairs_file: Path, tmp_path: Path) -> None:
    command = [
        "train-reward", "--data", pairs_file, "--backbone", "lora", "--steps", "2", "--batch-size", "4", "--quantize", "int8",
        "--lr", "0.001", "--set", "lora_rank=2", "--set", "eval_pairs=2", "--set", "warmup_steps=0", "--device", "cpu",
        "--cache-dir", tmp_path / "cache", "--json",
    ]  # fmt: skip
    layers = []
    for name, launcher in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]),
    ):
        words = [sys.executable, *launcher, "-m", "drmcli", *command, "--out", tmp_path / name]
        done = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
        layers.append(load_file(tmp_path / name / "reward" / "model.safetensors"))
    one, two = layers
    assert one.keys() == two.keys() and max(t.abs().max() for n, t in one.items() if ".lora_B." in n) > 1e-4
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5)
