"""Summaries as tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from drmcli.cli.output import plain, stdout
from drmcli.cli.tables import Table
from drmcli.config import spoken


def table(title: str, *columns: str) -> Table:
    """A table, its title printed above it."""
    stdout().print(plain(title) if not title.startswith("\n") else "\n" + plain(title), style="bold")
    return Table(list(map(plain, columns)))


def plan(command: str, config_yaml: str, values: dict[str, Any]) -> None:
    console = stdout()
    console.print(f"config of drm {command}", style="bold")
    console.print(config_yaml)
    console.print("plan (nothing was written)", style="bold")
    for key, value in values.items():
        if key not in ("memory", "experiments") and not (key == "hours" and isinstance(value, dict)):
            console.print(f"  {key}: {value}")
    memory = values.get("memory")
    if memory and "passes" in memory:
        footprint(memory)
    elif memory:
        made = table("\nmemory of a step", "", "GiB")
        made.add_row(f"weights ({memory['parameters'] / 1e6:,.1f} M parameters)", gib(memory["weights"]))
        made.add_row(f"gradients ({memory['trained'] / 1e6:,.1f} M trained)", gib(memory["gradients"]))
        made.add_row("AdamW moments", gib(memory["optimizer"]))
        if memory["ema"]:
            made.add_row("moving average", gib(memory["ema"]))
        made.add_row("activations", gib(memory["activations"]))
        made.add_row("activations with --set gradient_checkpointing=true", gib(memory["activations_checkpointed"]))
        for name, size in memory.get("beside", {}).items():
            made.add_row(f"beside it: {name}", gib(size))
        made.add_row("total", gib(memory["total"]), style="bold")
        made.add_row("total with gradient checkpointing", gib(memory["total_checkpointed"]), style="bold")
        if "drawing" in memory:
            made.add_row("total while drawing, scoring and decoding", gib(memory["total_drawing"]), style="bold")
        console.print(made)
    if isinstance(values.get("hours"), dict):
        timetable(values["hours"])
    if "experiments" in values:
        experiments(values["experiments"])


def experiments(rows: list[dict[str, Any]]) -> None:
    """Kinds of experiments: how many, GPU memory as the preset is set, hours of all."""
    made = table("\nexperiments", "", "runs", "GiB", "hours")
    for row in rows:
        size, hours = row["memory"], row["hours"]
        told = row.get("lacks") or ("not timed" if hours is None else f"{hours:.3g}")
        made.add_row(row["experiment"], str(row["times"]), "" if size is None else gib(size), told)
    stdout().print(made)


def timetable(found: dict[str, Any]) -> None:
    """Hours by kind of work."""
    made = table(f"\nhours, timed on {found['timed_on']}", "", "count", "seconds each", "hours")
    for row in found["rows"]:
        made.add_row(row["what"], f"{row['count']:,}", f"{row['seconds_each']:.3g}", f"{row['hours']:.3g}")
    made.add_row("total", "", "", f"{found['total']:.3g}", style="bold")
    stdout().print(made)
    if "not_timed" in found:
        stdout().print(f"not timed: {', '.join(found['not_timed'])}")


def footprint(memory: dict[str, Any]) -> None:
    """Memory of a command that trains nothing."""
    made = table("\nmemory", "", "GiB")
    for name, size in memory["models"].items():
        made.add_row(f"weights: {name}", gib(size))
    for name, size in memory["passes"].items():
        made.add_row(f"one pass: {name}", gib(size))
    made.add_row("total, at the pass that needs most", gib(memory["total"]), style="bold")
    stdout().print(made)


def gib(size: float) -> str:
    value = size / 2**30
    return f"{value:.1f}" if value >= 1 else f"{value:.3f}" if value >= 0.01 else f"{value:.5f}"


def train_reward(s: dict[str, Any]) -> None:
    console = stdout()
    made = table(f"reward model after {s['steps']} steps, {s['eval_pairs']} held-out pairs", "sigma", "accuracy")
    for row in s["eval_by_sigma"]:
        mark = " *" if row["sigma"] == s["eval_sigma"] else ""
        made.add_row(f"{row['sigma']:g}{mark}", percent(row["accuracy"]))
    console.print(made)
    console.print(f"{s['train_pairs']} training pairs, {s['seconds']:.0f} s on {s['device']}")
    console.print(f"reward model: {s['reward']}")


def span(ci95: list[float | None], form: str) -> str:
    """An interval in words; a dash where there is none, as of a single pair."""
    low, high = ci95
    return "-" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def pictures(run: str, *names: str) -> str:
    """Where a run's pictures lie, those that there are, a line each."""
    return "".join(f"\npicture: {path}" for name in names if (path := Path(run) / f"{name}.png").is_file())


def number(value: float | None, form: str = ".3f") -> str:
    """A number in words; a dash where there is none, as of the diversity of single pictures."""
    return "-" if value is None else f"{value:{form}}"


def percent(value: float | None, form: str = ".1f") -> str:
    """A share in words; a dash where there is none, as of pairs that are all ties."""
    return "-" if value is None else f"{value:{form}} %"


def geneval(s: dict[str, Any]) -> None:
    console = stdout()
    made = table(
        f"GenEval: overall {s['overall']:.1f} %, the mean over tasks",
        "task",
        "pictures",
        "right",
        "accuracy",
        "95 % interval",
    )
    for row in s["tasks"]:
        made.add_row(
            row["task"], str(row["n"]), str(row["correct"]), percent(row["accuracy"]), span(row["ci95"], ".1f")
        )
    console.print(made)
    if s["tasks_left_out"]:
        console.print(f"not asked: {', '.join(s['tasks_left_out'])}")
    console.print(
        f"{s['n_prompts']} prompts, {s['n_images']} pictures: {s['correct_images']:.1f} % of pictures are right,"
        f" {s['correct_prompts']:.1f} % of prompts have a right one; detector {s['detector']}"
    )
    console.print(f"{s['seconds']:.0f} s on {s['device']}; tables and pictures: {s['run']}")


def generator(s: dict[str, Any]) -> None:
    console = stdout()
    title = f"{s['n_prompts']} prompts, {s['n_images']} pictures" + (
        f", before and after {spoken(s['lora'])}" if s["lora"] else ""
    )
    after = ("after", "difference", "95 % interval", "wins") if s["lora"] else ()
    made = table(title, "", "mean" if not s["lora"] else "before", *after)
    for row in s["scorers"]:
        cells = [f"{row['before']:.3f}"]
        if s["lora"]:
            cells += [
                f"{row['after']:.3f}",
                f"{row['difference']:+.3f}",
                span(row["difference_ci95"], "+.3f"),
                f"{row['win_rate']:.0f} %",
            ]
        made.add_row(spoken(row["scorer"]), *cells)
    if s["diversity"]["before"] is not None:
        made.add_row("diversity", *(f"{value:.3f}" for value in s["diversity"].values()), *([""] * (len(after) - 1)))
    console.print(made)
    console.print(f"diversity: {s['diversity_kind']}")
    console.print(f"{s['seconds']:.0f} s on {s['device']}; pictures side by side: {s['grid']}")


def bench(s: dict[str, Any]) -> None:
    from drmcli.plots import text_plot

    console = stdout()
    if "datasets" in s:
        names = [part["dataset"] for part in s["datasets"]]
        made = table("accuracy by each dataset's own protocol, 95 % interval", "", *names)
        for row in s["table"]:
            cells = [f"{percent(row[n]['accuracy'], '.2f')} ({span(row[n]['ci95'], '.1f')})" for n in names]
            made.add_row(spoken(row["scorer"]), *cells)
        console.print(made)
        console.print(f"every protocol, breakdown and picture is in the folders of {s['run']}")
        return None
    if "tasks" in s:
        return geneval(s)
    if "diversity" in s:
        return generator(s)
    console = stdout()
    made = table(
        f"{s['dataset']} {s['split']}: {percent(s['accuracy'], '.2f')} at sigma {s['sigma']:g}",
        "protocol",
        "accuracy",
        "95 % interval",
        "",
    )
    for name, value in s["protocols"].items():
        made.add_row(
            name,
            percent(value, ".2f"),
            span(s["protocols_ci95"][name], ".1f"),
            "reference" if name == s["protocol"] else "",
        )
    console.print(made)
    console.print(
        f"{s['n_prompts']} prompts, {s['n_pairs']} pairs, {s['n_ties']} ties, {s['n_predicted_ties']} predicted ties,"
        f" {s['n_skipped']} pairs skipped, {s['n_images_scored']} pictures scored"
    )
    if len(s["scorers"]) > 1:
        made = table("\non the same pairs", "", "accuracy", "95 % interval", "less the first", "p", "pictures/s", "GiB")
        for i, row in enumerate(s["scorers"]):
            gap = ("", "")
            if i:
                p = "-" if row["p_value"] is None else f"{row['p_value']:.2g}"
                gap = (f"{number(row['difference'], '+.2f')} ({span(row['difference_ci95'], '+.1f')})", p)
            memory = "" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.1f}"
            made.add_row(
                f"{spoken(row['scorer'])} at {row['sigma']:g}", percent(row["accuracy"], ".2f"), span(row["ci95"], ".1f"), *gap,
                f"{row['images_per_second']:.0f}", memory,
            )  # fmt: skip
        console.print(made)
    for title, rows in s["breakdown"].items():
        made = table(f"\nby {title}", title, "pairs", "accuracy", "95 % interval")
        for row in rows[:20]:
            made.add_row(row["name"], str(row["n_pairs"]), percent(row["accuracy"], ".2f"), span(row["ci95"], ".1f"))
        console.print(made)
        if len(rows) > 20:
            console.print(f"... and {len(rows) - 20} more in summary.json")
    console.print(
        f"calibration: a score difference is off by {100 * s['calibration']['ece']:.1f} points of probability in the mean"
    )
    if s["published"]:
        shown = [row for row in s["published"] if row["comparable"] or row["model"] == "DRM"]
        title = f"\npublished figures: the paper's, and those known to be counted alike; summary.json has all {len(s['published'])}"
        made = table(title, "model", "accuracy", "counted as ours?", "source")
        for row in shown:
            same = "yes" if row["comparable"] else row["note"] or row["protocol"] or "not stated"
            made.add_row(row["model"], percent(row["accuracy"]), same, row["source"])
        console.print(made)
    if len(s["by_sigma"]) > 1:
        console.print("\naccuracy by sigma, from chance (50 %) to 100 %")
        console.print(text_plot(s["by_sigma"]))
    console.print(
        f"\n{s['seconds']:.0f} s on {s['device']}; tables: {s['run']}{pictures(s['run'], 'accuracy_by_noise', 'calibration')}"
    )


def score(s: dict[str, Any]) -> None:
    console = stdout()
    sigmas = list(dict.fromkeys(row["sigma"] for row in s["scores"]))
    made = table(
        "scores (higher is better; compare only within a prompt)", "image", *(f"sigma {x:g}" for x in sigmas), "prompt"
    )
    rows: dict[tuple[str, str], dict[float, float]] = {}
    for row in s["scores"]:
        rows.setdefault((row["image"], row["prompt"]), {})[row["sigma"]] = row["score"]
    for (image, prompt), values in rows.items():
        made.add_row(image, *(f"{values[x]:+.3f}" if x in values else "" for x in sigmas), prompt)
    console.print(made)
    console.print(f"{s['noise_samples']} noise draws a score; table: {s['run']}")


def methods(s: dict[str, Any]) -> None:
    console = stdout()
    judge = "the reward itself" if s["judge"] == "none" else spoken(s["judge"])
    made = table(
        f"ways to sample, judged by {judge}", "method", "cost", "judge", "95 % interval", "less", "difference", "95 %"
    )
    for row in sorted(s["methods"], key=lambda row: row["cost"]):
        beside = (
            (row["rival"], f"{row['difference']:+.4f}", _interval(row["difference_ci95"]))
            if "rival" in row
            else ("",) * 3
        )
        made.add_row(row["name"], f"{row['cost']:.1f}", f"{row['judge']:.4f}", _interval(row["judge_ci95"]), *beside)
    console.print(made)
    console.print("cost: forward passes of the generator a picture; less: the dearest best-of-N that costs no more")
    console.print(f"{s['seconds']:.0f} s on {s['device']}")


def _interval(ends: list[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"


def sample(s: dict[str, Any]) -> None:
    if "methods" in s:
        methods(s)
        return
    console = stdout()
    made = table(f"{s['mode']}, {s['steps']} steps of {s['step_rule']}", "picture", "score", "seed", "prompt")
    for row in s["images"][:24]:
        made.add_row(
            row["path"], "" if row["score"] is None else f"{row['score']:+.3f}", str(row["seed"]), row["prompt"]
        )
    console.print(made)
    if len(s["images"]) > 24:
        console.print(f"... and {len(s['images']) - 24} more")
    spread = "" if s["mean_spread"] is None else f", mean spread of a step's candidates {s['mean_spread']:.3f}"
    memory = "" if s["peak_memory_gib"] is None else f", peak memory {s['peak_memory_gib']:.1f} GiB"
    console.print(
        f"{s['cost']:.3g} forward passes a picture; {s['generator_calls']} calls of the generator,"
        f" {s['reward_calls']} of what chooses{spread}"
    )
    console.print(
        f"{s['images_per_second']:g} pictures/s, {s['seconds']:.0f} s on {s['device']}{memory}; grid: {s['grid']}",
    )
    if (traces := Path(s["run"]) / "traces").is_dir():
        console.print(f"trees of candidates: {traces}")


def grpo(s: dict[str, Any]) -> None:
    console = stdout()
    made = table(
        f"{s['algorithm']}, best of {s['updates']} updates is {s['best_update']}; test prompts, plain sampling",
        "",
        "before",
        "after",
        "95 % of the gain",
    )
    for name, title in (("reward", "reward"), ("judge", "judge")):
        if s[f"{name}_before"] is not None:
            gain = span(s[f"{name}_gain_ci95"], "+.3f")
            made.add_row(title, number(s[f"{name}_before"]), number(s[f"{name}_after"]), gain)
    made.add_row("diversity", number(s["diversity_before"]), number(s["diversity_after"]), "")
    console.print(made)
    if s["stopped"]:
        console.print(f"stopped: {s['stopped']}")
    console.print(
        f"{s['generator_calls']} calls of the generator, {s['reward_calls']} of the rewards;"
        f" {s['train_seconds']:.0f} s of training on {s['device']}"
    )
    made_what = f"LoRA: {s['lora']} (the last one: {s['lora_last']})" if s["lora"] else f"generator: {s['generator']}"
    console.print(made_what)
    console.print(f"tables: {s['run']}{pictures(s['run'], 'before_after', 'curve')}")


def demo(s: dict[str, Any]) -> None:
    console = stdout()
    made = table("the same budget, two starts: accuracy on held-out pairs", "sigma", "pre-trained", "random")
    for a, b in zip(s["pretrained"]["eval_by_sigma"], s["random"]["eval_by_sigma"]):
        made.add_row(f"{a['sigma']:g}", percent(a["accuracy"]), percent(b["accuracy"]))
    console.print(made)
    made = table("\nsampling with the reward model", "", "judge", "score", "cost")
    for mode, row in s["sample"].items():
        made.add_row(mode, f"{row['judge']:.3f}", f"{row['mean_score']:+.2f}", f"{row['cost']:.1f}")
    console.print(made)
    g = s["grpo"]
    made = table(f"\n{g['updates']} updates of Step-wise GRPO, plain sampling of other captions", "", "before", "after")
    for name in ("judge", "reward"):
        made.add_row(name, f"{g[f'{name}_before']:.3f}", f"{g[f'{name}_after']:.3f}")
    console.print(made)
    console.print(f"\nreport: {s['report']}   ({s['seconds']:.0f} s)")


def data_make(s: dict[str, Any]) -> None:
    console = stdout()
    made = table(f"{s['n_images']} pictures of {s['n_prompts']} prompts", "judge", "mean score")
    for name, value in s.get("mean_scores", {}).items():
        made.add_row(name, f"{value:.4f}")
    console.print(made)
    console.print(f"{s['n_pairs']} pairs, {s['n_ties']} of them ties; contact sheet: {s['sheet']}", markup=False)
    if s["n_pairs"] and s["label"] != ["people"]:
        console.print(
            "a good generator's own samples show no gross failures: keep other data in the mixture", markup=False
        )


def export(s: dict[str, Any], *, dry: bool = False) -> None:
    console = stdout()
    made = table(f"{s['kind']} of {s['run']}, base {spoken(s['base'])}", "file", "MB")
    for row in s["files"]:
        made.add_row(row["path"], f"{row['bytes'] / 1e6:,.3f}")
    made.add_row("all", f"{s['bytes'] / 1e6:,.3f}", style="bold")
    console.print(made)
    if s["to"]:
        console.print(f"folder: {s['to']}")
    if s["push"]:
        console.print(f"hub: {s.get('url', s['push'])}, {s['visibility']}")
    if dry:
        if s["push"]:
            console.print(f"token: {s['token']}")
        console.print("nothing was written")


def reproduce(s: dict[str, Any]) -> None:
    from drmcli.recipes.reproduce import cells

    console = stdout()
    for name in dict.fromkeys(row["table"] for row in s["tables"]):
        made = table(f"\n{name}", "", "figure", "published", "ours", "95 % interval", "counted")
        for row in s["tables"]:
            if row["table"] == name:
                made.add_row(*cells(row)[:6])
        console.print(made)
    for warning in dict.fromkeys(row["beware"] for row in s["tables"] if row["beware"]):
        console.print(f"beware: {warning}")
    for row in s["left_out"]:
        console.print(f"left out: {row['experiment']}: {row['why']}")
    console.print(f"\nreport: {s['report']}   ({s['seconds']:.0f} s)")


SUMMARIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "train-reward": train_reward,
    "bench": bench,
    "score": score,
    "sample": sample,
    "grpo": grpo,
    "demo": demo,
    "data-make": data_make,
    "reproduce": reproduce,
}
