"""The README's table of architectures, measured: what the maps of each family add up to.

Random weights and float64: this proves interfaces and arithmetic, not what a network sees.

    python -m tests.benchmarks.families            # every row of the table
    python -m tests.benchmarks.families --quick    # one row for each kind of map and transform
"""

from __future__ import annotations

import argparse

import torch
from tqdm.auto import tqdm

from fam_plugins import LayerFam, SimilarityModel, tokens_to_map
from tests.contracts.families import FAMILIES, REFUSED, SIZE, Family, encoder_of


def measured(family: Family, images: torch.Tensor) -> str:
    """The largest gap over the batch, beside the largest score, and the rest; or the refusal."""
    net = encoder_of(family)
    with torch.no_grad():
        width = net(images).shape[1]
    torch.manual_seed(1)
    model = SimilarityModel(net, torch.randn(3, width).double())
    explainer = LayerFam(model, family.layer, rule="additive", reshape_transform="auto")
    try:
        found = explainer.decompose(images, 1)
    except ValueError:
        if family.maps != REFUSED:
            raise
        return REFUSED
    gap, score = found.gap.abs().max(), found.score.abs().max()
    assert gap < 1e-9 * score, f"{family.name}, {family.layer}: {gap:.0e} of {score:.0e}"
    rest = [part for part in found.parts if part != "regions"]
    beside = f"; beside the regions: {', '.join(rest)}" if rest else ""
    return f"{family.maps} (gap {gap:.0e} of {score:.0e}{beside})"


def transform_name(family: Family) -> str:
    if family.transform is None:
        return "none"
    if isinstance(family.transform, tokens_to_map):
        return f"`tokens_to_map(h, w, skip={family.transform.skip})`"
    return "`channels_last_to_map`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one row for each kind")
    quick = parser.parse_args().quick
    kinds = {(family.maps, transform_name(family)): family for family in reversed(FAMILIES)}
    families = list(reversed(kinds.values())) if quick else FAMILIES
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).double()
    rows = [(family, measured(family, images)) for family in tqdm(families, desc="measuring")]
    print("| family | example | layer | transform | maps | why |\n|---|---|---|---|---|---|")
    for family, maps in rows:
        print(
            f"| {family.name} | {family.example} | `{family.layer}` | {transform_name(family)} | "
            f"{maps} | {family.why} |"
        )


if __name__ == "__main__":
    main()
