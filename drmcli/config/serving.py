"""What can be set for the commands that answer over HTTP."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from drmcli.config.schema import Count, Many, Pixels, Rate, Seed, Sigma, strict

Port = Annotated[int, Field(ge=0, le=65535)]


@dataclass(config=strict, kw_only=True)
class Serve:
    """`drm serve`."""

    preset: str = "tiny"
    """A named set of settings; `drm config list` has them."""
    reward: str = ""
    """The scorer that is asked first, or none; a reward model's folder or hub id, a name such as pickscore, NAME=FOLDER,
    `module:function` or a server's URL. Empty: the preset's."""
    scorers: list[str] = Field(default_factory=list)
    """Other scorers to serve; each as --reward has it."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network of the machine. There is no password: put a proxy in front of it there."""
    port: Port = 8000
    """Port to listen on; 0 takes a free one."""
    sigma: Sigma = 0.25
    """Sigma to score at; where a request names none."""
    noise_samples: Count = 4
    """Noise draws a picture, averaged; where a request names none."""
    max_batch: Count = 32
    """Pictures or latents scored at once."""
    max_wait_ms: Rate = 5.0
    """Milliseconds that a batch waits for more to join it."""
    max_queue: Count = 1024
    """Most scores that wait to be computed; beyond, a request is answered 503."""
    max_items: Count = 64
    """Pictures or latents a request."""
    max_body_mib: Count = 64
    """Size of a request, MiB."""
    max_pixels: Many = 16_777_216
    """Largest picture, pixels."""
    seed: Seed = 0
    """Seed of the noise, where a request names none."""
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu; auto takes a GPU where there is one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the weights; auto is bf16 on CUDA and fp32 on the CPU."""
    attention: str = "sdpa"
    """Attention kernels; sdpa is PyTorch's own, others by diffusers' names: native, flash, _flash_3, flex, sage, xformers, ..."""
    compile: bool = False
    """Compile the models' blocks with torch.compile: quicker passes after minutes of compiling; batches of any size share a program."""
    quantize: Literal["none", "int8", "fp8"] = "none"
    """8 bits for frozen weights of the models' blocks and text encoders, by torchao: half of bf16's memory; none keeps them as they are."""
    resolution: Pixels | None = None
    """Side of the square that pictures are cropped and resized to, pixels; None is the reward model's own."""
