from torch import Tensor
import torch


def add_noise(x0, noise, sigma):
    s = torch.as_tensor(sigma, dtype=torch.float32, device=x0.device)
    s = s.reshape(-1, *([1] * (x0.ndim - 1))) if s.ndim else s
    return (1 - s) * x0.float() + s * noise.float()
