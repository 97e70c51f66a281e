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


# --- pipelines ----------------------------------------------------------------------------------------------------------------------


def pipeline(file: str, key: str, value: Any, says: str, *more: str):
    """The embedded pipeline with another value in one of its configs."""

    def make(folder: Path) -> None:
        shutil.copytree(embedded("generator"), folder / "g")
        changed(folder / "g" / file, **{key: value})

    command = ["sample", "a circle", "--steps", "1", "--generator", "g", "--json", "--out", "r", *more]
    return fault(f"pipeline {file} {key} {value!r} {' '.join(more)}", command, 2, "error: " + says, make=make)


INDEX, VAE, DENOISER = "model_index.json", "vae/config.json", "transformer/config.json"
SCHEDULER, WORDS = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
NUMBER = r"--generator g: vae/config\.json: scaling_factor must be a finite number other than 0"
PIPELINES = [
    *(
        pipeline(INDEX, name, [None, None], rf"--generator g: its model_index\.json names no {name}")
        for name in ("transformer", "vae", "text_encoder", "tokenizer")
    ),
    pipeline(INDEX, "transformer", [], r"--generator g: its model_index\.json names no transformer"),
    pipeline(INDEX, "vae", ["nosuch", "VAE"], r"--generator g: its model_index\.json names \['nosuch', 'VAE'\] for vae, which is no class"),
    pipeline(INDEX, "vae", ["nosuch", "VAE"], r"--generator g: its model_index\.json names \['nosuch', 'VAE'\]", "--dry-run"),
    pipeline(INDEX, "vae", [None, None], r"--generator g: its model_index\.json names \[None, None\] for vae", "--dry-run"),
    pipeline(INDEX, "text_encoder_2", ["transformers"], r"--generator g: its model_index\.json names \['transformers'\] for text_encoder_2"),
    pipeline(VAE, "scaling_factor", None, NUMBER + ", got None"),
    pipeline(VAE, "scaling_factor", "x", NUMBER + ", got 'x'"),
    pipeline(VAE, "scaling_factor", float("nan"), NUMBER + ", got nan"),
    pipeline(VAE, "scaling_factor", 0, NUMBER + ", got 0"),
    pipeline(VAE, "shift_factor", "x", r"--generator g: vae/config\.json: shift_factor must be a finite number, got 'x'"),
    pipeline(VAE, "norm_num_groups", -1, r"--generator g: vae/config\.json: norm_num_groups must be above 0, got -1"),
    pipeline(DENOISER, "sample_size", -1, r"--generator g: transformer/config\.json: makes -2 pixels on a side"),
    pipeline(DENOISER, "pos_embed_max_size", None, r"--generator g: transformer/config\.json: int\(\) argument"),
    pipeline(SCHEDULER, "base_shift", "x", r"--generator g: scheduler/scheduler_config\.json: unsupported operand"),
    pipeline(SCHEDULER, "shift", float("nan"), r"--generator g: scheduler/scheduler_config\.json: makes noise levels that are not finite"),
    pipeline(WORDS, "model_max_length", "x", "--generator g: its tokenizers: tokenizer: model_max_length must be a number above 0"),
    pipeline(WORDS, "pad_token", None, "--generator g: its tokenizers: tokenizer: has no pad token"),
    pipeline("text_encoder/config.json", "num_hidden_layers", "x", "--generator g: cannot be loaded: Validation error for field 'num_hidden_layers'"),
    pipeline("text_encoder/config.json", "num_attention_heads", -1, "--generator g: its text encoders: text_encoder: num_attention_heads must be above 0"),
    pipeline("text_encoder/config.json", "eos_token_id", None, "--generator g: its text encoders: text_encoder: eos_token_id must be a number, got None"),
]  # fmt: skip


# --- runs that are exported ---------------------------------------------------------------------------------------------------------


def exported(name: str, says: str, command: str, *, yaml: str | None = None, config: dict[str, Any] | None = None,
             summary: dict[str, Any] | None = None, reward: dict[str, Any] | str | None = None, code: int = 2):  # fmt: skip
    """A finished run in r. yaml: all of its config.yaml; config, summary, reward: values that are changed, or all of reward/config.json."""

    def make(folder: Path) -> None:
        from drmcli import config as configs

        run = folder / "r"
        run.mkdir()
        values = configs.resolve(command, flags=config or {})
        (run / "config.yaml").write_text(configs.to_yaml(values, command) if yaml is None else yaml)
        if command == "train-reward":
            shutil.copytree(embedded("reward-own"), run / "reward")
            own = {
                "train_pairs": 4,
                "eval_pairs": 4,
                "eval_by_sigma": [{"sigma": 0.25, "accuracy": 50.0, "ci95": [25.0, 75.0]}],
            }
            if isinstance(reward, str):
                (run / "reward" / "config.json").write_text(reward)
            else:
                changed(run / "reward" / "config.json", **(reward or {}))
        else:
            from numpy import ones
            from safetensors.numpy import save_file

            (run / "lora").mkdir()
            save_file(
                {f"{KEY}.lora_A.weight": ones((2, 64), "float32")}, run / "lora" / "pytorch_lora_weights.safetensors"
            )
            own = {
                "updates": 9,
                "best_update": 7,
                "reward_before": 1.0,
                "reward_after": 2.0,
                "reward_gain_ci95": [0.5, 1.5],
            }
        made = {"command": command} | own | (summary or {})
        (run / "summary.json").write_text(json.dumps({key: value for key, value in made.items() if value != "absent"}))

    return fault(f"export {command} {name}", "export r --to out --json", code, says, make=make)


def trained(name: str, says: str, **more: Any):
    return exported(name, says, "train-reward", **more)


def aligned(name: str, says: str, **more: Any):
    return exported(name, says, "grpo", **more)


CONFIG, SUMMARY = r"error: RUN r: its config\.yaml is damaged", r"error: RUN r: its summary\.json is damaged"
EXPORTS = [
    trained("whole", '"kind": "reward model"', code=0),
    trained("base of a number", r"error: RUN r: config\.json: base_model must be a valid string, got 3", reward='{"base_model": 3, "transformer": 4}'),
    trained("config empty", r"error: RUN r: config\.json is not a reward model's", reward="{}"),
    trained("config cut", r"error: RUN r: config\.json is damaged", reward="{"),
    trained("taps that are not there", r"error: RUN r: config\.json: tap_layers", reward={"tap_layers": [99]}),
    trained("accuracies of a number", rf"{SUMMARY} \(TypeError", summary={"eval_by_sigma": 3}),
    trained("accuracies gone", rf"{SUMMARY} \(KeyError: 'eval_by_sigma'", summary={"eval_by_sigma": "absent"}),
    trained("accuracy of text", rf"{SUMMARY} \(ValueError", summary={"eval_by_sigma": [{"sigma": 0.5, "accuracy": "x"}]}),
    trained("interval of one end", rf"{SUMMARY} \(IndexError", summary={"eval_by_sigma": [{"sigma": 0.5, "accuracy": 5, "ci95": [1]}]}),
    trained("pairs of text", rf"{SUMMARY} \(ValueError", summary={"train_pairs": "x"}),
    trained("yaml cut", rf"{CONFIG} \(KeyError: 'data'", yaml="command: train-reward\n"),
    trained("data of a number", rf"{CONFIG} \(TypeError", yaml="command: train-reward\ndata: 4\n"),
    trained("data of numbers", rf"{CONFIG} \(AttributeError", yaml="command: train-reward\ndata: [4]\n"),
    aligned("whole", '"kind": "LoRA"', code=0),
    aligned("yaml cut", rf"{CONFIG} \(generator is None", yaml="command: grpo\n"),
    aligned("yaml without the rest", rf"{CONFIG} \(KeyError", yaml="command: grpo\ngenerator: owner/base\n"),
    aligned("generator of a number", rf"{CONFIG} \(generator is 4", yaml="command: grpo\ngenerator: 4\n"),
    aligned("best update gone", rf"{SUMMARY} \(best_update is None", summary={"best_update": "absent"}),
    aligned("best update of text", rf"{SUMMARY} \(best_update is 'x'", summary={"best_update": "x"}),
    aligned("reward gone", rf"{SUMMARY} \(KeyError: 'reward_after'", summary={"reward_after": "absent"}),
    aligned("reward of text", rf"{SUMMARY} \(ValueError", summary={"reward_after": "x"}),
    aligned("interval of a number", rf"{SUMMARY} \(TypeError", summary={"reward_gain_ci95": 3}),
]  # fmt: skip
FAULTS = [*LORAS, *REWARDS, *PIPELINES, *EXPORTS]
