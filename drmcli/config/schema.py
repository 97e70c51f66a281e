"""What can be set: one dataclass a command. Each field's line says its unit, and what None or 0 means."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Positive = Annotated[int, Field(gt=0, le=1_000_000_000)]
NonNegative = Annotated[int, Field(ge=0, le=1_000_000_000)]
Count = Annotated[int, Field(gt=0, le=1_000_000)]
"""Of pictures, prompts, pairs in memory at once."""
Many = Annotated[int, Field(gt=0, le=1_000_000_000)]
"""Of what is counted on and never held: optimizer steps, pairs of a dataset."""
Interval = Annotated[int, Field(ge=0, le=1_000_000_000)]
"""Steps between two things; 0 has a meaning of its own."""
SamplingSteps = Annotated[int, Field(gt=0, le=10_000)]
Width = Annotated[int, Field(gt=0, le=65_536)]
"""Of a layer, a LoRA's rank."""
Pixels = Annotated[int, Field(gt=0, le=65_536)]
Layer = Annotated[int, Field(ge=0, le=10_000)]
Seed = Annotated[int, Field(ge=0, lt=4_611_686_018_427_387_904)]
"""The seeds after it must fit an int64 column too."""
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Above = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Guidance = Annotated[float, Field(ge=0, le=1000)]
Share = Annotated[float, Field(ge=0, le=1)]
Sigma = Annotated[float, Field(ge=0, le=1)]
strict = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(config=strict, kw_only=True)
class Common:
    """What every command that runs models takes."""

    preset: str = "tiny"
    """A named set of settings; `drm config list` has them."""
    out: str | None = None
    """Run folder; None is runs/<command>-<time>."""
    seed: Seed = 0
    """Seed of everything random."""
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu; auto takes a GPU where there is one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of frozen weights and mixed precision; auto is bf16 on CUDA and fp32 on the CPU."""
    attention: str = "sdpa"
    """Attention kernels; sdpa is PyTorch's own, others by diffusers' names: native, flash, _flash_3, flex, sage, xformers, ..."""
    compile: bool = False
    """Compile the models' blocks with torch.compile: quicker passes after minutes of compiling; batches of any size share a program."""
    quantize: Literal["none", "int8", "fp8"] = "none"
    """8 bits for frozen weights of the models' blocks and text encoders, by torchao: half of bf16's memory; none keeps them as they are."""
    resolution: Pixels | None = None
    """Side of the square that images are cropped and resized to, pixels; None is the generator's own size."""
    resume: bool = True
    """Go on with an unfinished run in the same folder."""
    overwrite: bool = False
    """Empty the run folder first."""


@dataclass(config=strict, kw_only=True)
class Timed:
    """The commands whose `--dry-run` tells hours."""

    timing: Literal["auto", "on", "off"] = "auto"
    """Hours in the plan of --dry-run: passes with random weights are timed; auto is where there is a GPU."""


@dataclass(config=strict, kw_only=True)
class Drawing:
    """The pipeline of the commands that need one."""

    generator: str = ""
    """Text-to-image pipeline, by folder or hub id; in Hugging Face layout. Empty: the preset's."""
    revision: str | None = None
    """Revision of a generator on the hub; None is its main branch."""
    max_sequence_length: Annotated[int, Field(ge=0, le=4096)] = 256
    """Tokens of the T5 part of a prompt; where there is no T5, SD3 puts as many zeros there."""
    vae_tiling: Literal["auto", "on", "off"] = "auto"
    """The VAE works on overlapping tiles: less memory for large pictures, slightly other pixels; auto is above 2 megapixels."""
    text_encoder_3: bool = True
    """False leaves the T5 encoder unloaded (zeros instead): 9 GB less, slightly different scores."""


@dataclass(config=strict, kw_only=True)
class Data:
    """Where preference pairs come from, and where what is encoded of them is kept."""

    cache_dir: str | None = None
    """Cache of encoded images and prompts; None is $DRM_CACHE or ~/.cache/drmcli."""
    data_dir: str | None = None
    """Folder of a published dataset; in its published layout."""
    shapes_prompts: Count = 1200
    """Captions of the procedural dataset `shapes`, four pictures each."""
    shapes_generated: Share = 0.1
    """Share of these captions whose pictures are the generator's own samples."""
    max_bad: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Percent of bad pictures and rows that a run accepts; above it stops."""
    encode_batch_size: Count = 64
    """Images that go through the VAE, and prompts through the text encoders, at once."""
    no_cache: bool = False
    """Keep nothing that is encoded: it goes to a temporary folder, which is removed at the end."""
    prompt_cache: Literal["auto", "disk", "live"] = "auto"
    """Prompts' embeddings: on disk, or encoded live for each batch; auto is disk where a quarter of its free space holds them."""
    cache_dtype: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    """Number format of the prompts' embeddings on disk; auto is the text encoders' own."""
    allow_outside: bool = False
    """Let a data file name images outside its own folder."""


@dataclass(config=strict, kw_only=True)
class TrainReward(Common, Timed, Drawing, Data):
    """`drm train-reward`."""

    data: list[str] = Field(default_factory=lambda: ["shapes"], min_length=1)
    """Datasets or files, mixed; `NAME=0.3` gives a ratio of the draws."""
    eval_data: list[str] = Field(default_factory=list)
    """Held-out datasets or files; empty: the test part of `shapes`, else prompts held out of the data."""
    init: str = "pretrained"
    """Start: pretrained, random or a saved reward model; pretrained is the generator's transformer, random the same without its weights."""
    backbone: Literal["full", "lora", "frozen", "head"] = "full"
    """What of the backbone is trained; head (or frozen) trains the head alone."""
    lora_rank: Width = 64
    """Rank of the backbone's LoRA."""
    lora_alpha: Width = 128
    """Scale of the backbone's LoRA, alpha / rank."""
    drop_layers: Layer = 3
    """Transformer blocks cut off at the end; 3 of 24 in the paper."""
    tap_layers: Annotated[list[Layer], Field(min_length=1)] | None = None
    """Blocks whose image tokens the head reads, counted from 0; None is the last kept one."""
    head_width: Width = 512
    """Width of the head's tokens and convolution."""
    head_pool: Literal["mean", "attention"] = "mean"
    """Pooling over the grid."""
    loss: Literal["bradley-terry", "thurstone"] = "bradley-terry"
    """Preference loss."""
    margin: Finite = 0.0
    """Score difference by which Bradley-Terry wants the chosen image ahead."""
    shared_noise: bool = True
    """The images of a prompt share their noise; False draws it for each."""
    sigma_density: Literal["uniform", "logit-normal", "fixed"] = "uniform"
    """How sigmas are drawn; fixed is always sigma_max."""
    sigma_min: Sigma = 0.0
    """Lower end of the sigmas."""
    sigma_max: Sigma = 1.0
    """Upper end of the sigmas."""
    logit_mean: Finite = 0.0
    """Mean of the logit-normal density."""
    logit_std: Above = 1.0
    """Standard deviation of the logit-normal density."""
    steps: Many = 1000
    """Optimizer steps."""
    batch_size: Count = 128
    """Pairs an optimizer step; over all processes and accumulation."""
    micro_batch_size: Count | None = None
    """Pairs a forward pass of one process; None is as many as the batch gives it."""
    lr: Rate = 1e-5
    """Learning rate of the backbone."""
    head_lr: Rate | None = None
    """Learning rate of the head; None is the backbone's."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""
    warmup_steps: Interval = 0
    """Steps of linear warm-up."""
    weight_decay: Rate = 0.01
    """AdamW's weight decay."""
    max_grad_norm: Rate = 1.0
    """Gradient norm above which gradients are scaled down; 0 is off."""
    ema_decay: Share = 0.0
    """Decay of an exponential moving average of the trained weights, which is what is saved; 0 is off."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    shard: bool = False
    """Split weights, gradients and optimizer over the processes (FSDP 2) in place of a copy in each."""
    eval_every: Interval = 0
    """Steps between evaluations; 0 only at the end."""
    eval_pairs: Many = 1000
    """Held-out pairs that are evaluated."""
    eval_sigmas: list[Sigma] = Field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 0.9], min_length=1, max_length=1000)
    """Sigmas of the evaluation."""
    eval_sigma: Sigma = 0.25
    """Sigma of the accuracy that is reported first, and that the best checkpoint is chosen by."""
    eval_batch_size: Count = 64
    """Images scored at once."""
    save_every: Interval = 100
    """Steps between checkpoints; 0 only when interrupted."""
    keep_checkpoints: Count = 2
    """Checkpoints kept, besides the best."""
    log_every: Many = 10
    """Steps between rows of the metrics."""
    track: list[str] = Field(default_factory=list)
    """Trackers of accelerate: tensorboard, wandb, ..."""


@dataclass(config=strict, kw_only=True)
class Bench(Common, Timed, Drawing, Data):
    """`drm bench`."""

    reward: str = ""
    """The scorer that is measured, or none; a reward model's folder or hub id, a name such as pickscore, NAME=FOLDER,
    `module:function` or a server's URL. Empty: the preset's."""
    scorers: list[str] = Field(default_factory=list)
    """Other scorers of the same pairs; each as --reward has it."""
    against: str | None = None
    """One more scorer, for a paired test; as --reward has it."""
    dataset: str = "shapes"
    """Pairs or rankings, or what a generator shall draw; names or files, several with commas between; geneval, shapes-prompts or a file
    of prompts measure a generator."""
    calibration_split: str | None = None
    """Split that tie thresholds are chosen on; for protocols that need one, validation_unique of pickapic; None leaves them out."""
    split: str | None = None
    """Split of the dataset; None is the one that is benched: test, and test_unique of pickapic."""
    sigmas: list[Sigma] = Field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 0.9], min_length=1, max_length=1000)
    """Sigmas to score at; 0 clean to 1 pure noise. The first gives the accuracy that is reported first."""
    noise_samples: Annotated[int, Field(gt=0, le=10_000)] = 1
    """Noise draws an image, averaged."""
    shared_noise: bool = False
    """The pictures of a prompt share their noise: easier at high sigmas than what a sampler's candidates are."""
    pairs: Many | None = None
    """Pairs to evaluate, whole prompts in the data's order; None is all."""
    batch_size: Count = 64
    """Images scored at once."""
    fail_under: Annotated[float, Field(ge=0, le=100)] | None = None
    """Accuracy, percent, under which the exit code is 1."""
    lora: str | None = None
    """A LoRA, or its run, to compare with the generator; with prompts as the dataset."""
    prompts: Count | None = None
    """Prompts to draw, the first of the file; None is all (96 of shapes-prompts)."""
    num_images: Annotated[int, Field(gt=0, le=100_000)] = 4
    """Pictures a prompt, with the seeds seed, seed + 1, ..."""
    steps: SamplingSteps | None = None
    """Steps from noise to picture; None is the preset's for sampling."""
    guidance_scale: Guidance | None = None
    """Guidance of the pictures; None is the preset's for sampling."""
    images: str | None = None
    """geneval: a folder of pictures to evaluate; in GenEval's layout, in place of drawing."""
    detector: str = "facebook/mask2former-swin-small-coco-instance"
    """geneval: Mask2Former by folder or hub id; shapes is the embedded world's own."""
    color_model: str = "openai/clip-vit-large-patch14"
    """geneval: CLIP that tells colours, by folder or hub id."""


@dataclass(config=strict, kw_only=True)
class Score(Common, Timed):
    """`drm score`."""

    reward: str = ""
    """The scorer; a reward model's folder or hub id, a name such as pickscore, NAME=FOLDER, `module:function` or a server's URL.
    Empty: the preset's."""
    images: list[str] = Field(default_factory=list)
    """Pictures, or latents saved as .safetensors."""
    prompts: list[str] = Field(default_factory=list)
    """A prompt an image, or one for all."""
    sigmas: list[Sigma] = Field(default_factory=lambda: [0.25], min_length=1, max_length=1000)
    """Sigmas to score at; 0 clean to 1 pure noise."""
    noise_samples: Annotated[int, Field(gt=0, le=10_000)] = 4
    """Noise draws an image, averaged."""
    batch_size: Count = 64
    """Images scored at once."""


@dataclass(config=strict, kw_only=True)
class Sample(Common, Timed, Drawing):
    """`drm sample`."""

    reward: str = ""
    """The scorer that chooses, or none; a reward model's folder or hub id, a name such as pickscore, NAME=FOLDER, `module:function` or a
    server's URL, with =WEIGHT or without. Empty: the preset's, and none where it has none and --mode is plain."""
    add_rewards: list[str] = Field(default_factory=list)
    """More scorers, combined with the first; as a repeated --reward gives them."""
    combine: Literal["sum", "mean", "min", "mean-std"] = "sum"
    """Several scorers as one: weighted sum, mean, the least of them, or the mean less their spread."""
    prompts: list[str] = Field(default_factory=list)
    """What to draw."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    num_images: Annotated[int, Field(gt=0, le=100_000)] = 1
    """Pictures a prompt, with the seeds seed, seed + 1, ..."""
    mode: Literal["plain", "best-of-n", "stepwise", "beam", "halving", "smc", "auto"] = "plain"
    """How the scorer is used; auto is the method that was measured as the best within --budget."""
    budget: Above | None = None
    """Of auto: forward passes that a picture may cost; a reward model's call counts by its share of the generator's blocks."""
    methods: str | None = None
    """Of auto: methods.yaml of a --tune run; None is the preset's."""
    tune: str | None = None
    """Measure methods on this file of prompts; in place of drawing pictures, writes methods.yaml."""
    judge: str = "none"
    """Of tune: an independent scorer that ranks the methods; none is the reward itself."""
    beams: Annotated[int, Field(gt=0, le=100_000)] | None = None
    """Candidates of a trajectory at each step; of stepwise and beam. None is 4."""
    starts: Annotated[int, Field(gt=0, le=100_000)] | None = None
    """Trajectories that a picture starts with; of best-of-n, halving, smc and beam. None is 4, and of beam what is kept."""
    keep: Annotated[int, Field(gt=0, le=100_000)] = 2
    """Trajectories that beam keeps."""
    first_cut: Sigma | None = None
    """Of beam: sigma at which the starts are cut to those kept, and before which there are no candidates; None is at once."""
    halving_sigmas: list[Sigma] = Field(default_factory=lambda: [0.9, 0.75, 0.5], min_length=1, max_length=1000)
    """Of halving: sigmas at which the worse half is dropped."""
    share_first: bool = False
    """All starts share the first forward pass; with cps and --noise-level 1 nothing is lost."""
    refine: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Times the best end is noised and sampled again; kept where it scores better."""
    refine_sigma: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Sigma that a refinement begins at."""
    refine_beams: Annotated[int, Field(gt=0, le=100_000)] = 1
    """Candidates a step of a refinement, at sigmas above 0.5."""
    steps: SamplingSteps = 10
    """Steps from noise to picture."""
    guidance_scale: Guidance = 1.0
    """Classifier-free guidance; 1 is without."""
    true_cfg_scale: Guidance = 1.0
    """Of FLUX.1, whose guidance_scale is an input: a second pass with the negative prompt on top; 1 is none."""
    step_rule: Literal["ode", "flow-sde", "dance-sde", "cps"] | None = None
    """Step; None is cps where the mode needs noise, else ode."""
    noise_level: Annotated[float, Field(ge=0, le=2)] = 0.9
    """Noise that a step adds; a of flow-sde and cps, eta of dance-sde."""
    branch_sigmas: list[Sigma] = Field(default_factory=lambda: [0.0, 1.0], min_length=2, max_length=2)
    """Steps that start at a sigma within make several candidates."""
    branch_steps: list[Layer] | None = None
    """First and last step, counted from 0, that make several candidates."""
    score_at: Literal["noisy", "clean"] = "noisy"
    """Score candidates at their own sigma, or their predicted clean latents."""
    correct_noise: bool = False
    """Score what an SDE step leaves at the sigma that it really has."""
    share_score: bool = False
    """Compute the blocks that reward model and generator share once; needs a reward model with a frozen backbone."""
    temperature: Above = 1.0
    """Of smc."""
    lora: str | None = None
    """LoRA of the transformer, as diffusers saves it."""
    height: Pixels | None = None
    """Pixels; None is the generator's own."""
    width: Pixels | None = None
    """Pixels; None is the generator's own."""
    max_pixels: Many = 4_194_304
    """Largest picture, pixels."""
    batch_size: Count = 8
    """Pictures drawn at once."""
    max_batch: Count = 64
    """Latents in one forward pass; halved when memory does not suffice."""
    trace: bool = False
    """Draw the tree of candidates; costs a forward pass more for each of them."""

    @property
    def chooses(self) -> str:
        """The flag of what needs a scorer to choose by; empty where pictures are drawn plainly."""
        ways = ((self.tune, "--tune"), (self.refine, "--refine"), (self.mode != "plain", f"--mode {self.mode}"))
        return next((flag for asked, flag in ways if asked), "")


@dataclass(config=strict, kw_only=True)
class Demo:
    """`drm demo`."""

    out: str | None = None
    """Run folder; None is runs/demo."""
    seed: Seed = 0
    """Seed of everything random."""
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu."""
    steps: Many = 220
    """Training steps of each of the two reward models."""
    updates: Many = 20
    """Updates of the alignment."""
    resume: bool = True
    """Go on with an unfinished demo in the same folder."""
    overwrite: bool = False
    """Empty the run folder first."""
