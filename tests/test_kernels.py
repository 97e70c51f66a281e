"""Attention by diffusers' backends; compiled blocks: the same results, few programs, and nothing of it in a file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_qwen_image
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models import attention_dispatch as dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from peft import LoraConfig
from safetensors.torch import load_file
from test_train_reward import train, weights
from tiny_pipelines import PIPELINES
from torch._dynamo.utils import counters

from drmcli import kernels, scorers
from drmcli.config import resolve
from drmcli.errors import InputError, MissingError
from drmcli.evaluation import Judge
from drmcli.families.base import Conditioning
from drmcli.generator import Generator
from drmcli.kernels import Kernels
from drmcli.memory import blank_states
from drmcli.policy import Policy
from drmcli.recipes import alignment, data_label, methods, reproduce
from drmcli.reward import RewardModel
from drmcli.sampling import Search, sample

COMPILED = Kernels(compile=True)
PROMPTS = ["a large red circle above a small blue square", "a small green triangle in the center"]


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything of torch.compile but the compiler: its graphs run as they are."""
    torch._dynamo.reset()
    monkeypatch.setattr(kernels, "BACKEND", "eager")
    yield
    torch._dynamo.reset()


def programs() -> int:
    """Graphs that were made so far."""
    return counters["stats"]["unique_graphs"]


def states(
    model: RewardModel | Generator, count: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    config = model.config.transformer if isinstance(model, RewardModel) else model.model_config
    torch.manual_seed(seed)
    return blank_states(model.family, config, count, (16, 16), 4)


@torch.no_grad()
def test_scores_of_any_batch_by_the_same_programs(reward_folder: Path) -> None:
    eager, made = (
        RewardModel.from_pretrained(reward_folder),
        RewardModel.from_pretrained(reward_folder, kernels=COMPILED),
    )
    counters.clear()
    found = []
    for count in (2, 3, 5, 17, 1, 4):
        latents, sigma, cond = states(made, count)
        torch.testing.assert_close(
            made.score(latents, sigma, cond), eager.score(latents, sigma, cond), rtol=0, atol=1e-5
        )
        found.append(programs())
    assert 1 <= found[0] <= 3 and found[:4] == found[:1] * 4, found
    assert found[4] <= 2 * found[0] and found[5] == found[4], found  # a single row has programs of its own
    assert made.state_dict().keys() == eager.state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux", "sd15"])
def test_velocities_of_other_families(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    PIPELINES[name].build().save_pretrained(tmp_path)
    eager, made = (
        Generator.load(str(tmp_path), components=("transformer",), kernels=k) for k in (kernels.PLAIN, COMPILED)
    )
    counters.clear()
    found = []
    for count in (2, 3, 5):
        latents, sigma, cond = states(made, count)
        torch.testing.assert_close(
            made.velocity(latents, sigma, cond), eager.velocity(latents, sigma, cond), rtol=1e-5, atol=1e-5
        )
        found.append(programs())
    assert found[0] and found == found[:1] * 3, found


def test_gradients_adapters_and_checkpointing(generator_folder: Path, tmp_path: Path) -> None:
    reward = RewardModel.from_generator(
        str(generator_folder), backbone="lora", drop_layers=2, head_width=8, lora_rank=2, max_sequence_length=1
    )
    reward.save_pretrained(tmp_path / "reward")
    found: list[list[torch.Tensor]] = []
    for kind in (kernels.PLAIN, COMPILED):
        generator = Generator.load(str(generator_folder), max_sequence_length=1, kernels=kind)
        model = RewardModel.from_pretrained(tmp_path / "reward", beside=generator, kernels=kind)
        policy = Policy(
            generator, lora=LoraConfig(r=2, target_modules=list(generator.family.lora_targets)), seed=0,
            gradient_checkpointing=True,
        )  # fmt: skip
        generator.transformer.train()
        with torch.no_grad():
            for parameter in policy.trained:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        latents, sigma, cond = states(generator, 3)
        v = policy.velocity(latents, sigma, cond)
        drawn = [v, *torch.autograd.grad(v.square().sum(), policy.trained)]
        with policy.reference_policy(), torch.no_grad():
            drawn.append(policy.velocity(latents, sigma, cond))
        assert not torch.allclose(drawn[-1], v)
        generator.transformer.eval()
        conds = generator.encode_prompts(PROMPTS)
        search = Search(mode="stepwise", beams=2, num_inference_steps=3)
        drawn.append(
            sample(generator, model, conds, conds, [3, 4], search, shape=generator.latent_shape(16, 16)).latents
        )
        found.append([t.detach() for t in drawn])
        policy.save_weights(tmp_path / ("compiled" if kind.compile else "eager"))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    files = [tmp_path / kind / "pytorch_lora_weights.safetensors" for kind in ("eager", "compiled")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_blocks_are_compiled_once_and_shared(reward_folder: Path, generator_folder: Path) -> None:
    generator = Generator.load(str(generator_folder), max_sequence_length=1, kernels=COMPILED)
    blocks = generator.family.blocks(generator.transformer)
    before = [block.forward for block in blocks]
    kernels.compile_blocks(blocks)
    assert all(kernels.compiled(b) and b.forward is f for b, f in zip(blocks, before))
    frozen = RewardModel.from_generator(
        str(generator_folder), backbone="frozen", drop_layers=3, head_width=8, max_sequence_length=1
    )
    frozen.share_blocks(generator)
    latents, sigma, cond = states(generator, 2)
    whole = generator.velocity(latents, sigma, cond)
    heard: list = []
    frozen.score(latents, sigma, cond, states=heard)
    at = len(frozen.blocks)
    torch.testing.assert_close(generator.velocity_from(heard[0], at, latents, sigma, cond), whole, rtol=0, atol=1e-5)


def test_training_is_the_same(tmp_path: Path) -> None:
    options = {"steps": 2, "backbone": "lora", "lora_rank": 2, "gradient_checkpointing": True}
    plain = train(tmp_path / "a", **options)
    made = train(tmp_path / "b", compile=True, **options)
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)
    assert plain["eval_accuracy"] == made["eval_accuracy"]


def test_every_command_takes_it(
    tmp_path: Path, drm: Callable, reward_folder: Path, generator_folder: Path, pairs_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    used: list[int] = []

    def ran(*args: object) -> dict:
        torch._dynamo.reset()  # what an earlier command compiled would serve this one
        counters.clear()
        result = drm(*args, "--compile", "--json")
        assert result.code == 0, result.err
        used.append(programs())
        return result.json

    drawn = ran("sample", "--reward", reward_folder, PROMPTS[0], "--steps", 2, "--stepwise", "--beams", 2,
                "--out", tmp_path / "sample")  # fmt: skip
    ran("score", "--reward", reward_folder, drawn["images"][0]["path"], "--prompt", PROMPTS[0], "--out", tmp_path / "s")
    ran("bench", "--reward", reward_folder, "--dataset", pairs_file, "--out", tmp_path / "bench")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS[0] + "\n")
    ran("data", "make", prompts, "--num-images", 2, "--steps", 2, "--label", reward_folder,
        "--out", tmp_path / "made")  # fmt: skip
    judged: list[Judge] = []
    monkeypatch.setattr(alignment, "Judge", lambda *a, **k: judged.append(Judge(*a, **k)) or judged[-1])
    ran("grpo", "--reward", reward_folder, "--updates", 1, "--steps", 3, "--judge", reward_folder, "--lr", 0.01,
        "--set", "prompts_per_update=2", "--set", "group_size=2", "--set", "lora_rank=2", "--set", "min_std=0",
        "--set", "eval_prompts=2", "--set", "eval_seeds=1", "--out", tmp_path / "grpo")  # fmt: skip
    assert all(used), used
    assert compiled(judged[0].scorer), "the judge's blocks too"

    folder = tmp_path / "grpo" / "lora-last"
    layers = load_file(folder / "pytorch_lora_weights.safetensors")
    assert all("_orig_mod" not in name for name in layers)
    pipe = StableDiffusion3Pipeline.from_pretrained(generator_folder, text_encoder_3=None, tokenizer_3=None)
    pipe.load_lora_weights(folder)
    assert any(p.abs().max() > 0 for n, p in pipe.transformer.named_parameters() if ".lora_B." in n)


def compiled(scorer: Any) -> bool:
    return all(map(kernels.compiled, scorer.model.blocks))


def test_other_scorers_of_a_run_take_it(reward_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--refresh-by, --judge of a table, --active and the scorers of `drm reproduce`: reward models as any other."""
    ref, asked = str(reward_folder), {"compile": True}
    config = resolve("grpo", flags=asked | {"refresh_every": 1, "refresh_by": ref})
    trusted = alignment.load_trusted(config, SimpleNamespace(models=[1]), torch.device("cpu"), torch.float32)
    assert compiled(trusted.scorer)

    class Seen(Exception):
        pass

    load = scorers.load_scorer

    def seen(*args: Any, **options: Any) -> Any:
        raise Seen(compiled(load(*args, **options)))

    for module in (methods, reproduce, scorers):  # data_label imports it late
        monkeypatch.setattr(module, "load_scorer", seen)
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    studio = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    folder = SimpleNamespace(path=lambda *parts: tmp_path.joinpath(*parts), warn=print)
    tuned = resolve("sample", flags=asked | {"tune": str(tmp_path / "prompts.txt"), "judge": ref})
    tables = SimpleNamespace(config=resolve("reproduce", flags=asked | {"scorers": [ref]}), folder=folder)
    for work in (
        lambda: methods.tune(tuned, folder, studio),
        lambda: reproduce.score(tables, "table", "row", {"images": [], "run": str(tmp_path)}, (None,)),
        lambda: data_label.scores(resolve("data-label", flags=asked | {"active": ref}), None, None),
    ):
        with pytest.raises(Seen) as found:
            work()
        assert found.value.args == (True,)


def test_without_a_compiler_it_is_said(monkeypatch: pytest.MonkeyPatch, drm: Callable) -> None:
    monkeypatch.setattr(kernels, "BACKEND", "inductor")
    monkeypatch.setattr(kernels, "cpp_compiler", lambda: False)
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for device, said in (("cpu", "there is no C.. compiler"), ("cuda", "needs Triton")):
        with pytest.raises(MissingError, match=f"--compile: {said}"):
            kernels.check_compiler(torch.device(device))
    result = drm("sample", PROMPTS[0], "--reward", "none", "--compile")
    assert result.code == 3 and "--compile: there is no C++ compiler" in result.err and "install g++" in result.err


def test_a_compiler_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BACKEND", "inductor")
    if kernels.cpp_compiler():
        kernels.check_compiler(torch.device("cpu"))
    else:
        with pytest.raises(MissingError, match="C\\+\\+"):
            kernels.check_compiler(torch.device("cpu"))


# --- attention --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["native", "_native_math", "_native_flash"])
def test_a_backend_of_diffusers_computes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    PIPELINES["flux"].build().save_pretrained(tmp_path)
    plain, made = (
        Generator.load(str(tmp_path), components=("transformer",), kernels=Kernels(n)) for n in ("sdpa", name)
    )
    called: list[str] = []
    own = dispatch._AttentionBackendRegistry._backends
    backend = own[AttentionBackendName(name)]

    def heard(*args: object, **kwargs: object) -> object:
        called.append(name)
        return backend(*args, **kwargs)

    monkeypatch.setitem(own, AttentionBackendName(name), heard)
    latents, sigma, cond = states(plain, 2)
    torch.testing.assert_close(
        made.velocity(latents, sigma, cond), plain.velocity(latents, sigma, cond), rtol=1e-4, atol=1e-5
    )
    assert len(called) >= len(made.family.blocks(made.transformer))


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("quick", 2, "there is no such backend hint: use one of sdpa, flash, "),
        ("flash_hub", 2, "its kernels are code from the hub, which drm does not run hint: use --attention flash"),
        ("_native_cudnn", 3, "needs a CUDA GPU hint: leave it out"),
        ("_native_npu", 3, "needs a device npu"),
        ("_native_math", 2, "a SD3Transformer2DModel calls PyTorch's attention itself"),
    ],
)
def test_what_there_is_not_is_said_in_one_line(name: str, code: int, said: str, drm: Callable) -> None:
    result = drm("sample", PROMPTS[0], "--reward", "none", "--attention", name)
    assert result.code == code and f"--attention {name}: {said}" in " ".join(result.err.split()), result.err


@pytest.mark.parametrize(
    ("name", "package"),
    [("flash", "flash-attn"), ("sage_varlen", "sageattention"), ("_sage_qk_int8_pv_fp8_cuda", "sageattention"),
     ("xformers", "drmcli[xformers]"), ("_flash_3", "flash_attn_interface")],
)  # fmt: skip
def test_a_missing_package_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for flag in ("FLASH_ATTN", "FLASH_ATTN_3", "SAGE_ATTN", "XFORMERS_ATTN"):
        monkeypatch.setattr(dispatch, f"_CAN_USE_{flag}", False)
    with pytest.raises(MissingError, match=f"--attention {name}: its package is not installed") as error:
        kernels.check_attention(name, torch.device("cuda"))
    assert package in error.value.hint


def test_every_name_of_diffusers_is_known() -> None:
    names = kernels.attention_names()
    assert {b.value for b in AttentionBackendName} - set(names) == {
        b.value for b in AttentionBackendName if b.value.endswith("_hub")
    }
    assert set(kernels.MASKED) | set(kernels.ANYWHERE) | set(kernels.ELSEWHERE) <= set(names)


def test_masks_and_gradients_are_thought_of(tmp_path: Path, drm: Callable) -> None:
    torch.manual_seed(0)
    tiny_qwen_image.TINY.build().save_pretrained(tmp_path / "qwen")
    for name, refused in (("_native_flash", True), ("_native_math", False)):
        options = {"components": ("transformer",), "kernels": Kernels(name)}
        if refused:
            with pytest.raises(InputError, match="takes no mask, and a QwenImageTransformer2DModel masks padding"):
                Generator.load(str(tmp_path / "qwen"), **options)
        else:
            Generator.load(str(tmp_path / "qwen"), **options)
    result = drm("grpo", "--reward", "none", "--attention", "sage")
    assert result.code == 2 and "--attention sage: computes no gradients" in result.err
    kernels.check_trainable("flash")
