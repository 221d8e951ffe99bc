"""A few-shot classifier of easyfsl explained: the predicted class, and against the runner-up.

Trains an embedding on scikit-learn's digits, hands it to easyfsl's PrototypicalNetworks, takes the
classifier over with ``from_easyfsl``, and explains mosaics: four digits in one
query, one prototype for each.

The published rule is weak at telling objects apart, and the printed numbers show it; the picture is
that of "centred" with a contrast set.

    pip install easyfsl
    python compat_examples/few_shot_easyfsl.py --out out
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import digits as digits_data
import torch
from easyfsl.methods import PrototypicalNetworks

from fam_plugins import LayerFam
from fam_plugins.interop.easyfsl import from_easyfsl
from fam_plugins.plots import plot_episode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=250)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    digits = digits_data.load()
    encoder = digits_data.train_encoder(digits, steps=args.steps)
    print(f"ten-way five-shot accuracy: {digits_data.few_shot_accuracy(encoder, digits):.1%}")

    energy: dict[str, list[float]] = {}
    apart = 0.0
    for mosaic in digits_data.mosaics(digits, 50):
        classifier = PrototypicalNetworks(encoder).eval()
        classifier.process_support_set(mosaic.supports, torch.tensor(mosaic.support_labels))
        plain = from_easyfsl(classifier)
        contrasted = from_easyfsl(classifier, contrast="others")
        query = mosaic.query[None]
        with torch.no_grad():
            scores = classifier(query)
            apart = max(apart, float((plain(query) - scores).abs().max()))
        best, runner_up = scores.argsort(descending=True)[0, :2].tolist()
        # Predicted against the runner-up: the runner-up's prototype is the contrast.
        against = from_easyfsl(classifier, contrast=classifier.prototypes[runner_up, None].detach())
        for name, model, rule in (
            ("predicted, published rule, no contrast", plain, "fam"),
            ("predicted against the others, centred", contrasted, "centred"),
            ("predicted against the runner-up, centred", against, "centred"),
        ):
            maps = LayerFam(model, encoder.features, rule=rule).attribute(query, target=best)
            share, _ = digits_data.energy_and_pointing(maps[0, 0], best)
            energy.setdefault(name, []).append(share)
    print(f"scores differ from the classifier's by at most {apart:.0e}\n")
    print("energy on the predicted digit (0.25 by chance), 50 mosaics:")
    for name, shares in energy.items():
        print(f"  {sum(shares) / len(shares):.2f}  {name}")

    # The last mosaic: every prototype in one call.
    maps = LayerFam(contrasted, encoder.features, rule="centred").attribute_references(query)
    first = [mosaic.support_labels.index(label) for label in range(4)]
    figure = plot_episode(
        query, mosaic.supports[first], maps, scores=contrasted(query), labels=mosaic.digits,
        rule="centred",
    )  # fmt: skip
    path = args.out / "few_shot_easyfsl.png"
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")

    assert apart < 1e-4, f"the scores are {apart:.0e} away from the classifier's"
    published, others, runner_up = (sum(shares) / len(shares) for shares in energy.values())
    assert others > 0.5, f"only {others:.2f} of the energy is on the predicted digit"
    assert min(others, runner_up) > published + 0.1, "a contrast finds the digit no better than fam"


if __name__ == "__main__":
    main()
