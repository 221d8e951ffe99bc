"""Swap ``LayerGradCam`` for ``LayerFam``: one name changes, all else stays.

python compat_examples/drop_in_captum.py --out out
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pretrained
from captum.attr import LayerAttribution, LayerGradCam
from captum.attr import visualization as viz
from torch import Tensor, nn

from fam_plugins import LayerFam


def before(model: nn.Module, image: Tensor, target: int) -> Tensor:
    """Existing code."""
    explainer = LayerGradCam(model, model.features)
    attribution = explainer.attribute(image, target=target)
    return LayerAttribution.interpolate(attribution, image.shape[2:], "bilinear")


def after(model: nn.Module, image: Tensor, target: int) -> Tensor:
    """The same code with another class name."""
    explainer = LayerFam(model, model.features, rule="centred")
    attribution = explainer.attribute(image, target=target)
    return LayerAttribution.interpolate(attribution, image.shape[2:], "bilinear")


def main() -> None:
    args = pretrained.arguments(__doc__.splitlines()[0])
    model, caution = pretrained.load_model(args.weights)
    model = model.to(args.device)
    photograph = pretrained.load_photograph(args.image, args.mean, args.std)
    image = photograph.input.to(args.device)
    target, name, probability = pretrained.top_class(model, image)
    print(f"predicted: {name} ({probability:.0%})")

    same = LayerFam(model, model.features, rule="gradcam").attribute(image, target=target)
    theirs = LayerGradCam(model, model.features).attribute(image, target=target).detach()
    apart, most = float((same - theirs).abs().max()), float(theirs.abs().max())
    print(f'rule="gradcam" against LayerGradCam: {apart:.1e} apart, of {most:.1e}')
    exact = LayerFam(model, model.features, rule="additive")
    maps, delta = exact.attribute(image, target=target, return_convergence_delta=True)
    total, gap = float(maps.sum()), float(delta)
    print(f'rule="additive": the map sums to {total:.4f}, {gap:+.1e} off the logit less its bias')

    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.8))
    axes[0].imshow(photograph.shown)
    axes[0].set_title(f"{name} ({probability:.0%})")
    axes[0].axis("off")
    for axis, (title, explain) in zip(
        axes[1:], {"before: LayerGradCam": before, "after: LayerFam": after}.items(), strict=True
    ):
        attribution = explain(model, image, target).detach().cpu()
        viz.visualize_image_attr(
            attribution[0].permute(1, 2, 0).numpy(),
            photograph.shown.numpy(),
            method="blended_heat_map",
            sign="positive",
            plt_fig_axis=(figure, axis),
            title=title,
            use_pyplot=False,
        )
    figure.suptitle(caution, color="crimson")
    figure.tight_layout()
    path = args.out / "drop_in_captum.png"
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")

    # Both hold for any weights; strict, so that maps of zeros do not pass.
    assert apart < 1e-4 * most, f"{apart:.1e} apart, where the largest value is {most:.1e}"
    assert abs(gap) < 1e-3 * abs(total), f"the map sums to {total:.4f}, {gap:+.1e} off the logit"


if __name__ == "__main__":
    main()
