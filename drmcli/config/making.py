"""What can be set for the commands that make preferences."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from drmcli.config.schema import Common, Drawing, NonNegative, Positive, Rate, strict


@dataclass(config=strict, kw_only=True)
class DataMake(Common, Drawing):
    """`drm data make`."""

    prompts: str = "shapes"
    """What to draw: a file of prompts, or shapes, the captions of the embedded world that are there to train on."""
    limit: Positive | None = None
    """Prompts to draw, the first of the file; None is all (200 of shapes)."""
    num_images: Annotated[int, Field(ge=2, le=64)] = 4
    """Pictures a prompt, with the seeds seed, seed + 1, ...; all pairs of them are made."""
    steps: Positive | None = None
    """Steps from noise to picture; None is the preset's for sampling."""
    step_rule: Literal["ode", "flow-sde", "dance-sde", "cps"] = "ode"
    """How pictures are drawn: ode, or one of the stochastic steps that search takes."""
    noise_level: Annotated[float, Field(ge=0, le=2)] = 1.0
    """Noise that a stochastic step adds."""
    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    """Classifier-free guidance; None is the preset's for sampling."""
    lora: str | None = None
    """A LoRA of the generator, or the run that made it."""
    batch_size: Positive | None = None
    """Pictures drawn and scored at once; None is the preset's for sampling."""
    label: list[str] = Field(default_factory=list)
    """What judges: scorers, people or none; SCORER=WEIGHT, each brought to its own spread and then summed."""
    sigma: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Sigma at which a reward model judges the pictures."""
    labels: Literal["soft", "drawn", "hard"] = "soft"
    """soft: the probability that one picture is better; drawn: one vote of that probability, as a person's; hard: the order alone."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Score gap that decides by 73 to 27; in spreads of a prompt's pictures."""
    tie_gap: Rate = 0.0
    """Score gap under which a pair is a tie; in the same spreads."""
    weight_by_gap: bool = False
    """Let a pair count by how decided it is; |2p - 1|, on average 1. Else each counts 1."""


@dataclass(config=strict, kw_only=True)
class DataLabel:
    """`drm data label`."""

    folder: str = ""
    """A folder that `drm data make` wrote."""
    host: str = "127.0.0.1"
    """Address to listen on; another than this machine's own is reachable by whoever has the link."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8765
    """Port to listen on; 0 takes a free one."""
    active: str | None = None
    """A reward model or scorer: pairs where it is least sure come first; None is a random order."""
    limit: Positive | None = None
    """Pairs to ask of each labeller; None is all."""
    seed: NonNegative = 0
    """Of the order and of the sides."""
    device: str = "auto"
    """Of --active: auto, cuda, cuda:1 or cpu."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of --active."""
    attention: str = "sdpa"
    """Attention kernels of --active; sdpa is PyTorch's own, others by diffusers' names."""
    compile: bool = False
    """Compile the blocks of --active with torch.compile: quicker passes after minutes of compiling; batches of any size share a program."""
    quantize: Literal["none", "int8", "fp8"] = "none"
    """8 bits for the weights of --active and of its text encoders, by torchao: half of bf16's memory; none keeps them as they are."""
