"""How long a map takes beside a bare forward pass: ours, both partners' methods, torchcam's.

One run, interleaved, ratios first: time is the median over rounds of the ratio to the bare forward
pass of the same round, with its quartiles. Bytes are what a call hands to ``Tensor.cpu``, which on
a GPU would leave it; passes are runs of the layer. Peers that take longer than twice the bare pass
have fewer rounds; on the CPU it is the time of the process on all its threads, which the load of a
shared machine stretches little. ScoreCAM, which runs the model for every channel, has the smallest
network only.

    python -m tests.benchmarks.speed --out out     # writes out/speed.json and out/speed.md
    python -m tests.benchmarks.speed --batches 1   # a third of the time
    python -m tests.benchmarks.speed --quick       # a minute: two small networks, 96 px

Further tables: recorded and exported models, queries times references as both grow, resolution and
depth, and whole data sets; those of parts that cannot be imported are left out, and that is said.
Fails where ours needs more than one pass, hands an activation to the host, or where a map costs
more than GradCAM's.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torchvision
from captum.attr import LayerGradCam
from pytorch_grad_cam import EigenCAM, GradCAM, HiResCAM, ScoreCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from fam_plugins import CAPE, FAM, LayerCape, LayerFam, SimilarityModel, tokens_to_map
from fam_plugins.cape import with_cape_head
from fam_plugins.core.rules import RULES
from tests.benchmarks.cost import interleaved, milliseconds, peak_memory

Calls = dict[str, Callable[[], object]]
Row = dict[str, Any]

BARE = "bare forward pass, no_grad"
REFERENCES = 10
HEADERS = {
    "ratio": "x bare",
    "quartiles": "quartiles",
    "ms": "ms",
    "passes": "passes",
    "memory": "peak x bare",
    "to host": "KiB to the host",
}


def torchvision_net(name: str, head: str, layer: str) -> Callable[[], tuple[nn.Module, str]]:
    def build() -> tuple[nn.Module, str]:
        net = getattr(torchvision.models, name)().eval()
        setattr(net, head, nn.Flatten(1))  # of ConvNeXt, whose pooling leaves [B, C, 1, 1]
        return net, layer

    return build


def vit() -> tuple[nn.Module, str]:
    net = torchvision.models.VisionTransformer(224, 16, 12, 6, 384, 1536).eval()
    net.heads = nn.Identity()
    return net, "encoder.layers.encoder_layer_5"


NETS: dict[str, Callable[[], tuple[nn.Module, str]]] = {
    "MobileNetV3-Small": torchvision_net("mobilenet_v3_small", "classifier", "features"),
    "ResNet-18": torchvision_net("resnet18", "fc", "layer4"),
    "MobileNetV2": torchvision_net("mobilenet_v2", "classifier", "features"),
    "ViT-S/16, middle block": vit,
    "ResNet-50": torchvision_net("resnet50", "fc", "layer4"),
    "ConvNeXt-T": torchvision_net("convnext_tiny", "classifier", "features"),
}


def similarity(net: nn.Module, images: Tensor, count: int = REFERENCES) -> SimilarityModel:
    with torch.no_grad():
        width = net(images[:1]).shape[1]
    return SimilarityModel(net, torch.randn(count, width))


def bare_pass(model: nn.Module, images: Tensor) -> Callable[[], object]:
    def bare() -> object:
        with torch.no_grad():
            return model(images)

    return bare


def ours(model: SimilarityModel, layer: str, images: Tensor, *, every: bool) -> Calls:
    """Our explainers under every rule and tail, or the recommended one alone."""
    targets = [ClassifierOutputTarget(3)] * len(images)
    calls: Calls = {}
    for rule in RULES if every else ("centred",):
        for tail in (None, "true") if every and RULES[rule].tail != "true" else (None,):
            name = f"{rule}, true tail" if tail else rule
            layer_fam = LayerFam(model, layer, rule=rule, tail=tail)
            calls[f"LayerFam, {name}"] = partial(layer_fam.attribute, images, 3)
            cam = FAM(model, [layer], rule=rule, tail=tail)
            calls[f"FAM, {name}"] = partial(cam, images, targets)
    return calls


def recorded(model: SimilarityModel, layer: str, images: Tensor) -> Calls:
    try:
        from fam_plugins.export import MapModel
    except ImportError as error:
        print(f"MapModel is left out: {error}")
        return {}
    one = MapModel(model, f"encoder.{layer}", rule="centred", example=images[:1])
    return {f"MapModel, centred, all {REFERENCES} references": bare_pass(one, images)}


def peers(model: SimilarityModel, layer: str, images: Tensor, *, every: bool) -> Calls:
    """The partners' methods and torchcam's, on the same model, layer and targets."""
    module, targets = model.encoder.get_submodule(layer), [ClassifierOutputTarget(3)] * len(images)
    tokens = layer.startswith("encoder.layers")
    transform = tokens_to_map(14, 14) if tokens else None

    def cam(method: Any) -> Callable[[], object]:
        def call() -> None:
            with method(model, [module], reshape_transform=transform) as one:
                one(images, targets)
            model.zero_grad(set_to_none=True)

        return call

    calls: Calls = {"pytorch-grad-cam's GradCAM": cam(GradCAM)}
    if not tokens:
        captum = LayerGradCam(model, module)
        calls["Captum's LayerGradCam"] = partial(captum.attribute, images, 3)
    if every:
        calls |= {"HiResCAM": cam(HiResCAM), "EigenCAM": cam(EigenCAM)}
        calls |= of_torchcam(model, layer, images)
    return calls


def of_torchcam(model: SimilarityModel, layer: str, images: Tensor) -> Calls:
    try:
        from torchcam import methods
    except ImportError as error:
        print(f"torchcam is left out: {error}")
        return {}
    if layer.startswith("encoder.layers"):
        blocks = model.encoder.encoder

        def score(tokens: Tensor) -> Tensor:
            return model.score(blocks.ln(tokens)[:, 0])

        def le_grad() -> None:
            every = list(blocks.layers)
            with methods.LeGrad(model.encoder, every, score_projection=score) as extractor:
                model.encoder(images)
                extractor([3] * len(images), normalized=False)
            model.zero_grad(set_to_none=True)

        return {"torchcam's LeGrad, all blocks": le_grad}

    def grad_cam() -> None:
        with methods.GradCAM(model, f"encoder.{layer}") as extractor:
            extractor(3, model(images))
        model.zero_grad(set_to_none=True)

    return {"torchcam's GradCAM": grad_cam}


def cape(images: Tensor) -> Calls:
    """CAPE's explainers, on a ResNet-18 whose classifier they stand beside."""
    model = with_cape_head(torchvision.models.resnet18().eval()).to(images.device)
    targets = [ClassifierOutputTarget(3)] * len(images)
    cam = CAPE(model)
    return {
        "with a CAPE head, bare": bare_pass(model, images),
        "LayerCape": partial(LayerCape(model).attribute, images, 3),
        "CAPE": partial(cam, images, targets),
    }


@contextmanager
def counted(layer: nn.Module) -> Iterator[dict[str, int]]:
    """How often a layer runs within the block, and the bytes that ``Tensor.cpu`` hands out."""
    found, known, real = {"passes": 0, "bytes": 0}, set[int](), Tensor.cpu

    def cpu(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # On the CPU it returns the tensor itself, which may be asked again.
        if tensor.data_ptr() not in known:
            found["bytes"] += tensor.nbytes
        moved = real(tensor, *args, **kwargs)
        known.update((tensor.data_ptr(), moved.data_ptr()))
        return moved

    def count(*_: Any) -> None:
        found["passes"] += 1

    handle = layer.register_forward_hook(count)
    Tensor.cpu = cpu
    try:
        yield found
    finally:
        Tensor.cpu = real
        handle.remove()


def measured(calls: Calls, layer: nn.Module | None, args: argparse.Namespace) -> dict[str, Row]:
    """Every call beside the first one: many rounds of the quick ones, few of the slow."""
    first = next(iter(calls))
    calls[first]()
    once = {name: milliseconds(call, args.device, args.clock) for name, call in calls.items()}
    slow = {name for name in calls if once[name] > 2 * once[first]}
    groups = [[n for n in calls if n not in slow], [first, *slow]]
    rows: dict[str, Row] = {}
    for group, budget in zip(groups, (args.seconds, args.seconds / 3), strict=True):
        needed = sum(once[name] for name in group) / 1000
        rounds = min(max(round(budget / needed), 3), 101)
        if len(group) < 2 and rows:
            continue
        chosen = {name: calls[name] for name in group}
        times = interleaved(chosen, rounds, args.device, args.clock)
        for name in group:
            ratios = [t / b for t, b in zip(times[name], times[first], strict=True)]
            low, _, high = quantiles(ratios, n=4)
            row = {"ratio": median(ratios), "low": low, "high": high, "rounds": rounds}
            rows.setdefault(name, row | {"ms": median(times[name])})
    if layer is not None:
        for name, call in calls.items():
            with counted(layer) as found:
                # The profiler sees every operation of every pass, for ScoreCAM too many.
                peak = None if name == "ScoreCAM" else peak_memory(call, args.device)
                if peak is None:
                    call()
            rows[name] |= {"passes": found["passes"], "to host": found["bytes"] / 1024}
            rows[name]["bytes"] = peak
        for row in rows.values():
            row["memory"] = row["bytes"] and row["bytes"] / max(rows[first]["bytes"], 1)
    return {name: rows[name] for name in calls}


def table(title: str, rows: dict[str, Row]) -> str:
    """Markdown of rows, ratios first."""
    columns = [c for c in HEADERS if c == "quartiles" or any(c in row for row in rows.values())]
    lines = [f"\n{title}\n", "| | " + " | ".join(HEADERS[c] for c in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        shown = {
            "ratio": f"{row['ratio']:.2f}",
            "quartiles": f"{row['low']:.2f} to {row['high']:.2f}",
            "ms": f"{row['ms']:.1f}",
            "passes": str(row.get("passes") or ""),  # a recording runs no module
            "memory": "" if row.get("memory") is None else f"{row['memory']:.2f}",
            "to host": f"{row.get('to host', 0):.1f}",
        }
        lines.append(f"| {name} | " + " | ".join(shown[c] for c in columns) + " |")
    return "\n".join(lines)


def explainers(name: str, batch: int, args: argparse.Namespace) -> dict[str, Row]:
    """One network and batch: every method for single images, the usual ones for more."""
    net, layer = NETS[name]()
    images = torch.randn(batch, 3, args.size, args.size, device=args.device)
    model, every = similarity(net.to(args.device), images), batch == 1
    calls: Calls = {BARE: bare_pass(model, images)}
    calls |= ours(model, layer, images, every=every) | recorded(model, layer, images)
    calls |= peers(model, layer, images, every=every)
    if every and name == "MobileNetV3-Small" and not args.quick:
        scorecam = partial(ScoreCAM, model, [net.get_submodule(layer)])
        calls["ScoreCAM"] = lambda: scorecam()(images, [ClassifierOutputTarget(3)])
    rows = measured(calls, net.get_submodule(layer), args)
    for row, found in rows.items():
        if row.startswith(("LayerFam", "FAM")):
            assert found["passes"] == 1, f"{row} on {name} takes {found['passes']} passes"
            assert found["to host"] * 1024 <= 4 * batch * args.size**2, f"{row} moves activations"
    cheapest = rows["pytorch-grad-cam's GradCAM"]["ratio"]
    assert rows["LayerFam, centred"]["ratio"] < cheapest, f"a map on {name} costs more than GradCAM"
    return rows


def exported(args: argparse.Namespace) -> dict[str, Row]:
    """A recorded ResNet-18 beside its encoder, each eager, compiled and in ONNX Runtime."""
    try:
        import onnxruntime

        from fam_plugins.export import MapModel
    except ImportError as error:
        print(f"Exported models are left out: {error}")
        return {}
    net, layer = NETS["ResNet-18"]()
    images = torch.randn(8, 3, args.size, args.size)
    model = similarity(net, images)
    both = {"encoder": net, "MapModel": MapModel(model, layer, rule="centred", example=images[:1])}
    calls: Calls = {}
    for name, one in both.items():
        calls[f"{name}, eager"] = bare_pass(one, images)
        calls[f"{name}, compiled"] = bare_pass(torch.compile(one, fullgraph=True), images)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            options = {"dynamo": True, "verbose": False, "dynamic_shapes": ({0: "batch"},)}
            torch.onnx.export(one, (images,), file, **options)
            alike = onnxruntime.SessionOptions()
            alike.intra_op_num_threads = torch.get_num_threads()
            session = onnxruntime.InferenceSession(file, alike, ["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: images.numpy()}
        calls[f"{name}, ONNX Runtime"] = partial(session.run, None, feed)
    rows = {}
    for kind in ("eager", "compiled", "ONNX Runtime"):
        pair = {name: calls[name] for name in (f"encoder, {kind}", f"MapModel, {kind}")}
        rows |= measured(pair, None, args)
    return rows


def many(args: argparse.Namespace) -> list[Row]:
    """Queries times references on ResNet-18: the ratio to the bare pass of the queries."""
    rows = []
    counts = (1, 16, 64) if args.quick else (1, 16, 256, 4096)
    for batch in (1, 4) if args.quick else (1, 8, 32):
        for count in counts:
            net, layer = NETS["ResNet-18"]()
            images = torch.randn(batch, 3, args.size, args.size, device=args.device)
            model = similarity(net.to(args.device), images, count)
            explainer = LayerFam(model, layer, rule="centred")
            with counted(net.get_submodule(layer)) as found:
                explainer.attribute_references(images)
            assert found["passes"] == 1, f"{found['passes']} passes for {count} references"
            calls = {"bare": bare_pass(model, images)}
            calls["maps"] = partial(explainer.attribute_references, images)
            row = measured(calls, None, args)
            extra = row["maps"]["ms"] - row["bare"]["ms"]
            per_map = 1000 * extra / (batch * count)
            rows.append({"queries": batch, "references": count, "µs": per_map} | row["maps"])
    return rows


def growth(args: argparse.Namespace) -> dict[str, Row]:
    """What resolution and depth do to a map of ResNet-18."""
    rows = {}
    for size in (64, 96) if args.quick else (112, 224, 448):
        for layer in ("layer4",) if size != args.size else ("layer4", "layer3", "layer2", "layer1"):
            net, _ = NETS["ResNet-18"]()
            images = torch.randn(4, 3, size, size, device=args.device)
            model = similarity(net.to(args.device), images)
            calls: Calls = {"bare": bare_pass(model, images)}
            calls["map"] = partial(LayerFam(model, layer, rule="centred").attribute, images, 3)
            found = measured(calls, net.get_submodule(layer), args)["map"]
            rows[f"{size} px, {layer}"] = found
    return rows


def dataset(args: argparse.Namespace) -> dict[str, Row]:
    """Images per second of whole data sets, beside embedding them alone with the same loader."""
    try:
        from fam_plugins.dataset import explain_dataset
    except ImportError as error:
        print(f"explain_dataset is left out: {error}")
        return {}
    net, layer = NETS["ResNet-18"]()
    images = torch.randn(16 if args.quick else 128, 3, args.size, args.size)
    items = [(str(number), image) for number, image in enumerate(images)]
    model = similarity(net.to(args.device), images)
    explainer = LayerFam(model, layer, rule="centred")

    def embed() -> None:
        with torch.no_grad():
            for _, batch in torch.utils.data.DataLoader(items, batch_size=8):
                model(batch.to(args.device))

    def explain() -> None:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "maps"
            explain_dataset(explainer, items, out, top_k=1, batch_size=8, progress=False)

    return measured(
        {f"embedding {len(items)} images": embed, "explain_dataset": explain}, None, args
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=4, help="for each network and batch")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--out", type=Path, help="folder for speed.json and speed.md")
    parser.add_argument("--quick", action="store_true", help="two small networks, 96 px")
    args = parser.parse_args()
    start = time.perf_counter()
    if args.quick:
        args.size, args.seconds, args.nets, args.batches = 96, 1.5, args.nets[:2], [1, 4]
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", 'the regions carry|rule "fam" rescales')
    cuda = args.device.startswith("cuda")
    args.clock = time.perf_counter if cuda else time.process_time
    kind = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    clock = "wall time" if cuda else "CPU time"
    where = f"{kind}, {clock}, torch {torch.__version__}, {args.size} px"
    found: dict[str, Any] = {"where": where, "load": os.getloadavg()}
    printed = []

    def show(text: str) -> None:
        printed.append(text)
        print(text, flush=True)

    show(where)
    for name in args.nets:
        for batch in args.batches:
            found[f"{name}, batch {batch}"] = rows = explainers(name, batch, args)
            show(table(f"{name}, batch {batch}", rows))
    images = torch.randn(8, 3, args.size, args.size, device=args.device)
    found["CAPE"] = measured(cape(images), None, args)
    show(table("ResNet-18, batch 8, against its CAPE head", found["CAPE"]))
    found["growth"] = growth(args)
    show(table("ResNet-18, batch 4, centred: resolution and depth", found["growth"]))
    found["many"] = many(args)
    show("\nResNet-18, queries x references\n")
    show("| queries | references | x bare | quartiles | µs per map |\n|---|---|---|---|---|")
    for row in found["many"]:
        spread = f"{row['low']:.2f} to {row['high']:.2f}"
        name = f"| {row['queries']} | {row['references']:,} "
        show(f"{name}| {row['ratio']:.2f} | {spread} | {row['µs']:.0f} |")
    for title, further in (("Recorded and exported", exported), ("Data set", dataset)):
        rows = {} if args.quick and further is exported else further(args)
        if rows:
            found[title] = rows
            show(table(f"{title}, ResNet-18, batch 8", rows))
    print(f"\n{time.perf_counter() - start:.0f} s")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "speed.json").write_text(json.dumps(found, indent=1) + "\n")
        (args.out / "speed.md").write_text("\n".join(printed) + "\n")


if __name__ == "__main__":
    main()
