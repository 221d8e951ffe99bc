"""CAPE on handwritten digits: train a classifier, post-fit a CAPE head, calibrate it, look at it.

    python compat_examples/cape_head.py --out out

Real images (scikit-learn's 1,797 digits), no download, under a minute on two CPU cores. Prints
accuracy, how often the two heads agree, confidence, likelihood, calibration error and how exactly
the maps add up, and draws one held-out image with the CAPE maps of its top-3 classes beside CAM
and Grad-CAM. Needs scikit-learn and matplotlib.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fam_plugins import LayerCape
from fam_plugins.cape import (
    calibrate_temperature,
    fit_cape_head,
    upsample_conserving_mass,
    with_cape_head,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def load_splits(seed):
    """Training, calibration and test digits, in [0, 1], stratified 60 : 20 : 20."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    train_x, rest_x, train_y, rest_y = train_test_split(
        images, digits.target, test_size=0.4, stratify=digits.target, random_state=seed
    )
    held_x, test_x, held_y, test_y = train_test_split(
        rest_x, rest_y, test_size=0.5, stratify=rest_y, random_state=seed
    )
    pairs = ((train_x, train_y), (held_x, held_y), (test_x, test_y))
    return [TensorDataset(torch.from_numpy(x), torch.from_numpy(y)) for x, y in pairs]


def small_network():
    """Any network with global average pooling and one linear layer; 4x4 regions here."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def train(network, loader, device, epochs=15):
    """An ordinary classifier; CAPE comes afterwards."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    network.train()
    for _ in range(epochs):
        for images, labels in loader:
            loss = F.cross_entropy(network(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()


def agreement_and_confidence(model, images):
    """How often both heads name the same class, and how sure each one is on average."""
    with torch.no_grad():
        log_p, logits = model.both(images)
    same = (log_p.argmax(1) == logits.argmax(1)).double().mean().item()
    cape = log_p.exp().amax(1).mean().item()
    vanilla = logits.softmax(1).amax(1).mean().item()
    return same, cape, vanilla


def draw(model, image, label, path):
    """Image | CAPE maps in per cent on one scale | CAM | Grad-CAM, one row per top-3 class."""
    device = next(model.parameters()).device
    batch = image[None].to(device)
    with torch.no_grad():
        features, logits = model.features_and_logits(batch)
        p = model.head(features).exp()[0].cpu()
        # CAM: the vanilla classifier's weights on the map, without the bias, cut at 0.
        cam = torch.einsum("kc,chw->khw", model.classifier.weight, features[0]).relu().cpu()
    vanilla = logits.softmax(1)[0].cpu()
    top = p.topk(3).indices.tolist()
    cape_maps = torch.cat([LayerCape(model).attribute(batch, target=k) for k in top])[:, 0].cpu()
    grad_cam = LayerGradCam(model.vanilla, model.feature_map)
    height, width = image.shape[-2:]
    rows, columns = cape_maps.shape[-2:]
    extent = (0, width, height, 0)

    figure = plt.figure(figsize=(12.6, 10.2), layout="constrained")
    axes = figure.subplots(3, 4, squeeze=False)
    figure.suptitle(
        f"A held-out {label}; the vanilla head picks {int(vanilla.argmax())}, the CAPE head "
        f"{top[0]}. CAPE's numbers are probabilities, comparable across classes."
    )
    brightest = cape_maps.max().item()
    for row, k in enumerate(top):
        left, cape, relative_cam, relative_grad = axes[row]
        left.imshow(image[0].numpy(), cmap="gray_r", extent=extent)
        left.set_title(f"class {k}\nCAPE {p[k]:.1%}, vanilla head {vanilla[k]:.1%}")
        drawn = cape.imshow(
            100 * cape_maps[row].numpy(),
            cmap="viridis",
            vmin=0,
            vmax=100 * brightest,
            extent=extent,
        )
        for i in range(rows):
            for j in range(columns):
                value = cape_maps[row, i, j].item()
                cape.text(
                    (j + 0.5) * width / columns,
                    (i + 0.5) * height / rows,
                    f"{100 * value:.1f}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="black" if value > 0.6 * brightest else "white",
                )
        cape.set_title(f"CAPE map in %\n(sum {cape_maps[row].sum():.1%})")
        attribution = grad_cam.attribute(batch, target=k, relu_attributions=True)
        for axis, relative, name in (
            (relative_cam, cam[k], "CAM"),
            (relative_grad, attribution.detach()[0, 0].cpu(), "Grad-CAM"),
        ):
            scaled = relative / relative.max().clamp(min=1e-12)
            axis.imshow(scaled.numpy(), cmap="magma", vmin=0, vmax=1, extent=extent)
            axis.set_title(f"{name}, relative\n(own maximum = 1)")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(drawn, ax=axes[:, 1], shrink=0.6, label="probability in the region, %")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)

    train_set, held_set, test_set = load_splits(options.seed)
    train_loader = DataLoader(train_set, batch_size=32, shuffle=True)
    network = small_network().to(device)
    train(network, train_loader, device)
    images, labels = (tensor.to(device) for tensor in test_set.tensors)
    with torch.no_grad():
        accuracy = (network(images).argmax(1) == labels).double().mean().item()
    print(f"classifier: accuracy {accuracy:.1%} on {len(labels)} held-out images")

    model = with_cape_head(network, example_input=images[:2])
    same, confidence, vanilla = agreement_and_confidence(model, images)
    print(f"CAPE head, copied:     agreement {same:.1%}, mean confidence {confidence:.3f}")
    history = fit_cape_head(model, train_loader, epochs=30, cache=True)
    print(f"distillation loss {history.loss[0]:.3f} -> {history.loss[-1]:.3f} in 30 epochs")
    same, confidence, vanilla = agreement_and_confidence(model, images)
    print(f"CAPE head, fitted:     agreement {same:.1%}, mean confidence {confidence:.3f}")
    calibration = calibrate_temperature(model, DataLoader(held_set, batch_size=64))
    same, confidence, vanilla = agreement_and_confidence(model, images)
    print(
        f"CAPE head, calibrated: agreement {same:.1%}, mean confidence {confidence:.3f} "
        f"(vanilla {vanilla:.3f})"
    )
    print(calibration)

    with torch.no_grad():
        log_p, logits = model.both(images)
        predicted = log_p.argmax(1)
        shown = LayerCape(model).attribute(images, target=predicted)
        maps = model.head.probability_maps(model.features(images))
        large = upsample_conserving_mass(maps, (64, 64), mode="bilinear")
    nll = F.nll_loss(log_p, labels).item()
    print(f"test images: accuracy {(log_p.argmax(1) == labels).double().mean():.1%}, NLL {nll:.4f}")
    chosen = log_p.exp().gather(1, predicted[:, None])[:, 0]
    adapter_error = (shown.sum((1, 2, 3)) - chosen).abs().max().item()
    print(f"largest |sum of a LayerCape map - its probability|: {adapter_error:.1e}")
    sum_error = (maps.sum((2, 3)) - log_p.exp()).abs().max().item()
    large_error = (large.sum((2, 3)) - log_p.exp()).abs().max().item()
    print(f"the same over all classes: {sum_error:.1e}; at 64x64: {large_error:.1e}")

    assert accuracy > 0.9, f"the classifier is too weak to explain: {accuracy:.1%}"
    assert same > 0.9, f"the fitted head agrees with the classifier on {same:.1%} only"
    worst = max(adapter_error, sum_error, large_error)
    assert worst < 1e-4, f"a map of probabilities misses its probability by {worst:.1e}"
    least = min(float(part.min()) for part in (shown, maps, large))
    assert least >= 0, f"a map holds a negative probability: {least:.1e}"

    # An image that both heads read alike, but hesitantly, shows more than one class.
    agreed = log_p.argmax(1) == logits.argmax(1)
    hardest = int((logits.softmax(1).amax(1) + (~agreed).float()).argmin())
    path = options.out / "cape_head.png"
    draw(model, images[hardest].cpu(), int(labels[hardest]), path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
