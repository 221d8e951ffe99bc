"""What an epoch of post-fitting costs with and without cached features.

Both are measured in one run on a ResNet-18 with random weights: time does not depend on them.

    python -m tests.benchmarks.cape_fit
"""

from __future__ import annotations

import argparse
import time

import torch
import torchvision

from fam_plugins.cape import fit_cape_head, with_cape_head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=256)
    args = parser.parse_args()
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=100).eval().to(args.device)
    loader = list(torch.randn(args.images, 3, 112, 112).split(32))
    model = with_cape_head(network, example_input=loader[0][:2])

    def seconds(epochs: int, cache: bool) -> float:
        start = time.perf_counter()
        fit_cape_head(model, loader, epochs=epochs, cache=cache, progress=False)
        return time.perf_counter() - start

    seconds(1, cache=False)  # warm up
    uncached, cached = seconds(2, cache=False), seconds(20, cache=True)
    print(f"ResNet-18, {args.images} images of 112 px, {args.device}\n")
    print("| | seconds | ratio |\n|---|---|---|")
    print(f"| 2 epochs, uncached | {uncached:.2f} | 1 |")
    print(
        f"| 20 epochs, cached (the first pass included) | {cached:.2f} | {cached / uncached:.2f} |"
    )


if __name__ == "__main__":
    main()
