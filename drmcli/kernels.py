"""How the blocks of a denoiser are computed: by which attention kernels of those that diffusers dispatches, compiled or not, and with
frozen weights of how many bits (see `drmcli.quantize`).

Nothing here changes a name under which a weight is saved, nor what is saved of weights that learn.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import attention_dispatch as dispatch
from torch import nn
from torch.utils._triton import has_triton

from drmcli.errors import InputError, MissingError
from drmcli.families.base import Family
from drmcli.quantize import check, quantize

BACKEND = "inductor"
"""What torch.compile hands its graphs to."""
PROGRAMS = 64
"""Programs that torch.compile may keep of one forward pass. PyTorch's own 8 are too few: the blocks of a generator and of its reward
models share their code, each in kinds (first, last), with and without gradients, with a LoRA on and off."""


@dataclass(frozen=True)
class Kernels:
    """How the blocks of a denoiser are computed."""

    attention: str = "sdpa"
    """A name of `attention_names`."""
    compile: bool = False
    """Compile each block with torch.compile."""
    quantize: str = "none"
    """Bits of frozen weights, the text encoders' too: none (as they are), int8 or fp8."""

    @classmethod
    def of(cls, config: Any, device: torch.device | str) -> Kernels:
        """Those that a command's config asks for.

        Raises InputError for attention that there is not, MissingError for what is not there on this device, naming the flag.
        """
        check_attention(config.attention, torch.device(device))
        if config.compile:
            check_compiler(torch.device(device))
        check(config.quantize, config.dtype, torch.device(device), compiled=config.compile)
        return cls(config.attention, config.compile, config.quantize)

    def use(self, denoiser: Any, family: Family, device: torch.device | str) -> None:
        """Have a denoiser, whole or cut, compute so; weights in 8 bits are moved to the device.

        Raises InputError where it cannot take the attention kernels, MissingError without torchao.
        """
        use_attention(denoiser, family, self.attention)
        quantize(family.blocks(denoiser), self.quantize, device)
        if self.compile:
            compile_blocks(family.blocks(denoiser))

    def home(self, device: torch.device | str) -> torch.device | str:
        """Where weights are read to: the device, but the CPU for those that go there in 8 bits."""
        return device if self.quantize == "none" else "cpu"


PLAIN = Kernels()
"""PyTorch's own attention, nothing compiled."""


# --- attention --------------------------------------------------------------------------------------------------------

PIP = {
    "flash": "pip install flash-attn", "_flash_3": "build FlashAttention 3 from its sources, the package flash_attn_interface",
    "_flash_varlen_3": "build FlashAttention 3 from its sources, the package flash_attn_interface",
    "sage": "pip install sageattention", "_sage": "pip install sageattention", "xformers": "pip install 'drmcli[xformers]'",
    "_native_npu": "pip install torch_npu", "_native_xla": "pip install torch_xla",
}  # fmt: skip
"""How to get what a backend needs, by the first letters of its name; the longest that fits counts."""
ANYWHERE = ("sdpa", "native", "_native_math", "_native_flash", "flex")
"""Those that compute on a CPU too."""
ELSEWHERE = {"_native_npu": "npu", "_native_xla": "xla"}
"""The kind of device of those that need another than CUDA."""
MASKED = ("sdpa", "native", "_native_cudnn", "_native_efficient", "_native_math", "_native_npu", "flex", "flash_varlen",
          "_flash_varlen_3", "sage_varlen", "xformers")  # fmt: skip
"""Those that take a mask: the others raise where a prompt's padding is masked."""


def attention_names() -> list[str]:
    """`sdpa`, which leaves a model as it is, and the backends that the installed diffusers dispatches.

    Those whose kernels are code that is fetched from the hub (`flash_hub` and the like) are left out: drm runs none.
    """
    return ["sdpa", *(b.value for b in dispatch.AttentionBackendName if not b.value.endswith("_hub"))]


def check_attention(name: str, device: torch.device) -> None:
    """Raises InputError for an unknown name, MissingError where its package or its kind of device is not there."""
    names = attention_names()
    if name not in names:
        if name in [b.value for b in dispatch.AttentionBackendName]:
            own = name.removesuffix("_hub")
            raise InputError(
                f"--attention {name}: its kernels are code from the hub, which drm does not run",
                hint=f"use --attention {own if own in names else 'sdpa'}",
            )
        raise InputError(f"--attention {name}: there is no such backend", hint=f"use one of {', '.join(names)}")
    needed = None if name in ANYWHERE else ELSEWHERE.get(name, "cuda")
    if needed and device.type != needed:
        raise MissingError(
            f"--attention {name}: needs {'a CUDA GPU' if needed == 'cuda' else f'a device {needed}'}",
            hint="leave it out, or use --attention sdpa",
        )
    if name != "sdpa":
        try:
            dispatch._check_attention_backend_requirements(dispatch.AttentionBackendName(name))
        except RuntimeError as error:
            found = max((start for start in PIP if name.startswith(start)), key=len, default=None)
            hint = PIP[found] if found else " ".join(str(error).split())
            raise MissingError(f"--attention {name}: its package is not installed, or too old", hint=hint) from None


def check_trainable(name: str) -> None:
    """Raises InputError for kernels that have no backward pass."""
    if name.startswith(("sage", "_sage")):
        raise InputError(
            f"--attention {name}: computes no gradients, which training needs", hint="use it for sampling and scoring"
        )


def use_attention(denoiser: Any, family: Family, name: str) -> None:
    """Have a denoiser's attention computed by a backend; sdpa leaves it as it is.

    Stable Diffusion 3, Sana, Lumina 2 and the U-Nets call PyTorch's attention themselves: they take `native`, which is the same, and
    xformers, for which diffusers gives them other processors. Raises InputError for what a denoiser does not take.
    """
    if name == "sdpa":
        return
    layers = [m for m in denoiser.modules() if hasattr(getattr(m, "processor", None), "_attention_backend")]
    kind = type(denoiser).__name__
    if not layers:
        if name == "xformers":
            denoiser.enable_xformers_memory_efficient_attention()
        elif name != "native":
            raise InputError(
                f"--attention {name}: a {kind} calls PyTorch's attention itself, and takes no other than xformers",
                hint="use --attention sdpa or xformers",
            )
        return
    if name not in MASKED and "mask" in family.blank(dict(denoiser.config), 1, 2).tensors:
        fit = [n for n in attention_names() if n in MASKED]
        raise InputError(
            f"--attention {name}: takes no mask, and a {kind} masks padding", hint=f"use one of {', '.join(fit)}"
        )
    denoiser.set_attention_backend(name)


# --- compiling --------------------------------------------------------------------------------------------------------


def compile_blocks(blocks: Sequence[nn.Module], backend: str | None = None) -> None:
    """Compile the forward pass of each block in place, with sizes left open: one program serves all batches of two rows or more.

    One row has a program of its own, as in all of torch.compile. The first call of each kind of block takes its compilation's time.
    Modules, hooks on them and names of weights stay as they are: it is `forward` that is replaced, beneath the hooks, so that a reward
    model's taps hear what a compiled block returns. Blocks that are compiled already stay so. backend: None is `BACKEND`.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, PROGRAMS)
    for block in blocks:
        if not compiled(block):
            block.forward = torch.compile(block.forward, dynamic=True, backend=backend or BACKEND)  # type: ignore[method-assign]


def compiled(block: nn.Module) -> bool:
    """Is a block's forward pass a compiled one?"""
    return hasattr(block.forward, "_torchdynamo_orig_callable")


def check_compiler(device: torch.device) -> None:
    """Raises MissingError where torch.compile would find nothing to compile with: found now, not at the first forward pass."""
    if BACKEND != "inductor":
        return
    if device.type == "cuda" and not has_triton():
        raise MissingError("--compile: needs Triton, which this PyTorch cannot use here", hint="leave it out")
    found = cpp_compiler() if device.type == "cpu" else any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    if not found:
        raise MissingError(
            "--compile: there is no C++ compiler, which torch.compile needs", hint="install g++, or leave it out"
        )


def cpp_compiler() -> bool:
    """Does torch.compile find the C++ compiler that it makes programs of the CPU with?"""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False
