"""Bad input: the right exit code, one error line, one hint, no traceback, and nothing that was there before is touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import SMALL, write_pairs
from PIL import Image
from safetensors.torch import load_file, save_file

PROMPT = "a large red circle on the left"


class Bench:
    """What a case may use to make its bad input."""

    def __init__(self, tmp: Path, generator: Path, reward: Path, monkeypatch: pytest.MonkeyPatch):
        self.tmp, self.generator, self.reward, self.monkeypatch = tmp, generator, reward, monkeypatch

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.tmp / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def picture(self) -> Path:
        path = self.tmp / "fine.png"
        Image.new("RGB", (32, 32), (200, 30, 30)).save(path)
        return path

    def earlier_broken(self) -> Path:
        """A run whose summary was cut off."""
        folder = self.copy(self.tmp / "earlier", "broken")
        (folder / "summary.json").write_text('{"command": "ben')
        return folder

    def copy(self, of: Path, name: str = "model") -> Path:
        return Path(shutil.copytree(of, self.tmp / name))

    def spoil(self, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        file = next(folder.rglob("*.safetensors")) if folder.name != "reward" else folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return folder


def score(*args: object) -> list[object]:
    return ["score", *args, "--prompt", PROMPT]


def train(*args: object) -> list[object]:
    return ["train-reward", *SMALL, "--steps", "1", *args]


CASES: dict[str, tuple[int, Callable[[Bench], list[object]], str]] = {}


def case(code: int, says: str) -> Callable:
    """Register a case: its exit code and a piece of its error line."""

    def register(make: Callable[[Bench], list[object]]) -> Callable:
        CASES[make.__name__.removeprefix("_")] = (code, make, says)
        return make

    return register


@case(2, "gone.png: missing")
def _missing_image(b):
    return score("gone.png")


@case(2, "truncated")
def _truncated_png(b):
    return score(b.file("cut.png", b.picture().read_bytes()[:60]))


@case(2, "0 bytes")
def _empty_image(b):
    return score(b.file("zero.png", b""))


@case(2, "decompression bomb")
def _decompression_bomb(b):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    return score(b.file("bomb.png", data))


@case(2, "not a picture")
def _text_called_png(b):
    return score(b.file("text.png", "hello"))


@case(2, "not a file")
def _folder_as_image(b):
    (b.tmp / "folder.png").mkdir()
    return score("folder.png")


@case(2, "IMAGE: none")
def _no_image(b):
    return ["score", "--prompt", PROMPT]


@case(2, "--prompt: none")
def _no_prompt(b):
    return ["score", b.picture()]


@case(2, "a prompt is empty")
def _empty_prompt(b):
    return ["score", b.picture(), "--prompt", " "]


@case(2, "2 prompts for 1 images")
def _too_many_prompts(b):
    return ["score", b.picture(), "--prompts", b.file("p.txt", "one\ntwo\n")]


@case(2, "not a safetensors file")
def _damaged_latents(b):
    return score(b.file("latents.safetensors", "nonsense"))


@case(2, "trained on 4 channels")
def _latents_of_another_model(b):
    save_file({"latents": torch.zeros(16, 16, 16)}, b.tmp / "other.safetensors")
    return ["score", "other.safetensors", "--prompt", PROMPT, "--reward", b.reward]


@case(2, "pairs.jsonl")
def _wrong_columns(b):
    return train("--data", b.file("pairs.jsonl", '{"text": "a", "winner": "b"}\n'))


@case(2, "empty.jsonl")
def _empty_table(b):
    return train("--data", b.file("empty.jsonl", ""))


@case(2, "cannot be split")
def _one_row(b):
    return train("--data", write_pairs(b.tmp / "one", 1))


@case(2, "line 2")
def _malformed_json(b):
    row = json.dumps({"prompt": "a", "chosen": "a.png", "rejected": "b.png"})
    return train("--data", b.file("broken.jsonl", row + "\n{nonsense\n"))


@case(2, "fake.parquet")
def _text_called_parquet(b):
    return ["bench", "--dataset", b.file("fake.parquet", "hello")]


@case(2, "latin.csv")
def _undecodable_csv(b):
    return ["bench", "--dataset", b.file("latin.csv", b"prompt,chosen,rejected\n\xff\xfe,a,b\n")]


@case(2, "ranking")
def _ranking_too_short(b):
    row = json.dumps({"prompt": "a", "images": ["a.png", "b.png"], "ranking": [1]})
    return ["bench", "--dataset", b.file("rank.jsonl", row + "\n")]


@case(2, "label")
def _label_out_of_range(b):
    return train("--data", write_pairs(b.tmp / "labels", 4, label=[1, 2, 1, 1]))


@case(2, "leaves the file's folder")
def _path_escapes(b):
    row = json.dumps({"prompt": "a", "chosen": "../../etc/a.png", "rejected": "b.png"})
    return ["bench", "--dataset", b.file("escape.jsonl", row + "\n")]


@case(2, "--dataset shaps")
def _misspelt_dataset(b):
    return ["bench", "--dataset", "shaps"]


@case(3, "hpdv2")
def _published_data_absent(b):
    return ["bench", "--dataset", "hpdv2", "--data-dir", b.tmp / "nowhere"]


@case(1, "cannot be read")
def _too_many_bad_images(b):
    file = write_pairs(b.tmp / "bad", 12)
    (file.parent / "0-a.png").write_bytes(b"nonsense")
    return train("--data", file, "--out", b.tmp / "run")


@case(2, "--preset")
def _unknown_preset(b):
    return ["bench", "--preset", "tinny"]


@case(2, "--set stepps")
def _misspelt_key(b):
    return train("--set", "stepps=3")


@case(2, "there is no key 'learning'")
def _misspelt_key_in_file(b):
    return ["train-reward", "--config", b.file("c.yaml", "learning: 3\n")]


@case(2, "not of the form")
def _set_without_value(b):
    return train("--set", "steps")


@case(2, "--set lr")
def _value_of_wrong_type(b):
    return train("--set", "lr=fast")


@case(2, "--steps")
def _negative_steps(b):
    return ["train-reward", "--steps", "-5"]


@case(2, "--sigma")
def _noise_level_above_one(b):
    return ["bench", "--sigma", "1.5"]


@case(2, "do not split")
def _batch_not_divisible(b):
    return ["train-reward", "--batch-size", "10", "--micro-batch-size", "4"]


@case(2, "leave nothing")
def _all_layers_dropped(b):
    return train("--drop-layers", "6")


@case(2, "written for `drm bench`")
def _config_of_another_command(b):
    return ["train-reward", "--config", b.file("bench.yaml", "command: bench\nseed: 1\n")]


@case(2, "not YAML")
def _config_not_yaml(b):
    return ["bench", "--config", b.file("bad.yaml", "a: [1, 2\n")]


@case(2, "no such file")
def _config_missing(b):
    return ["bench", "--config", "gone.yaml"]


@case(2, "holds no `key: value`")
def _config_is_a_list(b):
    return ["bench", "--config", b.file("list.yaml", "- 1\n- 2\n")]


@case(2, "a file, not a folder")
def _out_is_a_file(b):
    return train("--out", b.file("taken", "x"))


@case(2, "a part of this path is a file")
def _out_below_a_file(b):
    return train("--out", b.file("taken", "x") / "run")


@case(2, "--out /proc/drm: cannot be written")
def _out_unwritable(b):
    return train("--out", "/proc/drm")


@case(2, "holds files that are no run")
def _out_holds_strangers(b):
    (b.tmp / "mine").mkdir()
    (b.tmp / "mine" / "thesis.txt").write_text("years of work")
    return train("--out", b.tmp / "mine", "--overwrite")


@case(2, "holds a run with")
def _out_holds_another_run(b):
    return ["bench", "--out", b.tmp / "earlier", "--seed", "7"]


@case(2, "holds a run of `drm bench`")
def _out_holds_another_command(b):
    return train("--out", b.tmp / "earlier")


@case(2, "already holds a run")
def _no_resume(b):
    return ["bench", "--out", b.tmp / "earlier", "--no-resume"]


@case(1, "No space left")
def _full_disk(b):
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    b.monkeypatch.setattr(os, "fsync", full)
    return train("--out", b.tmp / "run")


@case(3, "there is no such folder")
def _generator_absent(b):
    return train("--generator", "./gone")


@case(3, "not in the local cache|cannot be reached")
def _hub_while_offline(b):
    return train("--generator", "somebody/some-model")


@case(2, "has no diffusion_pytorch_model.safetensors")
def _pickled_weights(b):
    folder = b.copy(b.generator)
    for file in folder.rglob("*.safetensors"):
        torch.save({"a": torch.zeros(1)}, file.with_name(file.stem + ".bin"))
        file.unlink()
    return train("--generator", folder)


@case(2, "holds a DDPMPipeline")
def _another_pipeline(b):
    folder = b.copy(b.generator)
    (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    return train("--generator", folder)


@case(2, "not finite")
def _nan_in_generator(b):
    folder = b.copy(b.generator)
    b.spoil(folder / "vae", lambda t: next(iter(t.values())).fill_(float("nan")))
    return train("--generator", folder, "--cache-dir", b.tmp / "cache")


@case(2, "--cache-dir")
def _cache_is_a_file(b):
    (b.tmp / "cache").write_text("x")
    return train("--cache-dir", b.tmp / "cache")


def _lacking(b, part: str):
    folder = b.copy(b.generator)
    b.spoil(folder / part, lambda t: t.pop(sorted(t)[0]))
    return train("--generator", folder, "--cache-dir", b.tmp / "cache")


@case(2, "text_encoder lacks the weights")
def _text_encoder_lacks_a_tensor(b):
    return _lacking(b, "text_encoder")


@case(2, "vae lacks the weights")
def _vae_lacks_a_tensor(b):
    return _lacking(b, "vae")


@case(2, "transformer lacks the weights")
def _transformer_lacks_a_tensor(b):
    return _lacking(b, "transformer")


@case(2, "not finite")
def _nan_in_transformer(b):
    folder = b.copy(b.generator)
    b.spoil(folder / "transformer", lambda t: next(iter(t.values())).fill_(float("nan")))
    return train("--generator", folder, "--cache-dir", b.tmp / "cache")


@case(2, "is no key")
def _config_with_a_number_as_key(b):
    return ["bench", "--config", b.file("odd.yaml", "1: 2\n")]


@case(2, "--resolution 1: not a multiple of 4")
def _resolution_too_small(b):
    return train("--resolution", "1")


@case(2, "summary.json is damaged")
def _damaged_summary(b):
    return ["bench", "--out", b.earlier_broken()]


@case(2, "--out")
def _out_too_long(b):
    return train("--out", "x" * 5000)


@case(2, "--out: is empty")
def _out_empty(b):
    return train("--out", "")


@case(2, "margin")
def _margin_not_a_number(b):
    return train("--set", "margin=.nan")


@case(2, "null")
def _nul_in_a_path(b):
    return score("a\0b.png")


@case(3, "--reward ./gone")
def _reward_absent(b):
    return ["bench", "--reward", "./gone"]


@case(2, "--device cuda")
def _no_cuda(b):
    return ["bench", "--device", "cuda:7"]


@case(2, "holds no config.json")
def _reward_without_config(b):
    (b.tmp / "empty").mkdir()
    return ["bench", "--reward", b.tmp / "empty"]


@case(2, "is not a reward model's")
def _generator_as_reward(b):
    return ["bench", "--reward", b.generator / "vae"]


@case(2, "holds no model.safetensors")
def _reward_pickled(b):
    folder = b.copy(b.reward)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return ["bench", "--reward", folder]


@case(2, "damaged")
def _reward_truncated(b):
    folder = b.copy(b.reward)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return ["bench", "--reward", folder]


@case(2, "has shape")
def _reward_of_another_shape(b):
    return ["bench", "--reward", b.spoil(b.copy(b.reward), lambda t: t.update({"head.conv.bias": torch.zeros(3)}))]


@case(2, "lacks the tensor")
def _reward_lacks_a_tensor(b):
    return ["bench", "--reward", b.spoil(b.copy(b.reward), lambda t: t.pop("head.conv.bias"))]


@case(2, "not finite")
def _reward_with_nan(b):
    return ["bench", "--reward", b.spoil(b.copy(b.reward), lambda t: t["head.conv.bias"].fill_(float("nan")))]


@case(2, "--device nonsense")
def _unknown_device(b):
    return ["bench", "--device", "nonsense"]


@case(3, "--attention xformers")
def _xformers_without_cuda(b):
    return ["bench", "--reward", b.reward, "--attention", "xformers"]


@case(2, "--track nonsense")
def _unknown_tracker(b):
    return train("--track", "nonsense")


@case(3, "--track aim: not installed")
def _tracker_not_installed(b):
    return train("--track", "aim")


@case(2, "--dtype")
def _unknown_dtype(b):
    return ["bench", "--dtype", "fp8"]


@case(2, "--colour")
def _unknown_option(b):
    return ["bench", "--colour", "red"]


@case(2, "tarin")
def _unknown_command(b):
    return ["tarin-reward"]


@case(2, "holds no config.yaml")
def _show_of_no_run(b):
    return ["show", b.tmp]


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A finished run that no failure may touch."""
    from drmcli import config as configs

    folder = tmp_path / "earlier"
    folder.mkdir()
    (folder / "config.yaml").write_text(configs.to_yaml(configs.resolve("bench"), "bench"))
    (folder / "summary.json").write_text('{"command": "bench", "accuracy": 50.0}')
    pd.DataFrame({"score": [1.0]}).to_parquet(folder / "scores.parquet")
    return folder


def digest(folder: Path) -> dict[str, str]:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != ".lock")
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(
    name: str,
    tmp_path: Path,
    generator_folder: Path,
    reward_folder: Path,
    earlier: Path,
    monkeypatch: pytest.MonkeyPatch,
    drm,
) -> None:
    code, make, says = CASES[name]
    args = make(Bench(tmp_path, generator_folder, reward_folder, monkeypatch))
    before = digest(earlier)
    result = drm(*args)
    lines = [
        line
        for line in result.err.splitlines()
        if not line.startswith(("note:", "warning:", "encode ", "train:", "score:"))
    ]
    assert result.code == code, result.err
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], result.err
    assert any(piece in lines[0] for piece in says.split("|")), lines[0]
    assert "internal:" not in result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    assert digest(earlier) == before
    strangers = tmp_path / "mine" / "thesis.txt"
    assert not (tmp_path / "mine").exists() or strangers.read_text() == "years of work"


def test_there_are_many_kinds() -> None:
    assert len(CASES) >= 30


def test_bad_images_are_listed(tmp_path: Path, drm) -> None:
    """Above the threshold the run stops before training and leaves the list; below it the pair is left out."""
    file = write_pairs(tmp_path / "bad", 12)
    (file.parent / "0-a.png").write_bytes(b"nonsense")
    assert drm(*train("--data", file, "--out", tmp_path / "run")).code == 1
    assert (tmp_path / "run" / "bad_images.txt").read_text().startswith("0-a.png: ")
    assert not (tmp_path / "run" / "checkpoints").exists()
    fine = drm(*train("--data", file, "--out", tmp_path / "other", "--max-bad", "50"))
    assert fine.code == 0, fine.err
    assert "0-a.png" in fine.err


def test_fail_under_prints_the_result_first(reward_folder: Path, drm) -> None:
    flags = ["--reward", reward_folder, "--pairs", "6", "--sigma", "0.25", "--set", "shapes_generated=0"]
    result = drm("bench", *flags, "--fail-under", "100", "--json")
    assert result.code == 1
    assert result.json["accuracy"] < 100
    assert "--fail-under 100" in result.err
