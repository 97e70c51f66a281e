"""Configs of the commands: what can be set (schema) and where values come from (resolve)."""

from drmcli.config.aligning import Grpo
from drmcli.config.commands import COMMANDS, SINGULAR
from drmcli.config.exporting import Export
from drmcli.config.reproducing import Reproduce
from drmcli.config.resolve import (
    build,
    dataset_names,
    describe,
    field_names,
    flag_of,
    local_or_hub,
    package_path,
    preset_names,
    preset_text,
    preset_values,
    read_config_file,
    resolve,
    split_ratio,
    spoken,
    to_command,
    to_dict,
    to_yaml,
)
from drmcli.config.schema import (
    Bench,
    Common,
    Data,
    Demo,
    Drawing,
    Sample,
    Score,
    TrainReward,
)
from drmcli.config.serving import Serve

__all__ = [
    "COMMANDS",
    "SINGULAR",
    "Bench",
    "Common",
    "Data",
    "Demo",
    "Drawing",
    "Export",
    "Grpo",
    "Reproduce",
    "Sample",
    "Score",
    "Serve",
    "TrainReward",
    "build",
    "dataset_names",
    "describe",
    "field_names",
    "flag_of",
    "local_or_hub",
    "package_path",
    "preset_names",
    "preset_text",
    "preset_values",
    "read_config_file",
    "resolve",
    "split_ratio",
    "spoken",
    "to_command",
    "to_dict",
    "to_yaml",
]
