"""What stands beside weights and in their files: LoRAs, saved reward models, pipelines, and runs that are exported."""

# ruff: noqa: E501, a row stays on a line

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from faults import fault
from faults.data import png

KEY = "transformer.transformer_blocks.0.attn.to_q"
NAME = r"transformer_blocks\.0\.attn\.to_q"


# --- LoRAs --------------------------------------------------------------------------------------------------------------------------


def lora(name: str, code: int, says: str, *, beside: dict[str, str | bytes] | None = None, metadata: str | None = None,
         drop: str = "", kind: str = "float32", ref: str = "l.safetensors", **tensors: Any):  # fmt: skip
    """A LoRA of rank 2 on one layer, in a file l.safetensors. drop: a side that is left out; tensors: `alpha`, or a side's other values."""

    def make(folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        down, up = torch.full((2, 64), 0.1), torch.full((64, 2), 0.1)
        made = {"lora_A.weight": down, "lora_B.weight": up}
        made = {key: tensor.to(getattr(torch, kind)) for key, tensor in made.items() if not drop or drop not in key}
        made |= {key.replace("_weight", ".weight"): torch.tensor(value) for key, value in tensors.items()}
        more = None if metadata is None else {"lora_adapter_metadata": metadata}
        save_file({f"{KEY}.{key}": tensor for key, tensor in made.items()}, folder / "l.safetensors", metadata=more)

    command = ["sample", "a circle", "--steps", "1", "--lora", ref, "--json", "--out", "r"]
    return fault(f"lora {name}", command, code, says, beside or {}, make=make, env={"HOME": "."})


SOURCE = r"--lora l\.safetensors: its metadata lora_adapter_metadata"
LORAS = [
    lora("half and alpha", 2, rf"half of the LoRA of {NAME} is missing", drop="lora_A", alpha=3.0),
    lora("other half and alpha", 2, rf"half of the LoRA of {NAME} is missing", drop="lora_B", alpha=3.0),
    lora("alpha alone", 2, rf"half of the LoRA of {NAME} is missing", drop="lora", alpha=3.0),
    lora("three alphas", 2, rf"the alpha of {NAME} is not one finite number", alpha=[1.0, 2.0, 3.0]),
    lora("no alpha in its tensor", 2, rf"the alpha of {NAME} is not one finite number", alpha=[]),
    lora("alpha nan", 2, rf"the alpha of {NAME} is not one finite number", alpha=float("nan")),
    lora("alpha in a list", 0, '"images"', alpha=[2]),
    lora("side without axes", 2, rf"{NAME} has shapes \[\] and \[2, 64\]", lora_B_weight=1.0),
    lora("side of one axis", 2, rf"{NAME} has shapes \[64, 2\] and \[64\]", lora_A_weight=[1.0] * 64),
    lora("whole numbers", 2, rf"the weights of {NAME} are torch.int32", kind="int32"),
    lora("eight bits", 0, '"images"', kind="float8_e4m3fn"),
    lora("eight bits not finite", 2, rf"the weights of {NAME} are not finite", kind="float8_e5m2", lora_A_weight=[[float("inf")] * 64] * 2),
    lora("metadata cut", 2, f"{SOURCE} is not JSON", metadata="{"),
    lora("metadata of a list", 2, f"{SOURCE} is no JSON object", metadata="[1]"),
    lora("metadata nested", 2, f"{SOURCE} is not JSON that drm reads", metadata="[" * 100_000),
    lora("metadata alpha null", 2, f"{SOURCE}: lora_alpha must be a finite number, got None", metadata='{"transformer.lora_alpha": null}'),
    lora("metadata alpha text", 2, f"{SOURCE}: lora_alpha must be a finite number, got 'x'", metadata='{"transformer.lora_alpha": "x"}'),
    lora("metadata alpha nan", 2, f"{SOURCE}: lora_alpha must be a finite number, got nan", metadata='{"transformer.lora_alpha": NaN}'),
    lora("metadata alpha huge", 2, f"{SOURCE}: lora_alpha must be a finite number", metadata='{"transformer.lora_alpha": 1%s}' % ("0" * 400)),
    lora("pattern broken", 2, rf"{SOURCE}: alpha_pattern '\[' is no pattern", metadata='{"transformer.alpha_pattern": {"[": 3}}'),
    lora("pattern of text", 2, f"{SOURCE}: alpha_pattern of x must be a finite number", metadata='{"transformer.alpha_pattern": {"x": "y"}}'),
    lora("patterns in a list", 2, f"{SOURCE}: alpha_pattern is no JSON object", metadata='{"transformer.alpha_pattern": [1]}'),
    lora("adapter config cut", 2, "its adapter_config.json is not JSON", beside={"adapter_config.json": "{"}),
    lora("adapter config of a list", 2, "its adapter_config.json is no JSON object", beside={"adapter_config.json": "[]"}),
    lora("adapter config binary", 2, "its adapter_config.json: not UTF-8 text", beside={"adapter_config.json": b"\xff\x00\x01"}),
    lora("beside somebody's yaml", 0, '"images"', beside={"config.yaml": "a: ["}),
    lora("beside somebody's binary", 0, '"images"', beside={"config.yaml": b"\xff\x00\x01"}),
    lora("beside somebody's alpha", 0, '"images"', beside={"config.yaml": "lora_alpha: 1%s\n" % ("0" * 400)}),
    lora("beside a readme in Latin-1", 0, '"images"', beside={"README.md": "Caf\u00e9".encode("latin-1")}),
    lora("beside a readme of digits", 0, '"images"', beside={"README.md": "A LoRA of rank 2, alpha " + "9" * 400}),
    lora("at home", 0, '"images"', ref="~/l.safetensors"),
    lora("not at home", 3, "there is no such file", ref="~/other.safetensors"),
]  # fmt: skip


# --- saved reward models ------------------------------------------------------------------------------------------------------------


def embedded(name: str) -> Path:
    import drmcli

    return Path(drmcli.__file__).parent / "tiny" / "weights" / name


def changed(file: Path, **values: Any) -> None:
    """A JSON file with other values; those of None are null."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def reward(key: str, value: Any, says: str, *more: str):
    """The embedded reward model with another value in its config.json."""

    def make(folder: Path) -> None:
        shutil.copytree(embedded("reward-own"), folder / "m")
        changed(folder / "m" / "config.json", **{key: value})

    command = ["score", "a.png", "--prompt", "a", "--reward", "m", "--json", "--out", "r", *more]
    where = r"error: --reward m: config\.json: "
    never = r"--set|error: --resolution"
    return fault(
        f"reward {key} {value!r} {' '.join(more)}", command, 2, where + says, {"a.png": png()}, make=make, never=never
    )


REWARDS = [
    reward("base_model", 3, "base_model must be a valid string, got 3"),
    reward("transformer", 4, "transformer must be a valid dict"),
    reward("transformer", {}, r"transformer and scheduler are not those .* family sd3 \(KeyError: 'num_layers'\)"),
    reward("transformer", {"num_layers": None}, "transformer and scheduler are not those"),
    reward("resolution", "x", "resolution must be a valid integer, got 'x'"),
    reward("resolution", -8, "resolution must be greater than 0, got -8"),
    reward("resolution", 10_000_000, "resolution must be less than or equal to 65536"),
    reward("max_sequence_length", "x", "max_sequence_length must be a valid integer"),
    reward("max_sequence_length", -3, "max_sequence_length must be greater than or equal to 0"),
    reward("text_encoder_3", "yes", "text_encoder_3 must be a valid boolean"),
    reward("drop_layers", -1, "drop_layers must be greater than or equal to 0, got -1"),
    reward("drop_layers", 6, "drop_layers: 6 of 6 blocks leave nothing"),
    reward("tap_layers", [99], r"tap_layers: \[99\] for 4 kept blocks"),
    reward("tap_layers", [], "tap_layers list must have at least 1 item"),
    reward("tap_layers", ["x"], "tap_layers must be a valid integer"),
    reward("head_pool", "max", "head_pool must be 'mean' or 'attention', got 'max'"),
    reward("head_width", 0, "head_width must be greater than 0"),
    reward("backbone", "half", "backbone must be 'full', 'lora'"),
    reward("lora_targets", "to_q", "lora_targets must be a valid list"),
    reward("guidance", float("nan"), "guidance must be a finite number"),
    reward("format", None, "format must be a valid integer, got None"),
    fault("reward cut", "score a.png --prompt a --reward m --json --out r", 2, r"--reward m: config\.json is damaged", {"a.png": png(), "m/config.json": "[" * 100_000}),
]  # fmt: skip
FAULTS = [*LORAS, *REWARDS]
