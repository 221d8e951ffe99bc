"""Measure explainers on a user's own labelled images and encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from fam_plugins.captum import LayerFam
from fam_plugins.core.eval_mode import check_module, eval_mode
from fam_plugins.core.layer_pass import find_layer
from fam_plugins.core.messages import with_progress
from fam_plugins.core.references import (
    as_tensor,
    at_home,
    embed_once,
    listed,
    prototypes,
    unique_labels,
)
from fam_plugins.core.rules import Rule, find_rule
from fam_plugins.core.scores import check_floats
from fam_plugins.core.similarity import Similarity, as_similarity
from fam_plugins.core.similarity_model import SimilarityModel
from fam_plugins.core.smooth import smoothed
from fam_plugins.quality.measures import (
    MEASURES,
    Evaluation,
    deletion_and_insertion,
    pointing,
    rank_correlation,
)

__all__ = ["evaluate", "maps_of"]


def evaluate(
    explainers: Mapping[str, Any],
    encoder: nn.Module,
    layer: nn.Module | str,
    dataset: Any,
    *,
    similarity: str | Similarity | Callable[..., Tensor] = "cosine",
    contrast: Any = "others",
    smooth: bool = False,
    shots: int = 5,
    mosaics: int = 60,
    singles: int = 60,
    steps: int = 10,
    seed: int = 0,
) -> Evaluation:
    """Compare methods at equal references, contrast and smoothing.

    Each class gets a reference from ``shots`` images. Mosaics of four other images are explained
    for one of their classes: energy, brightest point and pixel AUC on the cell that matches, rank
    correlation with the map for the class of another cell (1: the reference is ignored), and
    ``|sum of the map - score|`` of rules that add up. On mosaics and single images: area under the
    score less that of the other references while patches are blurred, or restored.

    Args:
        explainers: Label -> a rule; a class of Captum or pytorch-grad-cam, or a
            :func:`functools.partial` of it; or a function ``(model, layer, images, targets)`` ->
            maps ``[B, h, w]``, its model a :class:`~fam_plugins.SimilarityModel` like all others'.
            Maps of pytorch-grad-cam are taken before it enlarges them.
        encoder: Images -> embeddings ``[B, D]``; must also take mosaics, of twice the size.
        layer: The layer to explain, or its name.
        dataset: Images ``[C, H, H]``, ready for the encoder, with labels, such as torchvision's
            ``ImageFolder``. Classes of at most ``shots`` images are left out.
        similarity: As for :class:`~fam_plugins.SimilarityModel`.
        contrast: As there, or ``"gallery"``: the references' images.
        smooth: Smooth all maps alike, in place of LayerFam's own smoothing.
        shots: Images per reference.
        mosaics: How many.
        singles: How many single images, or as many as there are.
        steps: Of deletion and insertion.
        seed: For all draws.

    Raises:
        TypeError: If an explainer, the encoder or an image is of another kind.
        ValueError: On an unknown name, a count below 1, fewer than four classes, images of several
            sizes or not square, or maps of another shape.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> data = TensorDataset(torch.rand(12, 3, 8, 8), torch.arange(4).repeat(3))
        >>> found = evaluate({"ours": "centred"}, encoder, "0", data, shots=2, mosaics=3)
        >>> found.values["ours"]["energy"].shape
        (3,)
    """
    if not isinstance(explainers, Mapping) or not explainers:
        raise TypeError('explainers must be a dict such as {"ours": "centred"}')
    methods = {label: _method(label, given, smooth) for label, given in explainers.items()}
    check_module(encoder, "encoder")
    module, chosen = find_layer(encoder, layer)[0], as_similarity(similarity)
    if min(shots, mosaics, singles, steps) < 1:
        raise ValueError("shots, mosaics, singles and steps must be at least 1")
    if isinstance(contrast, str) and contrast not in ("others", "gallery"):
        raise ValueError(f'contrast must be "others", "gallery" or embeddings, not {contrast!r}')
    rows, *questions = _draw(dataset, shots, mosaics, singles, np.random.default_rng(seed))
    with ExitStack() as stack:
        for weight in encoder.parameters():  # pytorch-grad-cam clears gradients and leaves its own
            stack.callback(setattr, weight, "grad", weight.grad)
            weight.grad = None
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(eval_mode(encoder))
        torch.manual_seed(seed)
        shot = torch.cat([embed_once(encoder, _load(dataset, of), "supports") for of in rows])
        references = prototypes(shot, [k for k, of in enumerate(rows) for _ in of], chosen)
        gallery = isinstance(contrast, str) and contrast == "gallery"
        model, judge = (
            SimilarityModel(encoder, references, similarity=chosen, contrast=against)
            for against in (shot if gallery else contrast, "others")
        )
        values: dict[str, Any] = {label: {name: [] for name in MEASURES} for label in methods}
        work = [(label, asked) for label in methods for one in questions for asked in one]
        for label, (images, targets, *mosaic) in with_progress(work, "evaluating maps"):
            images = at_home(images, encoder, "images")
            maps, adds_up = maps_of(methods[label], model, module, images, targets, smooth=smooth)
            full = _enlarged(maps, images)
            kind = "mosaic" if mosaic else "single"
            found = {}
            if mosaic:
                cells, rivals = mosaic
                found = pointing(full, cells)
                # As pytorch-grad-cam shows its own: the positive part first, then enlarged.
                found["energy"] = pointing(_enlarged(maps.clamp_min(0), images), cells)["energy"]
                other, _ = maps_of(methods[label], model, module, images, rivals, smooth=smooth)
                found["sensitivity"] = rank_correlation(maps, other)
                gap = (maps.sum((1, 2)) - _scores(model, images, targets)).abs()
                found["additivity"] = gap if adds_up else torch.full_like(gap, torch.nan)
            sigma = images.shape[-1] / (10 if mosaic else 5)  # no stroke or texture survives
            score = partial(_scores, judge, targets=targets)
            areas = deletion_and_insertion(score, images, _blurred(images, sigma), full, steps)
            found |= {f"{kind} deletion": areas[0], f"{kind} insertion": areas[1]}
            for name, value in found.items():
                values[label][name].append(value.double())
        right = [
            judge(at_home(images, encoder, "images")).argmax(1).cpu() == targets
            for images, targets in questions[1]
        ]
    columns = {
        label: {name: torch.cat(parts).numpy() for name, parts in found.items()}
        for label, found in values.items()
    }
    return Evaluation(columns, torch.cat(right).double().mean().item())


def maps_of(
    method: Callable[..., Any],
    model: SimilarityModel,
    layer: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    smooth: bool = False,
) -> tuple[Tensor, bool]:
    """Maps ``[B, h, w]`` on the CPU in float32, and whether they claim to add up to the score."""
    made = method.func if isinstance(method, partial) else method
    inputs, adds_up = images.clone().requires_grad_(), False  # gradients also of frozen encoders
    if hasattr(made, "get_cam_image"):
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        with method(model, [layer]) as cam:
            chosen, inner = [ClassifierOutputTarget(k) for k in targets.tolist()], cam.get_cam_image
            if hasattr(cam, "attributions"):  # FAM's: signed, and as large as the layer
                cam(inputs, chosen)
                maps = cam.attributions[0]
            else:
                cam.get_target_width_height = lambda _inputs: None
                if smooth:  # before that package cuts maps at 0, like signed ones
                    cam.get_cam_image = lambda *of: smoothed(as_tensor(inner(*of), "maps"), 2).numpy()
                maps, smooth = cam(inputs, chosen), False
    elif hasattr(made, "attribute"):
        attribution = method(model, layer)
        adds_up = attribution.has_convergence_delta()
        maps = attribution.attribute(inputs, target=targets.to(images.device))
    else:
        maps = method(model, layer, inputs, targets.to(images.device))
    maps = as_tensor(maps, "maps").detach().cpu().float()
    maps = maps[:, 0] if maps.dim() == 4 and maps.shape[1] == 1 else maps
    if maps.dim() != 3 or len(maps) != len(images) or not maps.isfinite().all():
        raise ValueError(
            f"{made} gives maps of shape {tuple(maps.shape)}, or NaN, for {len(images)} images: "
            "they must be [B, h, w] or [B, 1, h, w]; a function of your own can sum channels"
        )
    return smoothed(maps, 2) if smooth else maps, adds_up


def _method(label: str, given: Any, smooth: bool) -> Callable[..., Any]:
    """The class, partial or function that ``given`` is or, being a rule, stands for."""
    if isinstance(given, (str, Rule)):
        return partial(LayerFam, rule=find_rule(given))
    made = given.func if isinstance(given, partial) else given
    known = hasattr(made, "attribute") or hasattr(made, "get_cam_image")
    if not callable(given) or known != isinstance(made, type):
        raise TypeError(
            f"explainer {label!r} is {given!r}: pass a class such as LayerFam, not yet built, a "
            "partial of it, a rule, or a function (model, layer, images, targets)"
        )
    if smooth and isinstance(given, partial) and "smooth" in given.keywords:
        return partial(given, smooth=False)
    return given  # type: ignore[no-any-return]


def _draw(
    dataset: Any, shots: int, mosaics: int, singles: int, rng: np.random.Generator
) -> tuple[Any, ...]:
    """Rows ``[K, shots]`` of the supports; batches of mosaics, and of single images, to explain.

    A batch is images ``[B, C, H, W]`` and classes ``[B]`` and, for mosaics, cells ``[B, H, W]``,
    true where the class is, and classes ``[B]`` of another cell.
    """
    of: dict[Any, list[int]] = {}
    for row, label in enumerate(_labels(dataset)):
        of.setdefault(label, []).append(row)
    classes = [rng.permutation(of[name]) for name in unique_labels(of) if len(of[name]) > shots]
    if len(classes) < 4:
        raise ValueError(
            f"{len(classes)} classes have more than {shots} images, and mosaics need 4: add "
            "images, or lower shots"
        )
    fours = np.array([rng.permutation(len(classes))[:4] for _ in range(mosaics)])
    cell = rng.integers(4, size=mosaics)
    other = (cell + rng.integers(1, 4, size=mosaics)) % 4
    parts = _load(dataset, [rng.choice(classes[k][shots:]) for k in fours.flat])
    side, each = parts.shape[-1], np.arange(mosaics)
    tiles = parts.reshape(mosaics, 2, 2, -1, side, side).permute(0, 3, 1, 4, 2, 5)
    cells = torch.eye(4, dtype=torch.bool)[cell].reshape(mosaics, 2, 2)
    drawn = rng.permutation([(row, k) for k, rows in enumerate(classes) for row in rows[shots:]])
    mosaic = (
        tiles.reshape(mosaics, -1, 2 * side, 2 * side),
        torch.from_numpy(fours[each, cell]),
        cells.repeat_interleave(side, 1).repeat_interleave(side, 2),
        torch.from_numpy(fours[each, other]),
    )
    single = _load(dataset, drawn[:singles, 0]), torch.from_numpy(drawn[:singles, 1])
    batches = (list(zip(*(p.split(16) for p in one), strict=True)) for one in (mosaic, single))
    return [rows[:shots] for rows in classes], *batches


def _labels(dataset: Any) -> list[Any]:
    if hasattr(dataset, "targets"):  # of torchvision: without reading the images
        return listed(dataset.targets)
    labels = [dataset[row][1] for row in with_progress(range(len(dataset)), "reading labels")]
    return listed([label.item() if hasattr(label, "item") else label for label in labels])


def _load(dataset: Any, rows: Any) -> Tensor:
    images = [dataset[int(row)][0] for row in rows]
    for row, image in zip(rows, images, strict=True):
        check_floats(image, f"image {row} of the dataset")
        if image.shape != images[0].shape or image.dim() != 3 or image.shape[1] != image.shape[2]:
            raise ValueError(
                f"image {row} of the dataset has shape {tuple(image.shape)}: all must be [C, H, H] "
                "of one size; transform=Compose([Resize(224), CenterCrop(224), ToTensor()])"
            )
    return torch.stack(images)


def _scores(model: SimilarityModel, images: Tensor, targets: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).cpu().gather(1, targets[:, None])[:, 0]


def _enlarged(maps: Tensor, images: Tensor) -> Tensor:
    return F.interpolate(maps[:, None], images.shape[2:], mode="bilinear")[:, 0]


def _blurred(images: Tensor, sigma: float) -> Tensor:
    size = 2 * min(int(2 * sigma), images.shape[-1] // 2 - 1) + 1
    # One way, then the other: torchvision's kernel in two dimensions is slow on large images.
    return gaussian_blur(gaussian_blur(images, [size, 1], [sigma] * 2), [1, size], [sigma] * 2)
