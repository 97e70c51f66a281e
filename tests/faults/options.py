"""Numbers and names beyond what anything takes: told with the flag, before anything is counted, allocated or loaded."""

# ruff: noqa: E501, a row stays on a line

from __future__ import annotations

from pathlib import Path

from faults import fault

DRAW = "sample x --reward none --dry-run "
TRAIN = "train-reward --dry-run "
GRPO = "grpo --dry-run "
BENCH = "bench --dry-run "


def latents(shape: list[int], sigma: str | None = None):
    """Writes a.safetensors."""

    def make(folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        save_file(
            {"latents": torch.zeros(shape)}, folder / "a.safetensors", None if sigma is None else {"sigma": sigma}
        )

    return make


BOUNDS = [
    (DRAW + "--seed 1180591620717411303424", "--seed: must be less than"),
    (DRAW + "--seed -1", "--seed: must be greater than or equal to 0, got -1"),
    (DRAW + "--steps 9999999999999999999999999999999999999999", "--steps: "),
    (DRAW + "--steps 0", "--steps: must be greater than 0, got 0"),
    (DRAW + "--steps 1000000000", "--steps: must be less than or equal to 10000"),
    (DRAW + "--num-images 1000000000", "--num-images: must be less than"),
    (DRAW + "--beams 1000000000", "--beams: must be less than"),
    (DRAW + "--keep 0", "--keep: "),
    (DRAW + "--batch-size 0", "--batch-size: "),
    (DRAW + "--height 1000000", "--height: must be less than"),
    (DRAW + "--guidance-scale nan", "--guidance-scale: "),
    (DRAW + "--guidance-scale inf", "--guidance-scale: "),
    (DRAW + "--noise-level 3", "--noise-level: "),
    (DRAW + "--set temperature=.inf", "--set temperature: must be a finite number"),
    (DRAW + "--set temperature=0", "--set temperature: must be greater than 0"),
    (DRAW + "--set steps=1:30", "--set steps: must be a valid integer.*'1:30'"),
    (DRAW + "--set steps=true", "--set steps: True is no value"),
    (DRAW + "--set steps=1.5", "--set steps: must be a valid integer"),
    (DRAW + "--set steps=", "--set steps: must be a valid integer.*got None"),
    (DRAW + "--set steps=[1]", "--set steps: must be a valid integer"),
    (DRAW + "--set trace=maybe", "--set trace: must be a valid boolean"),
    (DRAW + "--set mode=no", "--set mode: must be 'plain'"),
    (DRAW + "--set max_sequence_length=100000", "--set max_sequence_length: "),
    (DRAW + "--mode fast", "--mode: must be 'plain'"),
    (TRAIN + "--set eval_sigmas=[]", "--set eval_sigmas: .*at least 1 item"),
    (TRAIN + "--set eval_sigmas=[0.5,1.5]", "--set eval_sigmas: entry 2 must be less than or equal to 1, got 1.5"),
    (TRAIN + "--set eval_sigmas=[.nan]", "--set eval_sigmas: entry 1 must be"),
    (TRAIN + "--set eval_sigmas=[true]", "--set eval_sigmas: "),
    (TRAIN + "--set head_width=1000000", "--set head_width: must be less than"),
    (TRAIN + "--set lora_rank=10000000", "--set lora_rank: must be less than"),
    (TRAIN + "--set tap_layers=[]", "--set tap_layers: .*at least 1 item"),
    (TRAIN + "--set tap_layers=[-1]", "--set tap_layers: entry 1 must be"),
    (TRAIN + "--set lr=nan", "--set lr: "),
    (TRAIN + "--set lr=.nan", "--set lr: "),
    (TRAIN + "--set lr=-1", "--set lr: must be greater than or equal to 0"),
    (TRAIN + "--set margin=.inf", "--set margin: must be a finite number"),
    (TRAIN + "--set logit_std=0", "--set logit_std: "),
    (TRAIN + "--set data=[]", "--set data: .*at least 1 item"),
    (TRAIN + "--set max_bad=101", "--set max_bad: "),
    (TRAIN + "--set seed=1e3000", "--set seed: "),
    (TRAIN + "--steps 9999999999", "--steps: must be less than"),
    (GRPO + "--set group_size=1", "--set group_size: must be greater than or equal to 2"),
    (GRPO + "--set group_size=1000000", "--set group_size: must be less than"),
    (GRPO + "--set lora_targets=[]", "--set lora_targets: .*at least 1 item"),
    (GRPO + "--set window=[0.5]", "--set window: .*at least 2 items"),
    (GRPO + "--set clip_range=0", "--set clip_range: "),
    (GRPO + "--set reward_draws=1000000", "--set reward_draws: "),
    (GRPO + "--set max_time=0", "--set max_time: "),
    (BENCH + "--sigma nan", "--sigma: "),
    (BENCH + "--sigma -0.1", "--sigma: "),
    (BENCH + "--set sigmas=[]", "--set sigmas: .*at least 1 item"),
    (BENCH + "--set noise_samples=1000000000", "--set noise_samples: "),
    (BENCH + "--resolution 1000000", "--resolution: must be less than"),
    (BENCH + "--fail-under 101", "--fail-under: "),
    (BENCH + "--pairs 0", "--pairs: "),
    (BENCH + "--preset no-such-preset", "--preset: there is no preset"),
]

FAULTS = [
    *(fault(f"bound {command.partition('--dry-run ')[2]}" + f" of {command.split()[0]}", command, 2, says) for command, says in BOUNDS),
    fault("a product of pictures", "sample --prompts p.txt --num-images 100000 --reward none --dry-run", 2,
          r"--num-images 100000: of 11 prompts are 1,100,000 pictures, above 1,000,000", {"p.txt": "a cat\n" * 11}),
    fault("a product of pictures that is drawn", "sample --prompts p.txt --num-images 100000 --reward none --out o", 2,
          "--num-images 100000: of 11 prompts", {"p.txt": "a cat\n" * 11}),
    fault("file names key", "bench --dry-run --config c.yaml", 2, "--config c.yaml: batch_size must be greater than 0, got 0", {"c.yaml": "batch_size: 0\n"}),
    fault("leading zeros are decimal", DRAW + "--set seed=010", 0, "seed: 10\n"),
    fault("hexadecimal", DRAW + "--set seed=0x10", 0, "seed: 16\n"),
    fault("exponent", TRAIN + "--set lr=1e-4", 0, "lr: 0.0001"),
    fault("yes is true", DRAW + "--set trace=yes", 0, "trace: true"),
    fault("off is false", DRAW + "--set text_encoder_3=off", 0, "text_encoder_3: false"),
    fault("no is a name", DRAW + "--out no", 0, "out: 'no'"),
    fault("a date is a name", DRAW + "--set out=2024-01-01", 0, "out: '2024-01-01'"),
    fault("latents without size", "score a.safetensors --prompt x", 2, "`latents` must be finite", make=latents([4, 0, 0])),
    fault("latents of sigma nan", "score a.safetensors --prompt x", 2, "sigma 'nan' is no noise level", make=latents([4, 8, 8], "nan")),
    fault("latents of sigma 5", "score a.safetensors --prompt x", 2, "sigma '5' is no noise level", make=latents([4, 8, 8], "5")),
    fault("latents of sigma text", "score a.safetensors --prompt x", 2, "sigma 'high' is no noise level", make=latents([4, 8, 8], "high")),
    fault("latents of five axes", "score a.safetensors --prompt x", 2, "of shape", make=latents([1, 1, 4, 8, 8])),
]  # fmt: skip
