"""A family of your own: a kind of pipeline that drm does not know, told to it without editing the package.

The example's pipeline is the embedded one, but its transformer predicts x_0 - eps, the velocity's other sign. What differs from a known
family is one method; `drmcli.families.base.Family` lists all that a family may say.
"""

from __future__ import annotations

import torch
from diffusers import StableDiffusion3Pipeline

from drmcli.cli.app import invoke
from drmcli.config import package_path, resolve
from drmcli.families import register
from drmcli.families.sd3 import SD3


class TurnedPipeline(StableDiffusion3Pipeline):
    """Its model_index.json names this class."""


class Turned(SD3):
    name = "turned"

    def pipeline_class(self, name):
        return TurnedPipeline

    def latents(self, config):
        return "sd3"  # the VAE is the same: reward models of that space judge its states

    def velocity(self, output, latents, sigma):
        return -super().velocity(output, latents, sigma)


register("TurnedPipeline", Turned())

# A folder of such a pipeline.
base = package_path(resolve("sample").generator)
pipe = TurnedPipeline.from_pretrained(base, text_encoder_3=None, tokenizer_3=None)
with torch.no_grad():
    pipe.transformer.proj_out.weight.neg_()
    pipe.transformer.proj_out.bias.neg_()
pipe.save_pretrained("turned")

# Every command takes it: here step-wise search with the embedded reward model.
invoke(
    [
        "sample",
        "a large red circle above a small blue square",
        "--generator",
        "turned",
        "--stepwise",
        "--out",
        "runs/turned",
    ]
)
