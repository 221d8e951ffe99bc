"""What an epoch of post-fitting costs with and without cached features.

Both are measured in one run on a ResNet-18 with random weights: time does not depend on them.

    python -m tests.benchmarks.cape_fit            # a minute on two cores
    python -m tests.benchmarks.cape_fit --quick    # seconds: few small images

Either way it fails where caching does not spare the network its passes: one over the images,
however many epochs follow. Times are printed and not judged.
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
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--quick", action="store_true", help="few small images")
    args = parser.parse_args()
    if args.quick:
        args.images, args.size = 64, 64
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=100).eval().to(args.device)
    loader = list(torch.randn(args.images, 3, args.size, args.size).split(32))
    model = with_cape_head(network, example_input=loader[0][:2])

    seen = 0

    def count(_module: object, _inputs: object, output: torch.Tensor) -> None:
        nonlocal seen
        seen += len(output)

    def measured(epochs: int, cache: bool) -> tuple[float, float]:
        """Seconds, and how often the network saw each image."""
        nonlocal seen
        seen, start = 0, time.perf_counter()
        fit_cape_head(model, loader, epochs=epochs, cache=cache, progress=False)
        return time.perf_counter() - start, seen / args.images

    measured(1, cache=False)  # warm up
    model.feature_map.register_forward_hook(count)
    (uncached, often), (cached, once) = measured(2, cache=False), measured(20, cache=True)
    print(f"ResNet-18, {args.images} images of {args.size} px, {args.device}\n")
    print("| | seconds | ratio | passes over the images |\n|---|---|---|---|")
    print(f"| 2 epochs, uncached | {uncached:.2f} | 1 | {often:g} |")
    print(
        f"| 20 epochs, cached (the first pass included) | {cached:.2f} | {cached / uncached:.2f} "
        f"| {once:g} |"
    )
    assert (often, once) == (2, 1), f"the network saw each image {often:g} and {once:g} times"


if __name__ == "__main__":
    main()
