"""Images per second of explain_dataset beside embedding the same data alone.

Both load by the same number of workers, in batches of the same size, and take the embedding or the
maps to the host; only explain_dataset writes. Rounds are interleaved, the ratio is the median over
rounds of one right behind the other, so that it holds on a busy machine.

    python -m tests.benchmarks.dataset                     # some minutes on two cores
    python -m tests.benchmarks.dataset --quick             # seconds: small images, one network
    python -m tests.benchmarks.dataset --json dataset.json

With ``--quick`` it fails where rows are missing or the forward passes are more than one per image.
Without, also where a ratio is less than .90: on a GPU that by the clock, on a CPU that of processor
time, because others may keep the clock waiting.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fam_plugins import LayerFam, SimilarityModel
from fam_plugins.dataset import explain_dataset, read_maps


class Images(Dataset):
    """Pictures that take a decoder's time to make: noise, scaled up and normalised."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[str, Tensor]:
        drawn = torch.Generator().manual_seed(row)
        small = torch.rand(1, 3, self.size // 8, self.size // 8, generator=drawn)
        image = nn.functional.interpolate(small, size=self.size, mode="bilinear")[0]
        return f"{row:06d}", (image - 0.5) / 0.25


def clock() -> np.ndarray:
    """Seconds by the clock, and of all threads of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def embed(model: SimilarityModel, data: Dataset, args: argparse.Namespace) -> np.ndarray:
    """What embedding alone takes, in inference mode."""
    start = clock()
    loader = DataLoader(
        data,
        batch_size=args.batch,
        num_workers=args.workers,
        pin_memory=args.device.startswith("cuda"),
    )
    with torch.inference_mode():
        for _, images in loader:
            model.embed(images.to(args.device, non_blocking=True)).cpu()
    return clock() - start


def explain(made: LayerFam, data: Dataset, args: argparse.Namespace, **options: int) -> np.ndarray:
    with tempfile.TemporaryDirectory() as out:
        start = clock()
        explain_dataset(
            made,
            data,
            out,
            batch_size=args.batch,
            num_workers=args.workers,
            progress=False,
            **options,
        )
        spent = clock() - start
        rows = read_maps(out)[0].count_rows()
        wanted = len(data) * options.get("top_k", args.references)
        assert rows == wanted, f"{rows} rows, not {wanted}"
    return spent


def note(passes: list[int], _module: nn.Module, given: tuple[Tensor], _output: Tensor) -> None:
    passes.append(len(given[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--references", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    parser.add_argument("--quick", action="store_true", help="small images, one network")
    args = parser.parse_args()
    names = ["resnet18", "resnet50"]
    if args.quick:
        args.images, args.size, args.rounds, names = 32, 64, 1, names[:1]
    torch.manual_seed(0)
    data = Images(args.images, args.size)
    where = (
        torch.cuda.get_device_name()
        if args.device.startswith("cuda")
        else f"CPU, {torch.get_num_threads()} threads"
    )
    setting = (
        f"{args.images} images of {args.size} px, batches of {args.batch}, {args.workers} workers, "
        f"{where}, torch {torch.__version__}"
    )
    print(f"{setting}\n")
    print(
        "| network | references | ratio | of processor time | embedding alone, images/s | "
        "explain_dataset, images/s |\n|---|---|---|---|---|---|"
    )
    found = []
    for name in names:
        net = getattr(torchvision.models, name)().eval().to(args.device)
        width, net.fc = net.fc.in_features, nn.Identity()
        model = SimilarityModel(net, torch.randn(args.references, width), contrast="others")
        made = LayerFam(model, "layer4", rule="centred", smooth=True)
        cases = {f"all of {args.references}": {}, "the best": {"top_k": 1}}
        few = Images(args.batch, args.size)
        embed(model, few, args)  # warm up
        explain(made, few, args)
        passes: list[int] = []
        counter = net.conv1.register_forward_hook(partial(note, passes))
        times: dict[str, list[np.ndarray]] = {case: [] for case in ("alone", *cases)}
        for _ in range(args.rounds):
            times["alone"].append(embed(model, data, args))
            for case, options in cases.items():
                passes.clear()
                times[case].append(explain(made, data, args, **options))
                assert sum(passes) == len(data), f"{sum(passes)} passes for {len(data)} images"
        counter.remove()
        for case in cases:
            by_clock, by_work = (np.array(times["alone"]) / np.array(times[case])).T
            row = {
                "network": name,
                "references": case,
                "ratio": median(by_clock),
                "spread": [by_clock.min(), by_clock.max()],
                "ratio of processor time": median(by_work),
                "embedding alone": args.images / median(spent[0] for spent in times["alone"]),
                "explain_dataset": args.images / median(spent[0] for spent in times[case]),
            }
            print(
                f"| {name} | {case} | {row['ratio']:.2f} ({by_clock.min():.2f} to "
                f"{by_clock.max():.2f}) | {row['ratio of processor time']:.2f} | "
                f"{row['embedding alone']:.1f} | {row['explain_dataset']:.1f} |",
                flush=True,
            )
            found.append(row)
    if args.json:
        args.json.write_text(json.dumps({"setting": setting, "rows": found}, indent=1) + "\n")
    if not args.quick:
        judged = "ratio" if args.device.startswith("cuda") else "ratio of processor time"
        slow = [f"{row['network']}: {row[judged]:.2f}" for row in found if row[judged] < 0.9]
        assert not slow, f"less than .90 of embedding alone: {', '.join(slow)}"


if __name__ == "__main__":
    main()
