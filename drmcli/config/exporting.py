"""What can be set for the command that hands on what a run has made."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from drmcli.config.schema import strict


@dataclass(config=strict, kw_only=True)
class Export:
    """`drm export`."""

    run: str = ""
    """A run folder, or a model in it such as RUN/lora-last; empty is the newest run in runs/ that made a model."""
    to: str | None = None
    """Folder to write the model to, new or empty."""
    push: str | None = None
    """Repository on the hub, private where it is new; it is made where there is none, and one that is there keeps its visibility."""
    public: bool = False
    """Let everybody see it; else only you and your organisation do."""
    base: str | None = None
    """Hub id of the base model; needed where the run names a folder of this machine that does not say its id."""
