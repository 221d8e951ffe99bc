"""What an explanation costs beside a bare forward pass, and beside the partners' Grad-CAM.

Everything is measured in one run, interleaved, so that the ratios hold on a busy machine. Time is
the median over rounds. Memory is the peak that torch's allocator reaches during one call: on CUDA
as torch counts it, on the CPU by summing the allocations and releases that torch's profiler saw.

    python -m tests.benchmarks.cost            # two minutes on two cores
    python -m tests.benchmarks.cost --quick    # seconds: small images, two rounds

Either way it fails where an explanation holds much more memory than a forward pass: that is what
replaces the graph of the partners' backward pass. Times are printed and not judged.

The second table is of a transformer, ViT-S/16 with a class token: what a frozen tail costs from a
late, a middle and the first layer on. It needs timm.

The third table is of one pair of images: the joint matrix of ``explain_pair`` against the bare
forward passes of both, and, at a quarter of the size, against a backward pass per dimension of
both embeddings, which is how BiLRP (arXiv 2003.05405) finds such a matrix.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median

import torch
import torchvision
from captum.attr import LayerGradCam
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch.profiler import ProfilerActivity, profile

from fam_plugins import FAM, LayerFam, SimilarityModel, explain_pair, tokens_to_map


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Peak of the bytes allocated by one call, above what was allocated before it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    sizes = [
        event.nbytes()
        for event in sorted(record.profiler.kineto_results.events(), key=_start)
        if event.name() == "[memory]"
    ]
    now = peak = 0
    for size in sizes:
        now += size
        peak = max(peak, now)
    return peak


def _start(event: object) -> int:
    """When a profiler event began; torch before 2.4 has it in microseconds."""
    return event.start_ns() if hasattr(event, "start_ns") else event.start_us()


def milliseconds(
    call: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter
) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = clock()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return 1000 * (clock() - start)


def interleaved(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of every call in every round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # warm up
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(milliseconds(call, device, clock))
    return times


def a_backward_pass_per_dimension(
    net: torch.nn.Module, layer: torch.nn.Module, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """The joint matrix of the dot product, ``[Ra, Rb]``, from gradients through the whole network.

    Gradient times input of every dimension of both embeddings, at the layer for comparison: BiLRP
    goes on to the pixels and uses other rules within, at the same number of passes.
    """
    sides = []
    for image in (a, b):
        kept: list[torch.Tensor] = []
        handle = layer.register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out))
        pixels = image.clone().requires_grad_()
        embedding = net(pixels)[0]
        handle.remove()
        parts = []
        for value in embedding:
            gradient, _ = torch.autograd.grad(value, [kept[0], pixels], retain_graph=True)
            parts.append((gradient * kept[0].detach())[0].sum(dim=0).flatten())
        sides.append(torch.stack(parts))
    return sides[0].T @ sides[1]


def pairs(net: torch.nn.Module, layer: torch.nn.Module, args: argparse.Namespace) -> None:
    """Print the table of the joint matrix; fails where it is another than the slow one."""

    def two(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = torch.randn(2, 1, 3, size, size, device=args.device)
        return first, second

    a, b = two(2 * args.size)

    def bare() -> None:
        with torch.no_grad():
            net(a)
            net(b)

    options: dict[str, object] = {"contrast": torch.ones(1, 2048, device=args.device)}
    calls: dict[str, Callable[[], object]] = {
        "both bare forward passes, no_grad": bare,
        "explain_pair": lambda: explain_pair(net, layer, a, b, **options),
        "explain_pair, joint": lambda: explain_pair(net, layer, a, b, joint=True, **options),
        "explain_pair, joint, pooled": lambda: explain_pair(
            net, layer, a, b, joint=True, embedding="pooled", **options
        ),
    }
    times = interleaved(calls, args.rounds, args.device)
    first = next(iter(calls))
    regions = "x".join(map(str, explain_pair(net, layer, a, b, **options).map_a.shape[2:]))
    print(
        f"\nOne pair, {2 * args.size} px, {regions} regions each\n"
        "\n| | ms | x bare |\n|---|---|---|"
    )
    for name in calls:
        ratio = median(t / r for t, r in zip(times[name], times[first], strict=True))
        print(f"| {name} | {median(times[name]):.0f} | {ratio:.3f} |")

    a, b = two(args.size // 2)
    few = torch.nn.Sequential(net, torch.nn.Linear(2048, 4, bias=False).to(args.device)).eval()
    expected = a_backward_pass_per_dimension(few, layer, a, b)
    slow = milliseconds(lambda: a_backward_pass_per_dimension(few, layer, a, b), args.device)
    fast = milliseconds(lambda: explain_pair(net, layer, a, b, joint=True, **options), args.device)
    ratio = 2048 / 4 * slow / fast
    print(f"\nAt {args.size // 2} px a backward pass per dimension takes {ratio:.0f} x joint")
    print("(measured for 4 of the 2,048 dimensions)")
    options["contrast"] = torch.ones(1, 4, device=args.device)
    found = explain_pair(few, layer, a, b, joint=True, similarity="dot", **options).joint
    torch.testing.assert_close(found[0, :-1, :-1], expected, rtol=1e-3, atol=1e-6)


def transformer(args: argparse.Namespace) -> None:
    """Print the table of ViT-S/16; fails where a late layer holds the memory of an early one."""
    import timm  # only here: the tests borrow from this file without it

    net = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=args.size)
    net = net.eval().to(args.device)
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    model = SimilarityModel(net, torch.randn(10, net.num_features))
    targets = [ClassifierOutputTarget(3)] * args.batch
    layers = {
        "the last block": net.blocks[-2],
        "the middle block": net.blocks[len(net.blocks) // 2 - 1],
        "the patches": net.patch_embed.proj,
    }

    def bare() -> None:
        with torch.no_grad():
            model(images)

    def ours(layer: torch.nn.Module) -> Callable[[], object]:
        return lambda: LayerFam(model, layer, rule="additive").attribute(images, 3)

    def grad_cam() -> None:
        with GradCAM(
            model, [net.blocks[-1].norm1], reshape_transform=tokens_to_map(side, side)
        ) as cam:
            cam(images, targets)
        model.zero_grad(set_to_none=True)

    side = args.size // 16
    calls: dict[str, Callable[[], object]] = {"bare forward pass, no_grad": bare}
    calls |= {f"LayerFam, additive, {at}": ours(layer) for at, layer in layers.items()}
    calls["pytorch-grad-cam's GradCAM, last norm1"] = grad_cam
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the regions carry")  # random weights
        times = interleaved(calls, args.rounds, args.device)
        memory = {name: peak_memory(call, args.device) for name, call in calls.items()}
    print(f"\nViT-S/16, class token, batch {args.batch}, {args.size} px\n")
    table(times, memory)
    _, late, middle, early, _ = memory.values()
    assert late < middle < early, f"memory grows from the layer on: {late}, {middle}, {early}"
    most = 3 * memory["bare forward pass, no_grad"]
    assert late <= most, f"for the last block {late} bytes are held, at most {most} should be"


def table(times: dict[str, list[float]], memory: dict[str, int]) -> None:
    """Print time and memory of calls beside the first of them."""
    first = next(iter(times))
    print("| | ms | x bare | peak MiB | x bare |\n|---|---|---|---|---|")
    for name in times:
        ratio = median(t / b for t, b in zip(times[name], times[first], strict=True))
        print(
            f"| {name} | {median(times[name]):.0f} | {ratio:.2f} | {memory[name] / 2**20:.1f} | "
            f"{memory[name] / memory[first]:.3f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="small images, two rounds")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.size, args.rounds = 2, 128, 2

    torch.manual_seed(0)
    net = torchvision.models.resnet50().eval().to(args.device)
    net.fc = torch.nn.Identity()
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    model = SimilarityModel(net, torch.randn(10, 2048))
    targets = [ClassifierOutputTarget(3)] * args.batch
    explainer = LayerFam(model, net.layer4, rule="fam")
    cam = FAM(model, [net.layer4], rule="fam")

    def bare() -> None:
        with torch.no_grad():
            model(images)

    def grad_cam() -> None:
        with GradCAM(model, [net.layer4]) as theirs:
            theirs(images, targets)
        model.zero_grad(set_to_none=True)

    calls: dict[str, Callable[[], object]] = {
        "bare forward pass, no_grad": bare,
        "LayerFam": lambda: explainer.attribute(images, 3),
        "LayerFam, with convergence delta": lambda: LayerFam(
            model, net.layer4, rule="additive"
        ).attribute(images, 3, return_convergence_delta=True),
        "FAM": lambda: cam(images, targets),
        "Captum's LayerGradCam": lambda: LayerGradCam(model, net.layer4).attribute(images, 3),
        "pytorch-grad-cam's GradCAM": grad_cam,
    }
    times = interleaved(calls, args.rounds, args.device)
    memory = {name: peak_memory(call, args.device) for name, call in calls.items()}

    where = (
        torch.cuda.get_device_name()
        if args.device.startswith("cuda")
        else (f"CPU, {torch.get_num_threads()} threads")
    )
    first = next(iter(calls))
    print(f"ResNet-50, batch {args.batch}, {args.size} px, {where}, torch {torch.__version__}\n")
    table(times, memory)
    for name, most in {
        "LayerFam": 1.2,
        "FAM": 1.2,
        "LayerFam, with convergence delta": 1.5,
    }.items():
        found = memory[name] / memory[first]
        assert found <= most, f"{name} holds {found:.2f} x the memory of a forward pass"
    for name in ("Captum's LayerGradCam", "pytorch-grad-cam's GradCAM"):
        # Were the partners' as low, the measurement would be blind.
        found = memory[name] / memory["LayerFam"]
        assert found > 1.5, f"{name} holds only {found:.2f} x the memory of LayerFam"
    transformer(args)
    pairs(net, net.layer4, args)


if __name__ == "__main__":
    main()
