import torch
import torch.nn.functional as F


def bradley_terry(a, b, label=None, weight=None, margin=0.0):
    d = a - b
    return -((label * F.logsigmoid(d - margin) + (1 - label) * F.logsigmoid(-d - margin)) * weight).sum() / weight.sum()


def thurstone(a, b, sigma, label=None, weight=None):
    raise NotImplementedError
