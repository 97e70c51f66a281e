"""Every preset that is named after a GPU fits it by the memory plan; and the guide's table is that of the presets."""

from __future__ import annotations

import runpy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from drmcli.config import resolve

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / "studies" / "plan_presets.py"), run_name="example")


@cache
def table() -> dict[str, list[str]]:
    """The guide's rows by preset, without the preset itself."""
    text = (ROOT / "examples" / "guides" / "presets.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:3] == "| `"]
    return {row[0].strip("`"): row[1:] for row in rows}


def sizes(preset: str) -> dict[str, float]:
    """Gigabytes by command, as the guide has them."""
    return dict(zip(("train-reward", "bench", "sample --stepwise", "grpo"), map(float, table()[preset][-4:])))


def test_the_guide_has_every_preset_as_it_is(study: dict[str, Any]) -> None:
    assert list(table()) == study["sized"]()
    for preset, cells in table().items():
        assert cells[:7] == study["settings"](preset), preset
        assert cells[7] == study["smallest"]([1e9 * size for size in sizes(preset).values()]), preset


@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("train-reward", "micro_batch_size"), ("train-reward", "gradient_checkpointing"), ("train-reward", "encode_batch_size"),
        ("bench", "encode_batch_size"), ("bench", "batch_size"), ("sample", "batch_size"), ("sample", "max_batch"),
        ("grpo", "micro_batch_size"), ("grpo", "gradient_checkpointing"), ("grpo", "max_batch"),
    ],
)  # fmt: skip
def test_another_size_is_noticed(
    study: dict[str, Any], command: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the gigabytes depend on and a preset sets stands beside them: a preset that changes it alone differs from the guide."""

    def changed(name: str, preset: str) -> Any:
        config = resolve(name, preset=preset)
        if name != command:
            return config
        value = getattr(config, key)
        return replace(config, **{key: not value if isinstance(value, bool) else value + 1})

    monkeypatch.setitem(study["settings"].__globals__, "resolve", changed)
    assert table()["sd35-medium"][:7] != study["settings"]("sd35-medium")


def test_every_preset_fits_the_gpu_that_it_is_named_after(study: dict[str, Any]) -> None:
    named = {preset: study["room"](preset) for preset in table() if study["room"](preset)}
    assert len(named) >= 20
    for preset, room in named.items():
        assert all(size * 1e9 <= room for size in sizes(preset).values()), preset
    too_much = dict.fromkeys(study["COMMANDS"], 24_100_000_000)
    assert study["row"]("sd35-large-24gb", too_much).count("24.1 !") == 4, "what does not fit is marked"


@pytest.mark.parametrize(
    ("preset", "command"), [("sdxl-48gb", "train-reward"), ("sd35-medium-48gb", "sample --stepwise")]
)
def test_the_guide_has_what_the_plan_says(study: dict[str, Any], preset: str, command: str, tmp_path: Path) -> None:
    found = study["plan"](preset, tmp_path, [command])
    assert round(found[command] / 1e9, 1) == sizes(preset)[command]
