"""One module a command: `run(config, reporter)` assembles models and data, loops, and writes the run folder."""
