"""What is not there is told before torch is imported, and before a run folder is made."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROMPT = ["--prompt", "x"]
MISSING: dict[str, tuple[list[str], int, str]] = {
    "picture": (["score", "gone.png", *PROMPT], 2, "gone.png: missing"),
    "latents": (["score", "gone.safetensors", *PROMPT], 2, "gone.safetensors: missing"),
    "reward folder": (["score", "here.png", *PROMPT, "--reward", "runs/mine/reward"], 3, "--reward runs/mine/reward"),
    "scorer's name": (["score", "here.png", *PROMPT, "--reward", "pickscor"], 2, "--reward pickscor"),
    "generator": (["sample", "x", "--generator", "./gone"], 3, "--generator ./gone"),
    "reward of sample": (["sample", "x", "--reward", "../gone"], 3, "--reward ../gone"),
    "lora": (["sample", "x", "--lora", "gone.safetensors"], 3, "--lora gone.safetensors"),
    "lora folder": (["sample", "x", "--lora", "./gone"], 3, "--lora ./gone"),
    "against": (["bench", "--against", "nosuch"], 2, "--against nosuch"),
    "second scorer": (["bench", "--scorer", "clip", "--scorer", "clop"], 2, "--scorer clop"),
    "scorer's folder": (["bench", "--scorer", "clip="], 2, "--scorer clip="),
    "dataset": (["bench", "--dataset", "shaps"], 2, "--dataset shaps"),
    "second dataset": (["bench", "--dataset", "shapes,gone.jsonl"], 2, "--dataset gone.jsonl"),
    "dataset's folder": (["bench", "--dataset", "hpdv2", "--data-dir", "gone"], 3, "--dataset"),
    "no folder": (["bench", "--dataset", "pickapic"], 3, "--dataset pickapic"),
    "geneval's pictures": (["bench", "--dataset", "geneval", "--images", "gone"], 2, "--images gone"),
    "geneval's file": (["bench", "--dataset", "geneval", "--data-dir", "gone"], 3, "--data-dir gone"),
    "data": (["train-reward", "--data", "gone.parquet"], 2, "--data gone.parquet"),
    "data with a ratio": (["train-reward", "--data", "shapes=0.5", "--data", "gone.csv=0.5"], 2, "--data gone.csv"),
    "held-out data": (["train-reward", "--eval-data", "gone.jsonl"], 2, "--eval-data gone.jsonl"),
    "base": (["train-reward", "--generator", "/gone/model"], 3, "--generator /gone/model"),
    "prompts": (["grpo", "--prompts", "gone.txt"], 2, "--prompts gone.txt"),
    "judge": (["grpo", "--judge", "./gone"], 3, "--judge ./gone"),
    "added reward": (["grpo", "--add-reward", "./gone=0.5"], 3, "--add-reward ./gone"),
    "weight nan": (["grpo", "--add-reward", "shapes=nan"], 2, "--add-reward shapes=nan: the weight nan is not finite"),
    "weight inf": (
        ["grpo", "--add-reward", "shapes=-inf"],
        2,
        "--add-reward shapes=-inf: the weight -inf is not finite",
    ),
}


def test_what_is_missing_costs_no_import_of_torch(tmp_path) -> None:
    """All of them in one process, which at its end has not imported torch, and has made nothing."""
    (tmp_path / "here.png").write_bytes(b"")
    code = f"""
import contextlib, io, json, sys
from drmcli.cli.app import invoke
found = {{}}
for name, (argv, *_) in {MISSING!r}.items():
    with contextlib.redirect_stderr(io.StringIO()) as err:
        found[name] = invoke(argv), err.getvalue()
print(json.dumps([found, [m for m in ("torch", "diffusers", "transformers") if m in sys.modules]]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found, heavy = json.loads(done.stdout)
    assert heavy == []
    for name, (_, code, says) in MISSING.items():
        got, err = found[name]
        lines = err.splitlines()
        assert (got, len(lines)) == (code, 2), (name, err)
        assert lines[0].startswith(f"error: {says}"), (name, err)
        assert lines[1].startswith("hint: "), (name, err)
    assert [f.name for f in tmp_path.iterdir()] == ["here.png"]


@pytest.mark.parametrize("name", ["reward folder", "dataset"])
def test_the_same_out_afterwards(name: str, tmp_path, drm) -> None:
    argv, code, _ = MISSING[name]
    (tmp_path / "here.png").write_bytes(b"")
    assert drm(*argv, "--out", tmp_path / "o").code == code
    assert not (tmp_path / "o").exists()
