"""The command to run next, which each command names in its last line on stderr: `next: drm ...`, to be run as it stands.

From nothing to a reward model of one's own: drm, demo, sample, show, score, data check, train-reward, bench, and sample with what was
trained. A name in a line that the reader's own file is to stand for, a picture or pairs.jsonl, is one that works until then.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Words = list[str]
Summary = Mapping[str, Any]
Config = Mapping[str, Any]

PROMPT = "an ocean at dawn"
"""Of generators that know more than coloured shapes; the embedded one draws its own example where no prompt is named."""
OWN_PAIRS = "pairs.jsonl"
ALONE: dict[tuple[str, ...], Words] = {
    (): ["drm", "demo"],
    ("score",): ["drm", "sample"],
    ("data",): ["drm", "data", "list"],
    ("config",): ["drm", "config", "list"],
}
"""After the help page that these words alone show."""


def say(words: Words | None) -> None:
    """The last line of a command, on stderr; nothing where there is no next one, or where stdout failed."""
    sys.stdout.flush()
    if words and not getattr(sys.stdout, "fault", ""):
        print(f"next: {shlex.join(words)}", file=sys.stderr, flush=True)


def after(command: str, summary: Summary, config: Config) -> Words | None:
    """What comes after a command that was done, of its summary and its config."""
    return AFTER[command](summary, config) if command in AFTER else None


def after_show(run: str, command: str, config: Config, summary: Summary | None) -> Words | None:
    """What comes after a look at a run: to finish it, or to go on from what it made."""
    if summary is None:
        keyless = command == "demo"  # takes no --config
        more = [] if keyless else ["--config", str(Path(run) / "config.yaml")]
        return ["drm", *_spelled(command), *more, "--out", run] if command in RESUMED else None
    if command == "sample" and summary.get("images"):
        first = summary["images"][0]
        return ["drm", "score", first["path"], "--prompt", first["prompt"], *_judged_by(config)]
    found = after(command, summary, config)
    return None if found == _show(summary) else found


def after_check(data: str, data_dir: str | None, split: str | None, *, published: bool, texts: int = 2) -> Words:
    """Pairs that are fine: to train on, or to measure on where they are a benchmark's test, or of one prompt text alone."""
    folder = ["--data-dir", data_dir] if data_dir else []
    if (published and split != "train") or texts < 2:  # one prompt cannot be split in trained and held out
        return ["drm", "bench", "--dataset", data, *folder]
    return ["drm", "train-reward", "--data", data, *folder]


def after_fetch(name: str, folder: str, split: str) -> Words:
    """A fetched split is looked at first."""
    return ["drm", "data", "check", name, "--data-dir", folder, "--split", split]


def after_doctor(preset: str) -> Words:
    """The machine is fit."""
    return ["drm", "demo"] if preset == "tiny" else _sample({"preset": preset})


def _spelled(command: str) -> Words:
    return command.split("-", 1) if command.startswith("data-") else [command]


def _show(s: Summary) -> Words:
    return ["drm", "show", s["run"]]


def _model(c: Config) -> Words:
    """The preset and the generator as they were asked for; nothing for the embedded ones."""
    from drmcli.config import resolve

    preset = c.get("preset", "tiny")
    words = [] if preset == "tiny" else ["--preset", preset]
    generator = c.get("generator")
    if generator and generator != resolve("sample", preset=preset).generator:
        words += ["--generator", generator]
    return words


def _sample(c: Config, *words: str) -> Words:
    """`drm sample` with the same generator; it needs a prompt where that is not the embedded one."""
    model = _model(c)
    return ["drm", "sample", *([PROMPT] if model else []), *model, *words]


def _reward(ref: str, c: Config) -> Words:
    """A reward by its flag; nothing where it is the preset's own."""
    from drmcli.config import resolve

    return [] if ref == resolve("score", preset=c.get("preset", "tiny")).reward else ["--reward", ref]


def _judged_by(c: Config) -> Words:
    """The reward that chose a picture; where none did, the preset's or a public one."""
    from drmcli.config import split_ratio

    ref = split_ratio(c.get("reward") or "none")[0]
    if ref == "none":
        return ["--reward", "pickscore"] if _model(c) else []
    return _reward(ref, c)


def _train_reward(s: Summary, c: Config) -> Words:
    from drmcli.cli.inputs import NO_FILES
    from drmcli.config import split_ratio

    name = split_ratio(c["data"][0])[0]
    own = [] if name in NO_FILES else ["--dataset", name, *(["--data-dir", c["data_dir"]] if c.get("data_dir") else [])]
    return ["drm", "bench", *_model(c), *own, "--reward", s["reward"]]


def _bench(s: Summary, c: Config) -> Words:
    if c.get("reward") == "none" or "protocols" not in s:  # no reward, or a generator that was measured
        return _show(s)
    return _sample(c, "--stepwise", *_reward(s["reward"], c))


def _after_sample(s: Summary, c: Config) -> Words:
    if "methods" not in s:
        return _show(s)
    budget = math.ceil(max(row["cost"] for row in s["methods"]))
    return _sample(c, "--mode", "auto", "--budget", str(budget), "--methods", s["table"])


def _grpo(s: Summary, c: Config) -> Words:
    if s["lora"]:
        return _sample(c, "--lora", s["lora"])
    return _sample(dict(c) | {"generator": s["generator"]})


def _data_make(s: Summary, c: Config) -> Words:
    if s["label"] == ["people"]:
        return ["drm", "data", "label", s["data"]]
    if not s["n_pairs"]:
        return _show(s)
    return _train_on(s["data"], c)


def _train_on(data: str, c: Config) -> Words:
    """On samples of a generator, mixed with other data where some is at hand: the embedded world's."""
    model = _model(c)
    mixed = ["--data", data] if model else ["--data", f"{data}=0.7", "--data", "shapes=0.3"]
    return ["drm", "train-reward", *model, *mixed]


def _export(s: Summary, c: Config) -> Words:
    where = s["to"] or s["push"]
    flags = {"reward model": ["--stepwise", "--reward", where], "LoRA": ["--lora", where]}
    return _sample(s, *flags[s["kind"]]) if s["kind"] in flags else ["drm", "sample", PROMPT, "--generator", where]


AFTER: dict[str, Callable[[Summary, Config], Words]] = {
    "demo": lambda s, c: ["drm", "sample", "--stepwise", "--reward", s["pretrained"]["reward"]],
    "sample": _after_sample,
    "score": lambda s, c: ["drm", "data", "check", OWN_PAIRS],
    "train-reward": _train_reward,
    "bench": _bench,
    "grpo": _grpo,
    "data-make": _data_make,
    "data-label": lambda s, c: _train_on(s["data"], c),
    "reproduce": lambda s, c: _show(s),
    "export": _export,
}
RESUMED = {"demo", "sample", "score", "train-reward", "bench", "grpo", "data-make", "reproduce"}
"""Commands whose unfinished runs go on."""
