"""How a policy learns from a reward model. Every algorithm draws for some prompts and gives losses, micro-batch by micro-batch.

- `groups`    Step-GRPO, TempFlow-GRPO and Flow-GRPO: candidates of stochastic steps, compared within their group
- `nft`       DiffusionNFT, with terminal rewards or with those of the noised states that it learns at
- `direct`    the reward's own gradient through the last steps

The loop, the optimizer, the evaluation, the alarm and the files are the same for all (`drmcli.recipes.grpo`).
"""

from __future__ import annotations

from drmcli.algorithms.base import Algorithm, Part, Prompts, Scored, StateReward
from drmcli.algorithms.direct import Direct
from drmcli.algorithms.groups import Groups
from drmcli.algorithms.nft import Nft

__all__ = ["Algorithm", "Direct", "Groups", "Nft", "Part", "Prompts", "Scored", "StateReward"]
