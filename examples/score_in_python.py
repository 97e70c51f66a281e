"""A reward model from Python: score three pictures of the embedded world for one caption.

python examples/score_in_python.py
"""

import numpy as np
from PIL import Image

from drmcli import RewardModel
from drmcli.tiny import world

reward = RewardModel.tiny()  # or from_pretrained, with a folder of yours or a hub id
caption = "a large red circle above a small blue square"
others = ["a large green circle above a small blue square", "a small blue square above a large red circle"]
pictures = [Image.fromarray(p) for p in world.draw([caption, *others], np.random.default_rng(0))]
scores = reward.score_images(pictures, caption, sigmas=[0.0, 0.25, 0.75], noise_samples=4)
for name, row in zip([caption, *others], scores.tolist()):
    print("  ".join(f"{score:+6.2f}" for score in row), "", name)
