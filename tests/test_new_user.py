"""A new user's way from nothing to a picture sheet, a score of an own picture and a reward model of own pairs: outputs say what is next."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, Outcome
from PIL import Image
from typer.main import get_command

from drmcli.cli import onward
from drmcli.tiny import world

Drm = Callable[..., Outcome]
LESS = {
    "demo": ["--steps", "1", "--updates", "1"],
    "sample": ["--steps", "2"],
    "train-reward": ["--steps", "2", *SMALL],
    "bench": ["--pairs", "4", "--sigma", "0.25"],
}
"""What makes a command a matter of seconds; nothing else is added to what was said."""
FEW: dict[str, dict[str, Any]] = {
    "train-reward": {"shapes_prompts": 8, "shapes_generated": 0, "eval_pairs": 12, "batch_size": 12},
    "bench": {"pairs": 6, "shapes_prompts": 8, "shapes_generated": 0},
    "grpo": {"prompts_per_update": 1, "group_size": 2, "eval_prompts": 2, "eval_seeds": 1},
}
"""The same for the parts of the demo."""


def next_of(result: Outcome) -> list[str]:
    """The words of the last line on stderr, after `next: drm`."""
    assert result.code == 0, result.err
    line = result.err.splitlines()[-1]
    assert line.startswith("next: drm "), result.err
    assert result.err.count("next:") == 1
    assert "next:" not in result.out
    return shlex.split(line.removeprefix("next: drm "))


def test_from_nothing_to_a_reward_model_of_ones_own(drm: Drm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command is the one that the output before it named; only the own picture, its prompt and the own pairs are the user's."""
    from drmcli.recipes import demo

    resolve = demo.resolve
    monkeypatch.setattr(demo, "resolve", lambda command, flags: resolve(command, flags=flags | FEW.get(command, {})))
    for name in ("DRAWN", "SHOWN", "EXAMPLES"):
        monkeypatch.setattr(demo, name, 2)
    done: list[str] = []

    def go(words: list[str]) -> Outcome:
        done.append(words[0])
        return drm(*words, *LESS.get(words[0], []))

    told = go(shlex.split(drm().out.splitlines()[-1].removeprefix("next: drm ")))
    assert Path(re.findall(r"report: (\S+)", told.out)[0]).is_file()
    drawn = go(next_of(told))
    assert Path(re.findall(r"grid: (\S+)", drawn.out)[0]).is_file()  # the picture sheet
    shown = go(next_of(drawn))
    assert Path(re.findall(r"report: (\S+)", shown.out)[0]).is_file()
    words = next_of(shown)
    assert Path(words[1]).is_file()
    captions = list(world.captions("train"))[:10]
    clean, flawed = (world.draw(captions, np.random.default_rng(0), flawed=share) for share in (0.0, 1.0))
    Image.fromarray(clean[0]).save("mine.png")
    scored = go(["score", "mine.png", "--prompt", captions[0], *words[4:]])
    assert re.search(r"mine\.png +[+-]\d+\.\d{3}", scored.out)
    words = next_of(scored)
    missing = drm(*words)
    assert missing.code == 2
    row = json.loads(re.findall(r"\{.*?\}", missing.err)[0])  # how a line of the file looks is said there
    for i in range(len(captions)):
        Image.fromarray(clean[i]).save(f"{i}a.png")
        Image.fromarray(flawed[i]).save(f"{i}b.png")
    lines = [json.dumps(dict(zip(row, (caption, f"{i}a.png", f"{i}b.png")))) for i, caption in enumerate(captions)]
    Path(words[-1]).write_text("\n".join(lines) + "\n")
    trained = go(next_of(go(words)))
    reward = Path(re.findall(r"reward model: (\S+)", trained.out)[0])
    assert (reward / "model.safetensors").is_file()
    steered = go(next_of(go(next_of(trained))))
    assert str(reward) in Path(re.findall(r"grid: (\S+)", steered.out)[0]).with_name("config.yaml").read_text()
    assert done == ["demo", "sample", "show", "score", "data", "train-reward", "bench", "sample"]


SD35 = {"preset": "sd35-medium", "generator": "stabilityai/stable-diffusion-3.5-medium"}
EXPORTED = {"to": "mine", "push": None, "preset": "tiny", "generator": None}
MADE = {"run": "r", "data": "r", "label": ["shapes"], "n_pairs": 6}
SAID: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("train-reward", {"reward": "r/reward"}, {"data": ["shapes"]}, "bench --reward r/reward"),
    ("train-reward", {"reward": "r/reward"}, SD35 | {"data": ["hpdv3=0.7", "p.jsonl=0.3"], "data_dir": "d"},
     "bench --preset sd35-medium --dataset hpdv3 --data-dir d --reward r/reward"),
    ("bench", {"run": "r", "reward": "{package}/tiny/weights/reward-own", "protocols": {}}, {}, "sample --stepwise"),
    ("bench", {"run": "r", "reward": "m/reward", "protocols": {}}, SD35,
     "sample 'an ocean at dawn' --preset sd35-medium --stepwise --reward m/reward"),
    ("bench", {"run": "r", "reward": "none", "protocols": {}}, {"reward": "none"}, "show r"),
    ("bench", {"run": "r", "tasks": []}, {}, "show r"),
    ("sample", {"run": "a b"}, {}, "show 'a b'"),
    ("sample", {"run": "r", "methods": [{"cost": 10.7}, {"cost": 31.3}], "table": "r/methods.yaml"}, {},
     "sample --mode auto --budget 32 --methods r/methods.yaml"),
    ("grpo", {"run": "r", "lora": "r/lora"}, {}, "sample --lora r/lora"),
    ("grpo", {"run": "r", "lora": None, "generator": "r/generator"}, {}, "sample 'an ocean at dawn' --generator r/generator"),
    ("data-make", MADE, {}, "train-reward --data r=0.7 --data shapes=0.3"),
    ("data-make", MADE, SD35, "train-reward --preset sd35-medium --data r"),
    ("data-make", MADE | {"label": ["people"]}, {}, "data label r"),
    ("data-make", MADE | {"label": ["none"], "n_pairs": 0}, {}, "show r"),
    ("data-label", {"data": "r"}, {}, "train-reward --data r=0.7 --data shapes=0.3"),
    ("reproduce", {"run": "r"}, {}, "show r"),
    ("export", EXPORTED | {"kind": "reward model"}, {}, "sample --stepwise --reward mine"),
    ("export", EXPORTED | {"kind": "LoRA", "to": None, "push": "me/mine"} | SD35, {},
     "sample 'an ocean at dawn' --preset sd35-medium --lora me/mine"),
    ("export", EXPORTED | {"kind": "pipeline"}, {}, "sample 'an ocean at dawn' --generator mine"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "summary", "config", "said"), SAID, ids=lambda x: x if isinstance(x, str) else "")
def test_what_comes_next(command: str, summary: dict, config: dict, said: str) -> None:
    words = onward.after(command, summary, config)
    assert words is not None
    assert shlex.join(words) == f"drm {said}"
    parsed(words)


def parsed(words: list[str]) -> None:
    """Fails where the command line does not know the command or an option."""
    from drmcli.cli.app import make_app

    made: Any = get_command(make_app(words))
    rest = words[1:]
    while hasattr(made, "commands"):
        made = made.commands[rest.pop(0)]
    made.make_context("drm", rest)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (onward.after_check("p.jsonl", None, None, published=False), "train-reward --data p.jsonl"),
        (onward.after_check("p.jsonl", None, None, published=False, texts=1), "bench --dataset p.jsonl"),
        (onward.after_check("hpdv2", "d", None, published=True), "bench --dataset hpdv2 --data-dir d"),
        (onward.after_check("hpdv2", "d", "train", published=True), "train-reward --data hpdv2 --data-dir d"),
        (onward.after_fetch("hpdv2", "d", "test"), "data check hpdv2 --data-dir d --split test"),
        (onward.after_doctor("tiny"), "demo"),
        (onward.after_doctor("sd35-medium"), "sample 'an ocean at dawn' --preset sd35-medium"),
        (onward.after_show("r", "train-reward", {}, None), "train-reward --config r/config.yaml --out r"),
        (onward.after_show("r", "data-make", {}, None), "data make --config r/config.yaml --out r"),
        (onward.after_show("r", "demo", {}, None), "demo --out r"),
        (onward.after_show("r", "sample", SD35 | {"reward": "none"}, {"images": [{"path": "p.png", "prompt": "a b"}]}),
         "score p.png --prompt 'a b' --reward pickscore"),
        (onward.after_show("r", "sample", {"reward": "m/reward=0.5"}, {"images": [{"path": "p.png", "prompt": "a"}]}),
         "score p.png --prompt a --reward m/reward"),
        (onward.after_show("r", "grpo", {}, {"run": "r", "lora": "r/lora"}), "sample --lora r/lora"),
        *((words, shlex.join(words[1:])) for words in onward.ALONE.values()),
    ],
)  # fmt: skip
def test_what_comes_after_a_look(words: list[str], said: str) -> None:
    assert shlex.join(words) == f"drm {said}"
    parsed(words)


def test_a_finished_look_needs_no_other() -> None:
    assert onward.after_show("r", "reproduce", {}, {"run": "r"}) is None
    assert onward.after_show("r", "unheard-of", {}, None) is None


def test_scripts_are_told_nothing(drm: Drm) -> None:
    """Neither with --json nor with --quiet."""
    for flag in ("--json", "--quiet"):
        result = drm("sample", "--steps", "1", flag)
        assert (result.code, "next:" in result.err + result.out) == (0, False)
