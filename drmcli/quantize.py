"""Frozen weights in 8 bits: those of the linear layers in a denoiser's blocks and in its text encoders, by torchao.

Weights alone: each [out, in] becomes int8 or float8_e4m3 numbers with a float32 scale a row. What they are multiplied with, biases, norms,
embeddings, convolutions and what learns keep their number format.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from drmcli.errors import InputError, MissingError

SCALES = {"int8": 5, "fp8": 4}
"""Bytes of each row beside its numbers: a float32 scale, and torchao's zero point of int8."""
PEFT = (0, 21)
"""The first version that is known to put LoRAs on torchao's weights; older ones look for names that torchao has no more."""
LOUD = ("torchao", "torch.utils._pytree")
"""Loggers that importing torchao makes speak, of kernels and registrations that nobody here needs."""


def check(kind: str, dtype: str, device: torch.device, *, compiled: bool) -> None:
    """Raises InputError for settings that 8 bits do not go with, MissingError for what is not there, naming the flag."""
    if kind == "none":
        return
    if kind == "int8" and dtype == "fp16":
        raise InputError(
            "--quantize int8: products with unscaled 8-bit numbers can exceed fp16", hint="use --dtype bf16, or fp8"
        )
    if kind == "fp8" and compiled and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise MissingError(
            "--quantize fp8: --compile needs a GPU with fp8 for it (Ada, Hopper or later)", hint="use int8, or leave one out"
        )  # fmt: skip
    recipe(kind)


def refuse_learning(kind: str, flag: str) -> None:
    """Raises InputError where all weights are to learn, as `flag` says."""
    if kind != "none":
        raise InputError(
            f"--quantize {kind}: frozen weights alone can be kept in 8 bits, and {flag} trains them",
            hint="train a LoRA, or leave it out",
        )


def recipe(kind: str) -> Any:
    """torchao's config of a kind. Raises MissingError where torchao is not installed or too old, or peft does not know its weights."""
    loggers = [logging.getLogger(name) for name in LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8Tensor, Int8WeightOnlyConfig  # noqa: F401
    except ImportError:
        raise MissingError(
            f"--quantize {kind}: torchao is not installed, or too old", hint="pip install 'drmcli[quantize]'"
        ) from None
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
    if tuple(int(part) for part in version("peft").split(".")[:2]) < PEFT:
        raise MissingError(
            f"--quantize {kind}: peft {version('peft')} is too old for LoRAs on 8 bits", hint="pip install 'drmcli[quantize]'"
        )  # fmt: skip
    return {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind](set_inductor_config=False)


def linears(root: nn.Module) -> list[nn.Linear]:
    """The layers whose weights are kept in 8 bits: all linear ones but a LoRA's, those that share a weight, and a head of words."""
    owners = Counter(id(p) for m in root.modules() for p in m._parameters.values() if p is not None)
    return [
        m
        for name, m in root.named_modules()
        if type(m) is nn.Linear and owners[id(m.weight)] == 1 and ".lora_" not in name and not name.endswith("lm_head")
    ]


def quantize(roots: Sequence[nn.Module], kind: str, device: torch.device | str) -> None:
    """Keep the weights of these modules' `linears` in 8 bits, in place, on a device; `none` does nothing.

    They are moved there one by one: the device never holds more than one of them in full. Raises what `recipe` does.
    """
    if kind == "none":
        return
    config = recipe(kind)
    from torchao.quantization import quantize_

    for root in roots:
        for linear in linears(root):
            if type(linear.weight) is nn.Parameter:  # others are a generator's, in 8 bits already
                quantize_(linear.requires_grad_(False), config, device=device)
            linear.__class__ = FrozenLinear


def names_of_frozen(model: nn.Module) -> list[str]:
    """The weights in 8 bits. No process sends them to another: each reads the same ones."""
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, FrozenLinear)]


class FrozenLinear(nn.Linear):
    """A linear layer with a weight in 8 bits, which gradients pass through."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):  # as PyTorch's own layer does, also for the backward pass
            x = x.to(torch.get_autocast_dtype(kind))
        return _Product.apply(x, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """torchao's product. By itself, autograd would keep a copy of each weight in full until the backward pass; this makes it anew there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight.dequantize(grads[0].dtype), None, None


# --- plans ------------------------------------------------------------------------------------------------------------


def saving(roots: Sequence[nn.Module], kind: str) -> tuple[int, int]:
    """Bytes that 8 bits save in these modules' weights, and those of the largest one in full, which each pass makes for a moment."""
    if kind == "none":
        return 0, 0
    weights = [linear.weight for root in roots for linear in linears(root)]
    less = sum(w.nbytes - w.numel() - SCALES[kind] * w.shape[0] for w in weights)
    return less, max((w.nbytes for w in weights), default=0)
