"""Weights are read once, in their number format, and only those of the kept blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drmcli import fingerprints, loading
from drmcli.errors import InputError
from drmcli.generator import Generator
from drmcli.parts import load_denoiser
from drmcli.reward import RewardModel

WEIGHTS = "diffusion_pytorch_model.safetensors"
DROPPED = ("transformer_blocks.2", "transformer_blocks.3", "transformer_blocks.4", "proj_out", "norm_out")
"""Of the tiny generator's six blocks when three are left out, and its output layers."""


@pytest.fixture(scope="module")
def half(generator_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny generator with its transformer in bf16, in shards of 256 KB."""
    folder = tmp_path_factory.mktemp("half") / "generator"
    for file in generator_folder.rglob("*"):
        if file.is_file() and file.parent.name != "transformer":
            place = folder / file.relative_to(generator_folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(file)
    whole = Generator.load(str(generator_folder)).transformer.to(torch.bfloat16)
    whole.save_pretrained(folder / "transformer", max_shard_size="256KB")
    return folder


class Made(TorchDispatchMode):
    """Shapes of the float32 tensors that operations of this thread make."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            if isinstance(t, torch.Tensor) and t.dtype == torch.float32 and not t.is_meta:
                self.shapes.add(tuple(t.shape))
        return made


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.dtype]:
    """Names of the tensors that were read from files, and their number formats."""
    names: dict[str, torch.dtype] = {}
    before = loading._reader

    def reader(file, name):
        def get() -> torch.Tensor:
            tensor = before(file, name)()
            names[name] = tensor.dtype
            return tensor

        return get

    monkeypatch.setattr(loading, "_reader", reader)
    monkeypatch.setattr(loading, "READERS", 1)
    return names


@pytest.mark.parametrize("backbone", ["lora", "frozen", "full"])
def test_kept_blocks_alone_are_read_and_nothing_passes_through_float32(
    half: Path, tmp_path: Path, read: dict[str, torch.dtype], backbone: str
) -> None:
    settings = {"drop_layers": 4, "head_width": 16, "lora_rank": 2, "max_sequence_length": 1}
    made = RewardModel.from_generator(str(half), backbone=backbone, dtype=torch.bfloat16, **settings)
    made.save_pretrained(tmp_path)
    kept = {n.replace(".base_layer", "") for n in made.transformer.state_dict() if ".lora_" not in n}
    assert read.keys() == kept and set(read.values()) == {torch.bfloat16}
    assert not any(name.startswith(DROPPED) for name in kept)

    read.clear()
    with Made() as float32:
        again = RewardModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    weights = {n: t for n, t in again.transformer.state_dict().items() if ".lora_" not in n}
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert not float32.shapes & {tuple(t.shape) for t in weights.values() if t.ndim > 1}
    assert not any(name.startswith((*DROPPED, *(f"transformer.{d}" for d in DROPPED))) for name in read)
    assert all(torch.equal(t, made.state_dict()[n]) for n, t in again.state_dict().items() if ".lora_" not in n)
    assert all(p.device.type == "cpu" and not p.requires_grad for p in again.parameters())


def test_shards_give_what_one_file_gives(half: Path, generator_folder: Path) -> None:
    assert len(list((half / "transformer").glob("*-of-*"))) > 2
    found = load_denoiser(
        Generator.load(str(half), components=()).family, str(half), revision=None, dtype=torch.float32
    )
    for name, tensor in load_file(generator_folder / "transformer" / WEIGHTS).items():
        torch.testing.assert_close(found.state_dict()[name], tensor.bfloat16().float(), rtol=0, atol=0)


def test_of_the_hub_the_index_and_its_shards_alone(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the copies in another number format, nor what no loader reads."""
    asked: list[str] = []

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(half)

    there = sorted(f.name for f in (half / "transformer").iterdir())
    more = ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin", "README.md"]
    monkeypatch.setattr(fingerprints, "files_of", lambda where, name, revision: there + more)
    monkeypatch.setattr(fingerprints, "snapshot_download", download)
    files = loading.denoiser_files("owner/model", "transformer", "main")
    assert [f.name for f in files] == sorted(f.name for f in (half / "transformer").glob("*.safetensors"))
    assert asked == ["model_index.json", *(f"transformer/{name}" for name in there)]


@pytest.mark.parametrize(
    ("spoil", "fact"),
    [
        (lambda t: t.pop("pos_embed.pos_embed"), "lacks the weights of pos_embed.pos_embed"),
        (lambda t: t.update({"pos_embed.proj.bias": torch.zeros(3)}), r"pos_embed.proj.bias has shape \[3\], not"),
        (lambda t: t["pos_embed.proj.bias"].fill_(float("inf")), "the weights of pos_embed.proj.bias are not finite"),
    ],
    ids=["missing", "misshapen", "not finite"],
)
def test_damaged(generator_folder: Path, tmp_path: Path, spoil, fact: str) -> None:
    (tmp_path / "transformer").mkdir()
    config = generator_folder / "transformer" / "config.json"
    (tmp_path / "transformer" / "config.json").write_text(config.read_text())
    tensors = load_file(generator_folder / "transformer" / WEIGHTS)
    spoil(tensors)
    save_file(tensors, tmp_path / "transformer" / WEIGHTS)
    family = Generator.load(str(generator_folder), components=()).family
    with pytest.raises(InputError, match=fact):
        load_denoiser(family, str(tmp_path), revision=None, dtype=torch.float32)


def test_tables_that_no_file_holds_are_computed() -> None:
    class Rotary(torch.nn.Module):
        def __init__(self, table: str) -> None:
            super().__init__()
            self.project = torch.nn.Linear(2, 2)
            values = torch.arange(3.0)
            if table == "buffer":
                self.register_buffer("kept", values, persistent=False)
            else:
                self.kept = [values] if table == "list" else values

    for table in ("buffer", "list", "plain"):
        made = loading.skeleton(lambda table=table: Rotary(table))
        kept = made.kept[0] if table == "list" else made.kept
        assert kept.tolist() == [0, 1, 2] and made.project.weight.is_meta and made.project.bias.is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_finite(dtype: torch.dtype) -> None:
    good = torch.linspace(-400, 400, 1000).to(dtype)
    assert loading.finite(good) and loading.finite(good[:0]) and loading.finite(torch.arange(3))
    for bad in (float("nan"), float("inf"), -float("inf")):
        if dtype == torch.float8_e4m3fn and bad == bad:  # this format has no infinity
            continue
        spoiled = good.float()
        spoiled[700] = bad
        assert not loading.finite(spoiled.to(dtype))


@pytest.mark.parametrize("table", [False, True], ids=["on the meta device", "with tables of its own"])
def test_tied_weights_are_one_tensor(table: bool) -> None:
    """Of text encoders that read and write by the same embeddings, and of a skeleton whose constructor computes something."""

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False)
            self.out.weight = self.embed.weight
            if table:
                self.register_buffer("steps", torch.arange(3.0), persistent=False)

    model = loading.skeleton(Tied)
    loading.fill_at_random(model, device="cpu", dtype=lambda name: torch.bfloat16)
    assert model.embed.weight.data_ptr() == model.out.weight.data_ptr() and model.embed.weight.std() > 0
    assert model.embed.weight.dtype == torch.bfloat16
