"""The path rule: integrated gradients between two embeddings, spread over the regions.

The score's gradient is integrated on the straight line from a baseline embedding ``b`` to the
embedding ``q`` of the image, ``g = integral of grad s(b + u (q - b)) du`` (integrated gradients,
arXiv 1703.01365, in embedding space). A linear tail maps a region's activation to its share of
``q``, so the map is ``g . (z_i - b) / N`` with ``z_i`` the embedding of region ``i``. It adds up to
``s(q) - s(b)`` and needs no further pass through the network.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fam_plugins.core.maps import MapPass

Score = Callable[[Tensor], Tensor]


def path_gradient(score: Score, embeddings: Tensor, baseline: Tensor, nodes: int = 64) -> Tensor:
    """Integrate the gradient of ``score`` from ``baseline`` ``[D]`` to ``embeddings`` ``[B, D]``.

    Gauss-Legendre quadrature: the integrand is smooth, so that 64 nodes reach rounding error
    unless the line passes very close to the origin (cosine has no value there).
    """
    points, weights = np.polynomial.legendre.leggauss(nodes)
    total = torch.zeros_like(embeddings)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        between = (baseline + point * (embeddings - baseline)).detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(score(between).sum(), between)
        total += weight * gradient
    return total


def path_map(
    encoder: nn.Module, layer: nn.Module, score: Score, images: Tensor, baseline: Tensor
) -> Tensor:
    """Path-rule maps ``[B, h, w]``; each sums to ``s(q) - s(b)``.

    Args:
        encoder: Images -> embeddings ``[B, D]``.
        layer: The layer to explain, ``[B, C, h, w]``.
        score: Embeddings -> one score an image.
        images: ``[B, C, H, W]``.
        baseline: ``[D]``, for instance the mean embedding of a gallery.
    """
    one = MapPass(encoder, [layer], "additive")
    embeddings = one.run(lambda: encoder(images), images)
    weights = path_gradient(score, embeddings.detach(), baseline)
    ((maps,),) = one.maps(lambda: (embeddings * weights).sum(dim=1))
    shares = maps[:, 0]
    # The baseline is an embedding, not a map: its part (and a bias of the tail) belongs to no
    # region in particular, so every region carries the same share of it.
    wanted = (weights * (embeddings.detach() - baseline)).sum(dim=1)
    rest = wanted - shares.sum(dim=(1, 2))
    return shares + (rest / shares[0].numel())[:, None, None]
