"""One module a command: `run(config, reporter)` assembles models and data, loops, and writes the run folder.

From Python a recipe is called as the command line calls it, with a config of the same keys, and returns what `--json` prints:

    from drmcli.config import resolve
    from drmcli.recipes import train_reward

    config = resolve("train-reward", preset="tiny", flags={"data": ["pairs.jsonl"], "steps": 20, "out": "runs/mine"})
    summary = train_reward.run(config)
    print(summary["reward"], summary["eval_accuracy"])

`resolve(COMMAND, preset=..., file=..., flags=...)` checks every key and value; `drmcli.config.describe(COMMANDS[COMMAND])` says what each
means. The modules have the commands' names with `_` for `-`: train_reward, bench, sample, score, grpo, demo, reproduce, data_make, export.
`plan(config)` is the dry run, where the command has one. What a user can mend is raised as a `DrmError` with `message`, `hint` and
`exit_code`. Nothing is printed: a reporter with the three methods of `drmcli.run.Reporter` (progress, note, warn) hears how it goes. A run
is a folder: the same config again goes on with an unfinished one, and returns the summary of a finished one.
"""
