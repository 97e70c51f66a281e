"""What training a reward model, or aligning a generator, needs in memory, from configs alone.

The transformer is built without storage (fake tensors), one forward pass is traced, and the bytes that autograd keeps for the
backward pass are added up. Nothing of the model's size is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from drmcli.families.base import Conditioning, Family
from drmcli.parts import part_class
from drmcli.quantize import saving
from drmcli.reward import RewardModel
from drmcli.reward_config import RewardConfig

FIXED = 0.6e9
"""Bytes that a CUDA context takes before the first tensor."""


@dataclass
class MemoryPlan:
    """Bytes of each kind of tensor while a step is taken."""

    parameters: int
    """Number of parameters that are loaded."""
    trained: int
    """Number of parameters that learn."""
    weights: int
    gradients: int
    optimizer: int
    """AdamW's two moments."""
    ema: int
    activations: int
    """Kept for the backward pass of one micro-batch, without gradient checkpointing."""
    activations_checkpointed: int
    """The same with gradient checkpointing, one block's recomputation included."""

    def total(self, *, checkpointed: bool, cuda: bool = False) -> int:
        kept = self.activations_checkpointed if checkpointed else self.activations
        fixed = self.weights + self.gradients + self.optimizer + self.ema + kept
        return int(fixed + (FIXED if cuda else 0))

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


class SavedBytes:
    """Counts the bytes that autograd keeps for the backward pass, parameters and inputs that live anyway excepted."""

    def __init__(self, model: nn.Module):
        self.total = 0
        self._seen = {p.untyped_storage()._cdata for p in model.parameters()}
        self._kept: list[Tensor] = []  # keeps storages alive so that their ids stay distinct

    def __enter__(self) -> SavedBytes:
        self._hooks = saved_tensors_hooks(self._pack, lambda t: t)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.__exit__(*exc)  # type: ignore[arg-type]
        self._kept.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(tensor)
            self.total += storage.nbytes()
        return tensor


def plan_training(
    config: RewardConfig,
    *,
    images: int,
    latent_side: int,
    tokens: int,
    mixed: torch.dtype,
    ema: bool,
    bits: str = "none",
) -> MemoryPlan:
    """The plan for a micro-batch of so many images with square latents and prompts of so many tokens.

    mixed: the autocast dtype (float32 for none). Frozen backbones are kept in it, trained weights in float32. bits: `Kernels.quantize`.
    """
    with torch.device("meta"):
        model = RewardModel.from_config(config)
        model.set_trainable()
    store_frozen_in(model, mixed)
    if config.backbone != "full":  # loaded with the weights, in their format
        for buffer in model.transformer.buffers():
            buffer.data = buffer.data.to(mixed) if buffer.is_floating_point() else buffer.data

    def step(latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return model(latents, sigma, cond)

    def checkpointing() -> None:
        model.gradient_checkpointing = True

    size = latent_side, latent_side
    backbone = model.transformer, model.family, config.transformer
    frozen = saving(model.blocks, bits)
    return _traced(
        model, backbone, step, checkpointing, images, size, tokens, mixed, ema=ema, guided=False, frozen=frozen
    )


def plan_policy(
    family: Family,
    transformer: dict[str, Any],
    *,
    lora: LoraConfig | None,
    states: int,
    latent_side: int,
    tokens: int,
    mixed: torch.dtype,
    ema: bool,
    guided: bool,
    bits: str = "none",
) -> MemoryPlan:
    """The plan for aligning a transformer on micro-batches of so many states; lora None is full fine-tuning.

    guided: classifier-free guidance in training, which doubles the batch. Other models come on top, see `Known.parts`.
    bits: `Kernels.quantize`.
    """
    with torch.device("meta"):
        model: Any = family.denoiser_class.from_config(transformer)  # type: ignore[attr-defined]
        if lora is not None:
            model.requires_grad_(False)
            model.add_adapter(lora)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if tensor.requires_grad else mixed)

    def step(latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        output = model(**family.inputs(model, latents, sigma, cond, None), return_dict=False)
        return family.velocity(output, latents, sigma)

    size = latent_side, latent_side
    return _traced(
        model,
        (model, family, transformer),
        step,
        model.enable_gradient_checkpointing,
        states,
        size,
        tokens,
        mixed,
        ema=ema,
        guided=guided,
        frozen=saving(family.blocks(model), bits),
    )


def _traced(
    model: nn.Module,
    backbone: tuple[nn.Module, Family, dict[str, Any]],
    step: Callable[[Tensor, Tensor, Conditioning], Tensor],
    checkpointing: Callable[[], None],
    count: int,
    size: tuple[int, int],
    tokens: int,
    mixed: torch.dtype,
    *,
    ema: bool,
    guided: bool,
    frozen: tuple[int, int],
) -> MemoryPlan:
    """One forward pass of `step` on fake tensors, without and with gradient checkpointing, added up. frozen: see `quantize.saving`."""
    less, largest = frozen
    with FakeTensorMode(allow_non_fake_inputs=True), RealMasks():
        make_fake(model)
        n = 2 * count if guided else count
        denoiser, family, transformer = backbone
        latents, sigma, cond = blank_states(family, transformer, n, size, tokens)

        def saved() -> int:
            with torch.autocast("cpu", dtype=mixed, enabled=mixed != torch.float32), SavedBytes(model) as counter:
                step(latents, sigma, cond).sum()
            return counter.total

        whole = saved()
        checkpointing()
        blocks = len(family.blocks(denoiser))
        checkpointed = saved() + whole // max(1, blocks)
        trained = [p for p in model.parameters() if p.requires_grad]
        bytes_of: Callable[[Any], int] = lambda ps: sum(p.numel() * p.element_size() for p in ps)  # noqa: E731
        return MemoryPlan(
            parameters=sum(p.numel() for p in model.parameters()),
            trained=sum(p.numel() for p in trained),
            weights=bytes_of(model.parameters()) + bytes_of(model.buffers()) - less,
            gradients=bytes_of(trained),
            optimizer=2 * bytes_of(trained),
            ema=bytes_of(trained) if ema else 0,
            activations=whole + largest,
            activations_checkpointed=checkpointed + largest,
        )


def blank_states(
    family: Family, config: dict[str, Any], count: int, size: tuple[int, int], tokens: int
) -> tuple[Tensor, Tensor, Conditioning]:
    """Random latents [count, C, H, W], noise levels and conditioning with all positions read; config: the denoiser's."""
    cond = family.blank(config, count, tokens)
    if "mask" in cond.tensors:
        with unset_fake_temporarily():
            cond = Conditioning(cond.tensors, mask=torch.ones(count, tokens, dtype=torch.bool))
    return torch.randn(count, family.channels(config), *size), torch.rand(count), cond


def component_maker(
    where: str, index: dict[str, Any], name: str, *, revision: str | None = None
) -> Callable[[], nn.Module] | None:
    """What makes one of a pipeline's models from its config; None where the pipeline lacks it, or it is no model."""
    entry = index.get(name)
    if not isinstance(entry, list | tuple) or not any(entry):  # a pipeline without T5 names it with nulls
        return None
    cls: Any = part_class(name, entry, where)
    if not issubclass(cls, nn.Module):
        return None
    if hasattr(cls, "load_config"):
        settings = cls.load_config(where, subfolder=name, revision=revision)
        return lambda: cls.from_config(settings)
    config = AutoConfig.from_pretrained(where, subfolder=name, revision=revision)
    return lambda: cls(config)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Weights and buffers of the meta device in another number format, as loading in it gives."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


class RealMasks(TorchFunctionMode):
    """Computes with real numbers what follows from real tensors alone: models lay their sequences out by the sums of a mask."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        if given and not any(isinstance(tensor, FakeTensor) for tensor in given):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def make_fake(model: nn.Module) -> None:
    """Tensors of the meta device as fake ones of the CPU, whose kernels keep what real ones would."""

    def fake(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(fake, value))
        return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) and value.is_meta else value

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        for name, value in vars(module).items():  # tables of position codes that are no buffers
            if isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(torch.is_tensor, value))):
                setattr(module, name, fake(value))


def store_frozen_in(model: RewardModel, dtype: torch.dtype) -> None:
    """Keep a backbone whose own weights do not learn in `dtype`; what learns stays in float32."""
    if model.config.backbone == "full":
        return
    for parameter in model.transformer.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
