"""A tiny Qwen-Image pipeline. Its long template is a few tokens here, 34 before the prompt as in the real one."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from tiny_pipelines import Tiny, packed, shaken, tokenizer
from tokenizers import normalizers
from torch import Tensor

HEAD = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
TAIL = "<|im_end|>\n<|im_start|>assistant\n"


def build() -> Any:
    text = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 99, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
            "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 2, 2]},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24,
            "fullatt_block_indexes": [0],
        },
    )  # fmt: skip
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.5, 1.0],
    )  # fmt: skip
    reads = tokenizer(2048)
    reads.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(HEAD, "~" * 34), normalizers.Replace(TAIL, "~" * 3)]
    )
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=vae, text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(text), tokenizer=reads,
        transformer=shaken(transformer, "txt_in"),
    )  # fmt: skip


def through_vae(pipe: Any, pixels: Tensor) -> Tensor:
    z = pipe.vae.encode(pixels[:, :, None]).latent_dist.mode()
    return pipe.vae.decode(z).sample[:, :, 0]


TINY = Tiny(
    build, call={"max_sequence_length": 40}, plain={"true_cfg_scale": 1.0},
    guided={"true_cfg_scale": 3.0, "negative_prompt": ""}, canonical=packed, length=40, through_vae=through_vae,
)  # fmt: skip
