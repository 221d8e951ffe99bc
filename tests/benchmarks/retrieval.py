"""What maps for many references cost beside a bare forward pass of the queries.

ResNet-18 with and without a projection head. Everything is measured in one run, interleaved, so
that the ratios hold on a busy machine; time is the median over rounds. Captum's LayerGradCam has
no form for many targets: it is looped over a few of them and multiplied up, which the table says.

    python -m tests.benchmarks.retrieval            # two minutes on two cores
    python -m tests.benchmarks.retrieval --quick    # seconds: small images, few references

Either way it fails where maps behind pooling need a second forward pass, or much more memory than
one. Times are printed and not judged.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
import torchvision
from captum.attr import LayerGradCam
from torch import nn

from fam_plugins import LayerFam, SimilarityModel
from tests.benchmarks.cost import milliseconds, peak_memory

LOOPED = 4
"""Targets that LayerGradCam is really run for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--references", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="small images, few references")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.references, args.size, args.rounds = 4, 32, 96, 2

    torch.manual_seed(0)
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    head = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 128))
    calls: dict[str, Callable[[], object]] = {}

    def model_with(head: nn.Module, width: int) -> SimilarityModel:
        net = torchvision.models.resnet18().eval().to(args.device)
        net.fc = head.to(args.device)
        return SimilarityModel(net, torch.randn(args.references, width))

    pooled = model_with(nn.Identity(), 512)

    def bare() -> None:
        with torch.no_grad():
            pooled(images)

    def loop() -> None:
        explainer = LayerGradCam(pooled, pooled.encoder.layer4)
        for target in range(LOOPED):
            explainer.attribute(images, target)

    calls["bare forward pass of the queries, no_grad"] = bare
    for name, model in {
        "pooled embedding": pooled,
        "linear projection": model_with(nn.Linear(512, 128), 128),
        "projection with a hidden layer": model_with(head, 128),
    }.items():
        for rule in ("fam", "centred"):
            explainer = LayerFam(model, model.encoder.layer4, rule=rule)
            calls[f'{name}, rule "{rule}"'] = lambda e=explainer: e.attribute_references(images)
    calls[f"Captum's LayerGradCam, {LOOPED} targets times {args.references // LOOPED}"] = loop

    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # warm up
        call()
    for _ in range(args.rounds):
        for name, call in calls.items():
            spent = milliseconds(call, args.device)
            times[name].append(spent * (args.references / LOOPED if call is loop else 1))
    memory = {name: peak_memory(call, args.device) for name, call in calls.items()}
    passes: list[int] = []
    counter = pooled.encoder.layer4.register_forward_hook(lambda *_: passes.append(1))
    LayerFam(pooled, pooled.encoder.layer4, rule="centred").attribute_references(images)
    counter.remove()

    where = (
        torch.cuda.get_device_name()
        if args.device.startswith("cuda")
        else f"CPU, {torch.get_num_threads()} threads"
    )
    first = next(iter(calls))
    print(
        f"ResNet-18, {args.batch} queries x {args.references} references, {args.size} px, {where}, "
        f"torch {torch.__version__}\n"
    )
    print("| | ms | x bare | peak MiB |\n|---|---|---|---|")
    for name in calls:
        ratio = median(t / b for t, b in zip(times[name], times[first], strict=True))
        print(f"| {name} | {median(times[name]):.0f} | {ratio:.2f} | {memory[name] / 2**20:.1f} |")
    assert len(passes) == 1, f"{len(passes)} forward passes for {args.references} references"
    for name in ("pooled embedding", "linear projection"):
        for rule in ("fam", "centred"):
            found = memory[f'{name}, rule "{rule}"'] / memory[first]
            assert found <= 1.5, f"{name}, {rule}: {found:.2f} x the memory of a forward pass"


if __name__ == "__main__":
    main()
