"""A pipeline folder of Stable Diffusion 3.5 Medium's shape with random weights, and a reward model on it: real sizes without access.

Other studies import this. Fewer blocks make it smaller.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from drmcli.config import package_path
from drmcli.loading import skeleton
from drmcli.recipes.plan import published
from drmcli.reward import RewardModel

MODEL = "stabilityai/stable-diffusion-3.5-medium"
SHARD = 1 << 30
"""Bytes of a file of weights."""
DROPPED = 3
"""Blocks that the reward model leaves out."""


def write_random(model: torch.nn.Module, folder: Path, name: str) -> None:
    """A model's config, and random weights in bf16 in files of a gigabyte, a file at a time."""
    generator = torch.Generator().manual_seed(0)
    places, shard, size, number, tied = {}, {}, 0, 1, set(getattr(model, "_tied_weights_keys", None) or ())
    model.config.save_pretrained(folder) if hasattr(model.config, "save_pretrained") else model.save_config(folder)

    def flush() -> None:
        nonlocal shard, size, number
        file = f"{name}-{number:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        shard, size, number = {}, 0, number + 1

    for key, tensor in model.state_dict().items():
        if key in tied:
            continue
        values = torch.empty(tensor.shape, dtype=torch.bfloat16)
        shard[key] = values.normal_(std=0.02, generator=generator)
        size += values.nbytes
        if size >= SHARD:
            flush()
    if shard:
        flush()
    total = sum((folder / file).stat().st_size for file in set(places.values()))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))


def build(
    folder: Path,
    blocks: int,
    t5_blocks: int,
    backbone: str,
    *,
    clip_blocks: int | None = None,
    dropped: int = DROPPED,
    tokens: int = 256,
) -> None:
    """base/, the pipeline, and reward/, a reward model on it. clip_blocks: of each CLIP, None for all; no T5 with 0 blocks of it.

    tokens: of the T5 part of the reward model's prompts, T5 there or not.
    """
    parts, base = published(MODEL), folder / "base"
    assert parts is not None
    dual = [i for i in range(13) if i < blocks]
    transformer = parts["transformer"] | {"num_layers": blocks, "dual_attention_layers": dual}
    clips = [
        CLIPTextConfig(**config | ({"num_hidden_layers": clip_blocks} if clip_blocks else {}), eos_token_id=2)
        for config in (parts["text_encoder"], parts["text_encoder_2"])
    ]
    makers = {
        "transformer": lambda: SD3Transformer2DModel.from_config(transformer),
        "vae": lambda: AutoencoderKL.from_config(parts["vae"] | {"shift_factor": 0.0609, "scaling_factor": 1.5305}),
        "text_encoder": lambda: CLIPTextModelWithProjection(clips[0]),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(clips[1]),
        "text_encoder_3": lambda: T5EncoderModel(T5Config(**parts["text_encoder_3"] | {"num_layers": t5_blocks})),
    }
    index = parts["index"] | {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    if not t5_blocks:
        del makers["text_encoder_3"]
        index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    for part, make in makers.items():
        (base / part).mkdir(parents=True)
        name = "model" if part.startswith("text") else "diffusion_pytorch_model"
        write_random(skeleton(make), base / part, name)
    tiny = Path(package_path("{package}/tiny/weights/generator"))
    for number in ("", "_2", "_3") if t5_blocks else ("", "_2"):
        shutil.copytree(tiny / "tokenizer", base / f"tokenizer{number}")
        settings = base / f"tokenizer{number}" / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 77}))
        index[f"tokenizer{number}"] = ["transformers", "CLIPTokenizer"]
    (base / "scheduler").mkdir()
    (base / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    )
    (base / "model_index.json").write_text(json.dumps(index))
    model = RewardModel.from_generator(
        str(base), backbone=backbone, drop_layers=dropped, dtype=torch.bfloat16, max_sequence_length=tokens
    )
    model.save_pretrained(folder / "reward")
