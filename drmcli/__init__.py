"""drmcli: diffusion-based reward models, trained, used and measured (DRM, arXiv 2605.25661).

The public names are loaded when first used, so that importing drmcli imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_LAZY = {
    "RewardModel": "drmcli.reward",
    "Generator": "drmcli.generator",
    "Conditioning": "drmcli.families.base",
    "PromptEmbeds": "drmcli.generator",
    "StepwiseScheduler": "drmcli.scheduler",
    "DrmError": "drmcli.errors",
}
__all__ = ["Conditioning", "DrmError", "Generator", "PromptEmbeds", "RewardModel", "StepwiseScheduler", "__version__"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'drmcli' has no attribute {name!r}")
