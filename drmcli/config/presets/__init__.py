"""Presets: YAML files read by `drmcli.config.resolve`."""
