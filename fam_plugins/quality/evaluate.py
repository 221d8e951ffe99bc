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

from fam_plugins.core.encoders import as_encoder
from fam_plugins.core.eval_mode import eval_mode
from fam_plugins.core.layer_pass import find_layer
from fam_plugins.core.messages import warn_user, with_progress
from fam_plugins.core.references import as_tensor, at_home, embed_once, prototypes
from fam_plugins.core.rules import Rule, find_rule
from fam_plugins.core.scores import check_floats
from fam_plugins.core.similarity import Similarity, as_similarity
from fam_plugins.core.similarity_model import SimilarityModel
from fam_plugins.core.smooth import smoothed
from fam_plugins.quality.measures import Evaluation, perturbation, pointing, rank_correlation

__all__ = ["evaluate", "explain"]


def evaluate(
    explainers: Mapping[str, Any],
    encoder: Any,
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

    Each class gets a reference. Mosaics of four other images are explained for one of them: energy,
    brightest point and pixel AUC on its cell, rank correlation with the map for another cell's
    class (1: the reference is ignored), ``|sum - score|`` of rules that add up. On mosaics and
    single images: area under the score less the other references' while patches blur, or return.

    Args:
        explainers: Label -> a rule; a class of Captum or pytorch-grad-cam, or a
            :func:`functools.partial` of one; or a function ``(model, layer, images, targets)`` ->
            maps ``[B, h, w]``, its model the same :class:`~fam_plugins.SimilarityModel` for all.
        encoder: As for :class:`~fam_plugins.SimilarityModel`. Mosaics are twice the size of images;
            with a warning the same size, every image halved, where the encoder refuses larger ones.
        layer: The layer to explain, or its name.
        dataset: Images ``[C, H, H]``, ready for the encoder, with labels, such as an
            ``ImageFolder``. Classes of no more than ``shots`` images are left out.
        similarity: As for :class:`~fam_plugins.SimilarityModel`.
        contrast: As there, or ``"gallery"``: the images of all references.
        smooth: Smooth all maps alike, before any is cut at 0, in place of LayerFam's own smoothing.
        shots: Images per reference.
        mosaics: How many.
        singles: How many, or as many as there are.
        steps: Of deletion and insertion.
        seed: Of all draws.

    Raises:
        TypeError: If an explainer, the encoder or an image is of another kind.
        ValueError: On an unknown name, counts below 1, fewer than four classes, images that are
            not square or differ in size, or maps of another shape.

    Warns:
        UserWarning: If mosaics are halved.

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
    encoder = as_encoder(encoder)
    module, chosen = find_layer(encoder, layer)[0], as_similarity(similarity)
    if min(shots, mosaics, singles, steps) < 1:
        raise ValueError("shots, mosaics, singles and steps must be at least 1")
    gallery = isinstance(contrast, str) and contrast == "gallery"
    if isinstance(contrast, str) and contrast != "others" and not gallery:
        raise ValueError(f'contrast must be "others", "gallery" or embeddings, not {contrast!r}')
    rows, *questions = _draw(dataset, shots, mosaics, singles, np.random.default_rng(seed))
    found: dict[str, dict[str, list[Tensor]]] = {label: {} for label in methods}
    with ExitStack() as stack:
        for weight in encoder.parameters():  # pytorch-grad-cam clears gradients and leaves its own
            stack.callback(setattr, weight, "grad", weight.grad)
            weight.grad = None
        # inference_mode(False) also switches gradients on.
        modes = torch.inference_mode(False), torch.random.fork_rng(devices=[]), eval_mode(encoder)
        for mode in modes:
            stack.enter_context(mode)
        torch.default_generator.manual_seed(seed)  # not of the devices
        shot = torch.cat([embed_once(encoder, _load(dataset, of), "supports") for of in rows])
        try:
            embed_once(encoder, questions[0][0][0][:1], "mosaics")
        except (AssertionError, RuntimeError, ValueError) as error:  # of another size than it takes
            warn_user(f"mosaics are halved, because the encoder refuses larger images: {error}")
            questions[0] = [tuple(map(_halved, batch)) for batch in questions[0]]
        references = prototypes(shot, np.arange(len(shot)) // shots, chosen)
        model, judge = (
            SimilarityModel(encoder, references, similarity=chosen, contrast=against)
            for against in (shot if gallery else contrast, "others")
        )
        work = [(label, *asked) for label in methods for kind in questions for asked in kind]
        for label, images, targets, *mosaic in with_progress(work, "evaluating maps"):
            inputs = at_home(images, encoder, "images")
            maps, adds_up = explain(methods[label], model, module, inputs, targets, smooth)
            shown = F.interpolate(maps[:, None], images.shape[2:], mode="bilinear")[:, 0]
            one: dict[str, Tensor] = {}
            if mosaic:
                other, _ = explain(methods[label], model, module, inputs, mosaic[1], smooth)
                gap = (maps.sum((1, 2)) - _scores(model, targets, inputs)).abs()
                one = pointing(maps, shown, mosaic[0])
                one["additivity"] = gap if adds_up else gap * torch.nan
                one["sensitivity"] = rank_correlation(maps, other)
            # Blurred by a fifth of an object: no stroke or texture survives.
            kind, part = ("mosaic", 10) if mosaic else ("single", 5)
            width, sigma = images.shape[-1] // 2 * 2 - 1, [images.shape[-1] / part] * 2
            blurred = gaussian_blur(gaussian_blur(inputs, [width, 1], sigma), [1, width], sigma)
            areas = perturbation(partial(_scores, judge, targets), inputs, blurred, shown, steps)
            one |= {f"{kind} deletion": areas[0], f"{kind} insertion": areas[1]}
            for name, value in one.items():
                found[label].setdefault(name, []).append(value.double())
        single = [(at_home(images, encoder, "images"), targets) for images, targets in questions[1]]
        right = [judge(images).argmax(1).cpu() == targets for images, targets in single]
    values = {
        label: {name: torch.cat(parts).numpy() for name, parts in columns.items()}
        for label, columns in found.items()
    }
    return Evaluation(values, torch.cat(right).double().mean().item())


def explain(
    method: Any, model: nn.Module, layer: nn.Module, images: Tensor, targets: Tensor, smooth: bool
) -> tuple[Tensor, bool]:
    """Maps ``[B, h, w]`` on the host in float32, and whether they claim to add up to the score."""
    made = method.func if isinstance(method, partial) else method
    inputs, adds_up = images.clone().requires_grad_(), False  # gradients of frozen encoders, too
    if hasattr(made, "get_cam_image"):
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        wanted = [ClassifierOutputTarget(k) for k in targets.tolist()]
        with method(model, [layer]) as cam:
            if hasattr(cam, "attributions"):  # FAM's: signed, and as large as the layer
                cam(inputs, wanted)
                maps = cam.attributions[0]
            else:
                cam.get_target_width_height = lambda _inputs: None
                if smooth:  # here, because that package then cuts its maps at 0
                    inner, smooth = cam.get_cam_image, False
                    cam.get_cam_image = lambda *a: smoothed(torch.tensor(inner(*a)), 2).numpy()
                maps = cam(inputs, wanted)
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
            "pass an explainer of maps [B, h, w]; a function can sum their channels"
        )
    return smoothed(maps, 2) if smooth else maps, adds_up


def _method(label: str, given: Any, smooth: bool) -> Any:
    """What :func:`explain` takes, refused where it is something else."""
    if isinstance(given, (str, Rule)):
        from fam_plugins.captum import LayerFam

        return partial(LayerFam, rule=find_rule(given))
    made = given.func if isinstance(given, partial) else given
    known = hasattr(made, "attribute") or hasattr(made, "get_cam_image")
    if not callable(given) or known != isinstance(made, type):
        raise TypeError(
            f"explainer {label!r} is {given!r}: pass a rule, a class such as LayerFam (not an "
            "object), a partial of one, or a function (model, layer, images, targets)"
        )
    own = isinstance(given, partial) and "smooth" in given.keywords
    return partial(given, smooth=False) if smooth and own else given


def _draw(
    dataset: Any, shots: int, mosaics: int, singles: int, rng: np.random.Generator
) -> tuple[Any, ...]:
    """Rows ``[K, shots]`` of the supports; batches of mosaics and batches of single images.

    A batch is images and classes ``[B]`` and, for mosaics, cells ``[B, H, W]``, true where the
    class is, and classes of another cell.
    """
    labels = getattr(dataset, "targets", None)  # torchvision's, without reading the images
    labels = np.array([dataset[i][1] for i in range(len(dataset))] if labels is None else labels)
    rows = [rng.permutation(np.flatnonzero(labels == name)) for name in np.unique(labels)]
    rows = [of for of in rows if len(of) > shots]
    if len(rows) < 4:
        raise ValueError(
            f"{len(rows)} classes have more than {shots} images, and mosaics need 4: add images, "
            "or lower shots"
        )
    fours = np.array([rng.permutation(len(rows))[:4] for _ in range(mosaics)])
    cell = rng.integers(4, size=mosaics)
    other = (cell + rng.integers(1, 4, size=mosaics)) % 4
    parts = _load(dataset, [rng.choice(rows[k][shots:]) for k in fours.flat])
    side, each = parts.shape[-1], np.arange(mosaics)
    tiles = parts.reshape(mosaics, 2, 2, -1, side, side).permute(0, 3, 1, 4, 2, 5)
    cells = torch.eye(4, dtype=torch.bool)[cell].reshape(mosaics, 2, 2)
    single = rng.permutation([(i, k) for k, of in enumerate(rows) for i in of[shots:]])[:singles]
    asked = (
        (
            tiles.reshape(mosaics, -1, 2 * side, 2 * side),
            torch.from_numpy(fours[each, cell]),
            cells.repeat_interleave(side, 1).repeat_interleave(side, 2),
            torch.from_numpy(fours[each, other]),
        ),
        (_load(dataset, single[:, 0]), torch.from_numpy(single[:, 1])),
    )
    batches = (list(zip(*(torch.split(p, 16) for p in one), strict=True)) for one in asked)
    return [of[:shots] for of in rows], *batches


def _halved(given: Tensor) -> Tensor:
    """Images ``[B, C, H, W]`` or cells ``[B, H, W]`` at half the size; indices as they are."""
    if given.dim() == 4:
        return F.interpolate(given, scale_factor=0.5, mode="bilinear", antialias=True)
    return given[:, ::2, ::2] if given.dim() == 3 else given


def _load(dataset: Any, rows: Any) -> Tensor:
    images = [dataset[int(row)][0] for row in rows]
    for row, image in zip(rows, images, strict=True):
        check_floats(image, f"image {row} of the dataset")
        if image.shape != images[0].shape or image.dim() != 3 or image.shape[1] != image.shape[2]:
            raise ValueError(
                f"image {row} of the dataset has shape {tuple(image.shape)}, not [C, H, H] as all "
                "must: transform=Compose([Resize(224), CenterCrop(224), ToTensor()])"
            )
    return torch.stack(images)


def _scores(model: nn.Module, targets: Tensor, images: Tensor) -> Tensor:
    with torch.no_grad():
        chosen: Tensor = model(images).cpu().gather(1, targets[:, None])[:, 0]
    return chosen
