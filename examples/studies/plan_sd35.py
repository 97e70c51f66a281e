"""Memory plans of Stable Diffusion 3.5 Medium, from its published configs: no weights, no download, no GPU.

    python examples/studies/plan_sd35.py

Builds a folder that holds only the configs, and asks every preset of that model for its plan, in bf16.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from drmcli.config import package_path, preset_names, resolve
from drmcli.recipes import grpo, train_reward
from drmcli.reward_config import RewardConfig

TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
    "dual_attention_layers": list(range(13)),
}  # fmt: skip
VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 16,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
CLIP_L = {"model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
          "num_attention_heads": 12, "projection_dim": 768, "vocab_size": 49408}  # fmt: skip
CLIP_G = CLIP_L | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
                   "projection_dim": 1280}  # fmt: skip
T5 = {"model_type": "t5", "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24,
      "feed_forward_proj": "gated-gelu", "vocab_size": 32128}  # fmt: skip
INDEX = {
    "_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}  # fmt: skip


def write_configs(folder: Path) -> None:
    """A pipeline folder without weights, and a reward model cut from it."""
    parts = {
        "transformer": TRANSFORMER,
        "vae": VAE,
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
        "text_encoder_3": T5,
    }
    for name, config in parts.items():
        (folder / "sd35" / name).mkdir(parents=True)
        (folder / "sd35" / name / "config.json").write_text(json.dumps(config))
    (folder / "sd35" / "model_index.json").write_text(json.dumps(INDEX))
    shutil.copytree(package_path("{package}/tiny/weights/generator/tokenizer"), folder / "sd35" / "tokenizer")
    settings = folder / "sd35" / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 77}))
    config = RewardConfig(base_model=str(folder / "sd35"), transformer=TRANSFORMER, drop_layers=3)
    (folder / "reward").mkdir()
    (folder / "reward" / "config.json").write_text(json.dumps(asdict(config)))


def main() -> None:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for i, name in enumerate(
        ("GiB", "policy or model", "gradients, AdamW", "activations", "checkpointed", "beside", "as set")
    ):
        table.add_column(name, justify="left" if i == 0 else "right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_configs(folder)
        flags = {"generator": str(folder / "sd35"), "dtype": "bf16"}
        for preset in sorted(preset_names()):
            if preset == "tiny":
                continue
            for command in ("train-reward", "grpo"):
                if command == "grpo":
                    config = resolve(
                        command, preset=preset, flags=flags | {"reward": str(folder / "reward"), "prompts": "shapes"}
                    )
                    memory = grpo.plan(config)["memory"]
                else:
                    config = resolve(command, preset=preset, flags=flags)
                    memory = train_reward.plan(config)["memory"]
                beside = sum(memory.get("beside", {}).values())
                total = memory["total_checkpointed" if config.gradient_checkpointing else "total"]
                cells = (memory["weights"], memory["gradients"] + memory["optimizer"] + memory["ema"], memory["activations"],
                         memory["activations_checkpointed"], beside, total)  # fmt: skip
                table.add_row(f"{command} --preset {preset}", *(f"{cell / 2**30:.1f}" for cell in cells))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
