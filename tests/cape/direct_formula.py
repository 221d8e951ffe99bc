"""CAPE as the paper writes it: exponentials over a sum of every pair of regions, [B, K, N, N].

The independent reference of the tests and the peer of the benchmark; written from the formula, in
plain tensor operations, with the maximum subtracted before the exponential.
"""

import torch.nn.functional as F


def direct_logits(features, weight, bias):
    """Class logits of every region, [B, K, *spatial]."""
    kernel = weight[(...,) + (None,) * (features.ndim - 2)]
    return (F.conv2d if features.ndim == 4 else F.conv3d)(features, kernel, bias)


def direct_maps(logits, t1, t2, t3=None):
    """The CAPE map, at the further temperature exp(t3) when t3 is given."""
    class_logits = logits.flatten(2) / t1.exp()
    weight_logits = logits.flatten(2).mean(dim=1, keepdim=True) / t2.exp()
    matched = class_logits + weight_logits
    pairs = class_logits.unsqueeze(3) + weight_logits.unsqueeze(2)
    if t3 is not None:
        matched, pairs = matched / t3.exp(), pairs / t3.exp()
    # One maximum per region: the denominator sums over classes and over the pair's other region.
    largest = pairs.amax(dim=(1, 3))
    total = (pairs - largest[:, None, :, None]).exp().sum(dim=(1, 3))
    maps = (matched - largest.unsqueeze(1)).exp() / total.unsqueeze(1)
    return maps.view_as(logits)


def direct_relative(logits, t1, t2):
    """The mu-CAPE map."""
    mean = logits.mean(dim=1, keepdim=True)
    return (logits / t1.exp() + mean / t2.exp()).clamp(min=0)


def direct_distillation_loss(p_soft, teacher_logits, temperature=2.0):
    """T² · KL(softmax(teacher / T) || p_soft), mean over images."""
    teacher = (teacher_logits / temperature).softmax(dim=1)
    return temperature**2 * (teacher * (teacher.log() - p_soft.log())).sum(dim=1).mean()
