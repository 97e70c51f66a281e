"""Step-wise Sampling in a stock diffusers pipeline.

python examples/stepwise_in_diffusers.py
"""

import torch
from diffusers import StableDiffusion3Pipeline

from drmcli import RewardModel, StepwiseScheduler
from drmcli.config import package_path, resolve

config = resolve("sample")  # the embedded world; any StableDiffusion3 folder or hub id does
pipe = StableDiffusion3Pipeline.from_pretrained(package_path(config.generator), text_encoder_3=None, tokenizer_3=None)
reward = RewardModel.from_pretrained(config.reward)
prompt = "a large red circle above a small blue square"
pipe.scheduler = StepwiseScheduler.from_pipe(pipe, reward, prompt=prompt, beams=4, seed=0)
rng = torch.Generator().manual_seed(0)
picture = pipe(prompt, num_inference_steps=10, guidance_scale=1.0, max_sequence_length=1, generator=rng).images[0]
picture.save("stepwise.png")
