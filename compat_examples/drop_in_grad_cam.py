"""Swap ``GradCAM`` for ``FAM``: one name changes, all else stays.

python compat_examples/drop_in_grad_cam.py --out out
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pretrained
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from fam_plugins import FAM


def before(model: nn.Module, image: Tensor, target: int) -> np.ndarray:
    """Existing code."""
    with GradCAM(model=model, target_layers=[model.features[-1]]) as cam:
        return cam(input_tensor=image, targets=[ClassifierOutputTarget(target)])[0]


def after(model: nn.Module, image: Tensor, target: int) -> np.ndarray:
    """The same code with another class name."""
    with FAM(model=model, target_layers=[model.features[-1]], rule="centred") as cam:
        return cam(input_tensor=image, targets=[ClassifierOutputTarget(target)])[0]


def main() -> None:
    args = pretrained.arguments(__doc__.splitlines()[0])
    model, caution = pretrained.load_model(args.weights)
    model = model.to(args.device)
    photograph = pretrained.load_photograph(args.image, args.mean, args.std)
    image = photograph.input.to(args.device)
    target, name, probability = pretrained.top_class(model, image)
    print(f"predicted: {name} ({probability:.0%})")

    with FAM(model, [model.features[-1]], rule="gradcam") as cam:
        same = cam(image, [ClassifierOutputTarget(target)])[0]
    apart = np.abs(same - before(model, image, target)).max()
    print(f'rule="gradcam" against GradCAM: {apart:.1e} apart, of 1')
    with FAM(model, [model.features[-1]], rule="additive") as cam:
        cam(image, [ClassifierOutputTarget(target)])
        total = float(cam.attributions[0].sum())  # the signed map, before ReLU and scaling
    with torch.no_grad():
        # The classifier's bias is the constant term, which no region carries.
        carried = float(model(image)[0, target] - model.classifier[-1].bias[target])
    print(f'rule="additive": the map sums to {total:.4f}, the logit less its bias {carried:.4f}')

    shown = photograph.shown.numpy()
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.8))
    panels = {
        f"{name} ({probability:.0%})": shown,
        "before: GradCAM": show_cam_on_image(shown, before(model, image, target), use_rgb=True),
        "after: FAM": show_cam_on_image(shown, after(model, image, target), use_rgb=True),
    }
    for axis, (title, picture) in zip(axes, panels.items(), strict=True):
        axis.imshow(picture)
        axis.set_title(title)
        axis.axis("off")
    figure.suptitle(caution, color="crimson")
    figure.tight_layout()
    path = args.out / "drop_in_grad_cam.png"
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")

    # Both hold for any weights.
    assert same.max() > 0.9, "the map is empty"
    assert apart < 1e-3, f"{apart:.1e} apart, where both maps are scaled to [0, 1]"
    assert abs(total - carried) < 1e-3 * abs(carried), f"sums to {total:.4f}, not {carried:.4f}"


if __name__ == "__main__":
    main()
