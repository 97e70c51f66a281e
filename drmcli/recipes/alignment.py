"""What an alignment is made of, put together from its config: policy, rewards, judge, algorithm, optimizer, tables and checkpoints."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch import Tensor

from drmcli.algorithms import Algorithm, Direct, Groups, Nft, Prompts, StateReward
from drmcli.config import Grpo, package_path
from drmcli.data.prompts import PROMPT_SETS
from drmcli.data.prompts import read_prompts as read_prompt_file
from drmcli.embeddings import Embeddings
from drmcli.errors import InputError
from drmcli.evaluation import Judge
from drmcli.families.base import Family
from drmcli.fitting import MAX_BATCH, SMALLER, Batch
from drmcli.generator import Generator, PromptEmbeds, pick_device, pick_dtype
from drmcli.kernels import Kernels, check_trainable
from drmcli.policy import Policy
from drmcli.quantize import refuse_learning
from drmcli.recipes.checkpoints import Checkpoints, load_optimizer, optimizer_tensors
from drmcli.refresh import Memory
from drmcli.results import Parts
from drmcli.rollout import Plan, Share
from drmcli.run import Run, seed_of
from drmcli.scorers import parse_term
from drmcli.scorers.combine import Rewards

PRECISION = {"no": torch.float32, "bf16": torch.bfloat16}


@dataclass
class State:
    """How far a run is: all that a checkpoint holds beside tensors."""

    update: int = 0
    spent: float = 0.0
    """Seconds of training with its evaluations, over all starts of the run."""
    learning: float = 0.0
    """Seconds of drawing and learning alone."""
    calls: list[int] = field(default_factory=lambda: [0, 0])
    """States that went through the generator to draw, and through the reward models."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """A row an evaluation on validation prompts."""
    stopped: str | None = None
    """Why the run ends early."""
    refreshes: int = 0
    """How often the reward models have learned on."""
    best_judge: np.ndarray | None = None
    """[B] the judge's scores at the best point."""
    memory: Memory = field(default_factory=lambda: Memory(0))
    """Samples that the reward models learned from."""

    def best(self, measure: str) -> dict[str, Any]:
        """The best evaluation by `judge` or `reward`."""
        return max(self.history, key=lambda row: row[measure])


@dataclass
class Tables:
    metrics: Parts
    rollouts: Parts
    evals: Parts

    @classmethod
    def of(cls, run: Run) -> Tables:
        names = {"metrics": "grpo_metrics", "rollouts": "rollouts", "evals": "grpo_evals"}
        return cls(**{key: Parts(run.folder / key, name, run.id) for key, name in names.items()})


@dataclass
class Alignment:
    """Everything a run holds but its state."""

    config: Grpo
    accelerator: Accelerator
    run: Run
    prompts: dict[str, list[str]]
    """Of train, val and test, disjoint by text."""
    policy: Policy
    rewards: Rewards
    reward: StateReward
    embeddings: Embeddings
    judge: Judge
    trusted: Judge
    """Labels samples for the reward models to learn on from."""
    algorithm: Algorithm
    optimizer: torch.optim.Optimizer
    share: Share
    batch: Batch
    """Latents that are drawn or scored at once."""
    shape: tuple[int, int, int]
    """Of a latent, [C, H, W]."""
    tables: Tables
    checkpoints: Checkpoints

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def measure(self) -> str:
        """What the best point is chosen by."""
        return "judge" if self.judge else "reward"

    def cond(self, texts: list[str]) -> tuple[PromptEmbeds, list[PromptEmbeds]]:
        """Conditioning for the generator and for each reward model."""
        own, *others = self.embeddings(texts)
        return own, others

    def pick(self, update: int) -> tuple[list[str], Prompts]:
        """The prompts of an update: of all processes, and this process's share with its seeds."""
        config, train = self.config, self.prompts["train"]
        rng = np.random.default_rng(seed_of("prompts", config.seed, update))
        count = config.prompts_per_update
        texts = [train[i] for i in rng.choice(len(train), count, replace=len(train) < count)]
        seeds = [seed_of("rollout", config.seed, update, i) for i in range(count)]
        each = count // self.accelerator.num_processes
        mine = slice(self.share.rank * each, (self.share.rank + 1) * each)
        return texts, Prompts(texts[mine], seeds[mine], *self.cond(texts[mine]))


def check_config(config: Grpo) -> None:
    """Raises InputError for settings that no run would take, before anything is loaded."""
    if pick_dtype(config.dtype, pick_device(config.device)) == torch.float16:
        raise InputError(
            "--dtype fp16: small gradients of the policy vanish in it, and drm grpo does not scale them",
            hint="use --dtype bf16 or fp32",
        )
    check_trainable(config.attention)
    if config.train == "full":
        refuse_learning(config.quantize, "--train full")
    if bool(config.refresh_every) != bool(config.refresh_by):
        raise InputError(
            "--refresh-every: needs a scorer by --refresh-by, and the other way round",
            hint="for example --refresh-every 10 --refresh-by pickscore",
        )
    if config.refresh_every and config.judge == "none":
        raise InputError(
            "--refresh-every: rewards before and after a refresh cannot be compared, so the best policy needs a judge",
            hint="give --judge",
        )
    if config.algorithm == "direct" and config.diversity_bonus:
        raise InputError("--diversity-bonus: not of --algorithm direct", hint="use another --algorithm")


def assemble(config: Grpo, accelerator: Accelerator, run: Run) -> Alignment:
    """Load the models and put the parts together. Raises InputError for parts that do not fit."""
    device, frozen = accelerator.device, PRECISION[accelerator.mixed_precision]
    prompts = read_prompts(config)
    generator = Generator.load(
        config.generator,
        revision=config.revision,
        device=device,
        dtype=frozen,
        text_encoder_3=config.text_encoder_3,
        max_sequence_length=config.max_sequence_length,
        kernels=Kernels.of(config, device),
        vae_tiling=config.vae_tiling,
    )
    rewards = load_rewards(config, generator, device, frozen)
    for text in rewards.share_encoders(generator):
        run.warn(text)
    judge = Judge(config.judge, device, frozen, kernels=Kernels.of(config, device))
    if judge.scorer is not None:
        for split in ("val", "test"):
            judge.scorer.check_prompts(prompts[split][: config.eval_prompts])
    policy = Policy(
        generator,
        lora=lora_config(config, generator.family) if config.train == "lora" else None,
        seed=seed_of("lora", config.seed),
        guidance_scale=config.guidance_scale,
        ema_decay=config.ema_decay,
        keep_reference=config.kl_beta > 0,
        keep_old=config.algorithm.startswith("nft"),
        gradient_checkpointing=config.gradient_checkpointing,
    )

    def encode(text: str) -> list[PromptEmbeds]:
        own = generator.encode_prompts([text])
        return [own, *rewards.encode([text], own, generator)]

    side = config.resolution or generator.image_size
    shape = generator.latent_shape(side, side)
    share = Share(accelerator.process_index, accelerator.gather)
    reward = StateReward(policy, rewards, predicted=config.score_at == "clean")
    batch = Batch(config.max_batch, "latents", flag=MAX_BATCH, hint=SMALLER)
    tables = Tables.of(run)
    if config.track and accelerator.is_main_process:
        accelerator.init_trackers("drm-grpo")
    return Alignment(
        config=config,
        accelerator=accelerator,
        run=run,
        prompts=prompts,
        policy=policy,
        rewards=rewards,
        reward=reward,
        embeddings=Embeddings(encode, device),
        judge=judge,
        trusted=load_trusted(config, rewards, device, frozen),
        algorithm=make_algorithm(config, accelerator, policy, reward, shape, share, batch),
        optimizer=torch.optim.AdamW(policy.trained, lr=config.lr, weight_decay=config.weight_decay, fused=True),
        share=share,
        batch=batch,
        shape=shape,
        tables=tables,
        checkpoints=Checkpoints(run, list(vars(tables).values()), config.keep_checkpoints),
    )


def load_rewards(config: Grpo, generator: Generator, device: torch.device, dtype: torch.dtype) -> Rewards:
    """The rewards that are asked for. Raises InputError where they cannot judge latents of so many channels, or have no spread to
    penalise."""
    rewards = Rewards(
        [parse_term(config.reward), *(parse_term(text, "--add-reward") for text in config.add_rewards)],
        device=device,
        dtype=dtype,
        kernels=Kernels.of(config, device),
        draws=config.reward_draws,
        spread_penalty=config.spread_penalty,
        ceiling=config.reward_ceiling,
        beside=generator if config.train == "lora" else None,  # all weights trained: those of the reward must stay
    )
    rewards.check_latents(generator)
    if config.spread_penalty and len(rewards.states) * config.reward_draws < 2:
        raise InputError(
            "--spread-penalty: one reward model with one draw has no spread",
            hint="add a reward model by a second --reward, or --set reward_draws=4",
        )
    return rewards


def load_trusted(config: Grpo, rewards: Rewards, device: torch.device, dtype: torch.dtype) -> Judge:
    """The scorer of `refresh_by`. Raises InputError for options that do not fit each other."""
    if config.refresh_every and not rewards.models:
        raise InputError("--refresh-every: there is no reward model that could learn on", hint="leave it away")
    return Judge(config.refresh_by or "none", device, dtype, "--refresh-by", Kernels.of(config, device))


def make_algorithm(
    config: Grpo,
    accelerator: Accelerator,
    policy: Policy,
    reward: StateReward,
    shape: tuple[int, int, int],
    share: Share,
    batch: Batch,
) -> Algorithm:
    """The algorithm by its name. batch: latents that are drawn or scored at once."""
    common: dict[str, Any] = {
        "shape": shape,
        "micro_batch_size": config.micro_batch_size,
        "autocast": accelerator.autocast,
    }
    window = (config.window[0], config.window[1])
    if config.algorithm == "direct":
        return Direct(
            policy, reward, form=config.direct_form, steps=config.direct_steps, num_inference_steps=config.steps,
            group_size=config.group_size, window=window, kl_beta=config.kl_beta, seed=config.seed, **common,
        )  # fmt: skip
    common |= {"max_batch": batch, "share": share}
    if config.algorithm.startswith("nft"):
        return Nft(
            policy, reward, stepwise=config.algorithm == "nft-step", num_inference_steps=config.steps, group_size=config.group_size,
            levels=config.nft_levels, window=window, beta=config.nft_beta, advantage_clip=config.advantage_clip,
            kl_beta=config.kl_beta, min_std=config.min_std, global_std=config.global_std,
            diversity_bonus=config.diversity_bonus, seed=config.seed, **common,
        )  # fmt: skip
    names = ("clip_range", "advantage_clip", "log_prob", "noise_weight", "kl_beta", "kl_form")
    loss = {name: getattr(config, name) for name in names}
    return Groups(policy, reward, rollout_plan(config), loss, **common)


def rollout_plan(config: Grpo) -> Plan:
    """How trajectories with groups are made."""
    return Plan(
        algorithm=config.algorithm,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
        step_rule=config.step_rule,
        noise_level=config.noise_level,
        group_size=config.group_size,
        window=(config.window[0], config.window[1]),
        follow=config.follow,
        min_std=config.min_std,
        global_std=config.global_std,
        diversity_bonus=config.diversity_bonus,
    )


def read_prompts(config: Grpo) -> dict[str, list[str]]:
    """Prompts of train, val and test, disjoint by text."""
    if config.prompts in PROMPT_SETS:
        return PROMPT_SETS[config.prompts]()
    lines = read_prompt_file(package_path(config.prompts))
    texts = sorted(set(lines), key=lambda t: hashlib.sha256(t.encode()).digest())
    if len(texts) < 10:
        raise InputError(f"--prompts {config.prompts}: {len(texts)} prompts", hint="give 10 or more: some are held out")
    tenth = max(1, len(texts) // 10)
    return {"val": texts[:tenth], "test": texts[tenth : 2 * tenth], "train": texts[2 * tenth :]}


def lora_config(config: Grpo, family: Family) -> LoraConfig:
    """The LoRA that is asked for."""
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=config.lora_targets or list(family.lora_targets),
    )


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save(a: Alignment, state: State) -> None:
    """A complete checkpoint, by the main process; the others wait for it."""
    if a.main:
        tensors: dict[str, Tensor] = a.policy.tensors() | optimizer_tensors(a.optimizer, a.policy.trained)
        values = {k: v for k, v in vars(state).items() if k not in ("update", "best_judge", "memory")}
        tensors |= state.memory.tensors()
        if a.policy.ema is not None:
            values["ema_step"] = a.policy.ema.optimization_step
        if state.refreshes:
            tensors |= heads(a.rewards)
        if state.best_judge is not None:
            tensors["best_judge"] = torch.from_numpy(np.asarray(state.best_judge, dtype=np.float64))
        a.checkpoints.save(state.update, tensors, values)
    a.accelerator.wait_for_everyone()


def heads(rewards: Rewards) -> dict[str, Tensor]:
    """The heads' own tensors of all reward models, by name."""
    return {
        f"head.{i}.{name}": tensor
        for i, model in enumerate(rewards.models)
        for name, tensor in model.head.state_dict().items()
    }


def resume(a: Alignment) -> State:
    """The state of the newest undamaged checkpoint, with the weights put back; a fresh one where there is none."""
    memory = Memory(a.config.refresh_memory)
    found = a.checkpoints.newest()
    if found is None:
        return State(memory=memory)
    values, tensors = found.state(), found.tensors()
    a.policy.load_tensors(tensors, values.pop("ema_step", 0))
    load_optimizer(a.optimizer, a.policy.trained, tensors)
    if values.get("refreshes"):
        with torch.no_grad():
            for name, tensor in heads(a.rewards).items():
                tensor.copy_(tensors[name])
    memory.load(tensors)
    a.run.note(f"went on from update {found.step}")
    best = tensors["best_judge"].numpy() if a.judge else None
    return State(update=found.step, best_judge=best, memory=memory, **values)
