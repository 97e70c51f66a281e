"""The reward model of the paper: a diffusion model cut short, with a small head that scores noisy latents.

DRM (arXiv 2605.25661, section 3): image tokens f_v of the last kept block; f_p = MLP(f_v) to a lower width; tokens back on
their 2-D grid; s = MLP(Pool(Conv(f_p))). Trained at every sigma, it scores a latent at any step: R(x_t, t, c).

Dimension letters: B latents, C channels, H and W latent height and width, L = (H/p)(W/p) image tokens of patch size p, D
transformer width, F head width, T tapped blocks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelCard, ModelHubMixin, constants, snapshot_download
from safetensors.torch import save_file
from torch import Tensor, nn

from drmcli.cards import reward_card
from drmcli.config import local_or_hub
from drmcli.data.pictures import Picture, as_count, as_pictures, as_prompts, as_sigmas
from drmcli.errors import InputError
from drmcli.families import family_named, family_of
from drmcli.families.base import Conditioning, Family, latent_space, listening
from drmcli.fitting import Batch
from drmcli.generator import Generator
from drmcli.head import Head
from drmcli.hub import explained
from drmcli.kernels import PLAIN, Kernels
from drmcli.loading import Stored, borrow, fill, finite, opened, skeleton, weightless
from drmcli.noise import score_pictures
from drmcli.parts import denoiser_config, quiet_libraries, read_index, scheduler_facts, with_denoiser
from drmcli.reward_config import RewardConfig, check_shapes, read_config, tapped
from drmcli.run import seed_of

M = TypeVar("M", bound="CutDenoiser")


class CutDenoiser(nn.Module):
    """A denoiser without its last blocks, which gives the image tokens of those that are tapped."""

    def __init__(self, config: RewardConfig, transformer: Any):
        super().__init__()
        self.config = config
        self.family: Family = family_named(config.family).bound(config.scheduler or {})
        depth = self.family.depth(config.transformer)
        self.taps = taps = tapped(config, depth, len(self.family.blocks(transformer)))
        self.transformer = transformer
        self.kernels = PLAIN
        self.family.cut(transformer, max(taps) + 1)

    @property
    def blocks(self) -> list[nn.Module]:
        """The kept blocks."""
        return self.family.blocks(self.transformer)

    @property
    def cost(self) -> float:
        """Of one call, in forward passes of the whole denoiser."""
        return len(self.blocks) / self.family.depth(self.config.transformer)

    @property
    def gradient_checkpointing(self) -> bool:
        """Are blocks computed once more in the backward pass, to save memory?"""
        return bool(self.transformer.is_gradient_checkpointing)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        if on:
            self.transformer.enable_gradient_checkpointing()
        else:
            self.transformer.disable_gradient_checkpointing()

    @property
    def guidance(self) -> float:
        """The guidance scale that a guidance-distilled base is told."""
        return self.family.default_guidance if self.config.guidance is None else self.config.guidance

    def features(
        self, latents: Tensor, sigma: Tensor, cond: Conditioning, *, states: list[Any] | None = None
    ) -> list[Tensor]:
        """Image tokens [B, L, D] of each tapped block for latents [B, C, H, W] at sigma [B].

        states: gets what the last kept block returned, which `Generator.velocity_from` goes on from.
        """
        config, family = self.config.transformer, self.family
        inputs = family.inputs(self.transformer, latents, sigma, cond, self.guidance)
        grid = family.grid(config, (latents.shape[2], latents.shape[3]))
        last = len(self.blocks) - 1
        with listening(self.blocks, [*self.taps, last]) as heard:
            self.transformer(**inputs, return_dict=False)
        if states is not None:
            states.append(heard[last])
        return [family.tokens(heard[tap], inputs, grid) for tap in self.taps]

    def ready(self: M, kernels: Kernels, device: torch.device | str) -> M:
        """This model with its blocks computed by these kernels, frozen and on its device. Raises what `Kernels.use` does."""
        kernels.use(self.transformer, self.family, device)
        self.kernels = kernels
        return self.eval().requires_grad_(False).to(device)

    def share_blocks(self, generator: Generator) -> None:
        """Use the generator's own modules, so that a search computes the first blocks once. The weights must be the same ones."""
        self.family.share(self.transformer, generator.transformer)

    def borrow_weights(self, transformer: nn.Module) -> int:
        """Use a pipeline's transformer's weights where they are equal to this model's own. Returns the bytes that are free again.

        For a model on a pipeline's own base that was loaded without `beside`. LoRAs on either stay apart; weights that are changed in
        place afterwards (by `fuse_lora`, or by training all of them) change here too.
        """
        return borrow(self.transformer, transformer)


class RewardModel(CutDenoiser, ModelHubMixin, library_name="drmcli", tags=["reward-model"]):  # type: ignore[call-arg]
    """A denoiser cut short and its head. `score` takes latents, `score_images` pictures.

    Make one with `from_generator`, load one with `from_pretrained(folder or hub id)`, or the embedded one with `tiny()`; save it with
    `save_pretrained`.
    """

    picture_sigma = 0.25
    """Sigma at which finished pictures are judged where nobody says another."""
    own_encoders = False
    """Does it come with text encoders of its own, which no generator has?"""

    def __init__(self, config: RewardConfig, transformer: Any):
        super().__init__(config, transformer)
        self.head = Head(self.family.widths(transformer, self.taps), config.head_width, config.head_pool)
        self._generator: Generator | None = None

    @classmethod
    def from_config(cls, config: RewardConfig) -> RewardModel:
        """The model that a config describes, with weights drawn at random; under `torch.device("meta")` without any."""
        kind: Any = family_named(config.family).denoiser_class
        return cls(config, kind.from_config(config.transformer))

    # --- making and loading -------------------------------------------------------------------------------------------

    @classmethod
    def from_generator(
        cls,
        ref: str,
        *,
        revision: str | None = None,
        init: str = "pretrained",
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        flag: str = "--generator",
        **settings: Any,
    ) -> RewardModel:
        """A new reward model on the transformer of a pipeline. `settings` are fields of RewardConfig; dtype: of the transformer.

        init "random" keeps the architecture and forgets the weights. The head is always new, drawn from `seed`.
        """
        where = local_or_hub(ref, flag)
        with explained(ref, flag), quiet_libraries():
            family = family_of(str(read_index(where, revision).get("_class_name")), f"{flag} {ref}")
            full = denoiser_config(family, where, revision)
            config = RewardConfig(
                base_model=ref,
                base_revision=revision,
                transformer={k: v for k, v in full.items() if not k.startswith("_")},
                family=family.name,
                scheduler=scheduler_facts(family, where, revision),
                **({"lora_targets": list(family.lora_targets)} | settings),
            )

            def make(denoiser: Any) -> RewardModel:
                torch.manual_seed(seed_of("head", seed))
                return cls(config, denoiser)

            if init == "random":
                torch.manual_seed(seed_of("reward", seed))
                kind: Any = family.denoiser_class
                model = make(kind.from_config(full).to(dtype))
            else:
                model = with_denoiser(make, family, where, revision=revision, dtype=dtype, device=device)
        model.set_trainable()
        return model.to(device)

    def set_trainable(self) -> None:
        """Which weights learn: all, the LoRA, or the head alone. Weights that cannot reach the score never do."""
        if self.config.backbone == "lora":
            self.transformer.requires_grad_(False)
            if not getattr(self.transformer, "_hf_peft_config_loaded", False):
                self.transformer.add_adapter(_lora(self.config, self.family))
            for name, parameter in self.transformer.named_parameters():
                parameter.requires_grad_(".lora_" in name)
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        else:
            self.transformer.requires_grad_(self.config.backbone == "full")
        for parameter in self.family.unread(self.transformer):
            parameter.requires_grad_(False)
        self.head.requires_grad_(True)

    def saved_tensors(self) -> dict[str, Tensor]:
        """What is saved: with a full backbone everything, else what was trained."""
        if self.config.backbone == "full":
            return dict(self.state_dict())
        trained = {
            name for name, parameter in self.named_parameters() if parameter.requires_grad or name.startswith("head.")
        }
        trained |= {name for name, _ in self.named_parameters() if ".lora_" in name}
        return {name: tensor for name, tensor in self.state_dict().items() if name in trained}

    def _save_pretrained(self, save_directory: Path) -> None:
        self._write(Path(save_directory), self.saved_tensors())

    def _write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        whole = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})

    def write(self, folder: Path, tensors: dict[str, Tensor], card: str) -> None:
        """`save_pretrained` of tensors that were gathered before, where each process holds a part of the weights, with a card."""
        self._write(folder, tensors)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
        return ModelCard(reward_card(asdict(self.config)))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        base_dtype: torch.dtype | None = None,
        beside: Generator | None = None,
        kernels: Kernels = PLAIN,
        flag: str = "--reward",
    ) -> RewardModel:
        """Load a saved reward model from a folder or the hub, frozen and ready to score.

        dtype: of the backbone, the head is always float32; base_dtype: of backbone weights that are the base's own (None: as the others).
        beside: a loaded generator. Where the backbone is its transformer's first blocks, alone or with a LoRA, the weights themselves are
        used, not loaded a second time; they must not be changed in place from then on. kernels: how its blocks are computed.

        Raises MissingError (absent, gated, offline) or InputError (damaged, of another kind), each naming `flag`.
        """
        model_id = str(pretrained_model_name_or_path)
        where = Path(local_or_hub(model_id, flag))
        with explained(model_id, flag), quiet_libraries():
            if not where.is_dir():
                options: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
                patterns = ["config.json", "model.safetensors", "README.md"]
                where = Path(snapshot_download(model_id, revision=revision, allow_patterns=patterns, **options))
            model = _loaded(cls, where, f"{flag} {model_id}", dtype, base_dtype or dtype, device, beside, kernels)
        return model.ready(kernels, device)

    @classmethod
    def tiny(cls, **options: Any) -> RewardModel:
        """The reward model of the package, which knows coloured shapes: to try things with, offline. `options` as in `from_pretrained`."""
        return cls.from_pretrained("{package}/tiny/weights/reward-own", **options)

    def load_tensors(self, tensors: dict[str, Tensor], where: str) -> None:
        """Load what `saved_tensors` gave. Raises InputError for missing, surplus, misshapen or non-finite ones."""
        mine = self.saved_tensors()
        # Files written before the scale had an axis.
        tensors = {name: t.reshape(1) if name == "head.log_scale" and t.ndim == 0 else t for name, t in tensors.items()}
        check_shapes({n: t.shape for n, t in tensors.items()}, {n: t.shape for n, t in mine.items()}, where)
        for name, tensor in tensors.items():
            if not finite(tensor):
                raise InputError(f"{where}: the weights of {name} are not finite", hint="train or download it again")
        with torch.no_grad():
            for name, tensor in tensors.items():
                mine[name].copy_(tensor)

    # --- scoring ------------------------------------------------------------------------------------------------------

    def score(
        self, latents: Tensor, sigma: float | Tensor, cond: Conditioning, *, states: list[Any] | None = None
    ) -> Tensor:
        """R(x_sigma, c): scores [B], float32, differentiable. latents [B, C, H, W] at sigma (one, or [B]).

        states: see `features`.
        """
        config, family = self.config.transformer, self.family
        check_shape(latents, family, config)
        sigma = torch.as_tensor(sigma, device=latents.device, dtype=torch.float32).expand(len(latents))
        tokens = self.features(latents, sigma, cond, states=states)
        with torch.autocast(latents.device.type, enabled=False):
            return self.head(tokens, *family.grid(config, (latents.shape[2], latents.shape[3])))

    forward = score

    def check_latents(self, generator: Generator, where: str) -> None:
        """Raises InputError, beginning with `where`, unless the model was made for the generator's latent space."""
        mine, theirs = latent_space(self.family, self.config.transformer), generator.latent_space
        if mine != theirs:
            raise InputError(
                f"{where}: made for {mine[0]} latents of {mine[1]} channels, not {theirs[0]} latents of {theirs[1]} channels",
                hint="use a reward model whose base is the generator's",
            )

    def generator(self, *, device: torch.device | str | None = None, beside: Generator | None = None) -> Generator:
        """The base pipeline's VAE and text encoders as in training, loaded once. beside: see `Generator.load`."""
        if self._generator is None:
            c = self.config
            self._generator = Generator.load(
                c.base_model,
                revision=c.base_revision,
                device=device or next(self.parameters()).device,
                dtype=next(self.transformer.parameters()).dtype,
                components=("text", "vae"),
                text_encoder_3=c.text_encoder_3,
                max_sequence_length=c.max_sequence_length,
                kernels=self.kernels,
                beside=beside,
                flag="base_model",
            )
        return self._generator

    def use_encoders(self, generator: Generator) -> None:
        """Take a generator's VAE and text encoders for one's own. Rather call `encoders.share`, which compares them first."""
        self._generator = generator

    @torch.no_grad()
    def score_images(
        self,
        images: Picture | Sequence[Picture],
        prompts: str | Sequence[str],
        *,
        sigmas: float | Sequence[float] = (0.25,),
        noise_samples: int = 4,
        seed: int = 0,
        batch_size: int | Batch = 32,
    ) -> Tensor:
        """Scores [B, len(sigmas)] of B pictures, higher is better. Each picture and each prompt is encoded once.

        images: one or several, each a PIL picture, a path, an array [H, W, 3] or a tensor [3, H, W] (uint8, or floats from 0 to 1).
        prompts: one text for all, or a text a picture. sigmas: from 0, clean, to 1, noise.
        noise_samples: draws averaged at each sigma above 0 (DiNa-LRM calls it a noise ensemble). seed: of these draws.

        Raises InputError, a DrmError, that says what was given in place of a picture, a text or a number, or how many of each.
        """
        as_prompts(prompts)  # before pictures are read, in case the two were given the wrong way round
        pictures = as_pictures(images)
        batch = batch_size if isinstance(batch_size, Batch) else as_count(batch_size, "batch_size")
        return score_pictures(
            self, self.generator(), pictures, as_prompts(prompts, len(pictures)), as_sigmas(sigmas),
            resolution=self.config.resolution, noise_samples=as_count(noise_samples, "noise_samples"),
            seed=as_count(seed, "seed", least=0), batch_size=batch,
        )  # fmt: skip


def _lora(config: RewardConfig, family: Family) -> Any:
    """The LoRA that a config describes."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=list(config.lora_targets or family.lora_targets),
    )


def _loaded(
    cls: type[RewardModel],
    folder: Path,
    where: str,
    dtype: torch.dtype,
    base_dtype: torch.dtype,
    device: torch.device | str,
    beside: Generator | None,
    kernels: Kernels,
) -> RewardModel:
    """The model that a folder holds; a backbone that was not trained comes from the base pipeline. where: for the errors."""
    config = read_config(folder, where)
    family = family_named(config.family, where)
    weights = folder / constants.SAFETENSORS_SINGLE_FILE
    if not weights.is_file():
        raise InputError(f"{where}: holds no model.safetensors", hint="drm reads weights from safetensors only")
    kind: Any = family.denoiser_class
    with opened([weights]) as tensors:
        if config.backbone == "full":
            model = cls(config, skeleton(lambda: kind.from_config(config.transformer)))
        else:
            base = local_or_hub(config.base_model, f"{where}: base_model")
            model = with_denoiser(
                lambda denoiser: cls(config, denoiser), family, base, revision=config.base_revision, dtype=base_dtype, device=device,
                beside=beside, kernels=kernels,
            )  # fmt: skip
        with weightless():
            model.set_trainable()
        if "head.log_scale" in tensors and not tensors["head.log_scale"].shape:  # written before it had an axis
            scale = tensors["head.log_scale"].read().reshape(1)
            tensors["head.log_scale"] = Stored((1,), lambda: scale)
        expected = {name: tensor.shape for name, tensor in model.saved_tensors().items()}
        check_shapes({name: stored.shape for name, stored in tensors.items()}, expected, where)
        formats = {True: torch.float32, False: dtype}
        fill(
            model, tensors, where, dtype=lambda name: formats[name.startswith("head.")], device=kernels.home(device),
            only=expected.keys(),
        )  # fmt: skip
    return model


def check_shape(latents: Tensor, family: Family, config: dict[str, Any]) -> None:
    """Raises InputError for what is no batch of latents [B, C, H, W] of this denoiser, or none that it can place."""
    channels, unit, largest = family.channels(config), family.patch(config), family.largest_side(config, 1)
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise InputError(
            f"latents of shape {list(latents.shape)}: this reward model was trained on {channels} channels",
            hint="use a reward model whose base is the generator's",
        )
    height, width = latents.shape[2:]
    if height % unit or width % unit:
        raise InputError(
            f"latents of {height} x {width}: not a multiple of the patch size {unit}",
            hint="choose another height and width",
        )
    if largest is not None and max(height, width) > largest:
        raise InputError(
            f"latents of {height} x {width}: the transformer knows {largest} x {largest} at most", hint="go smaller"
        )
