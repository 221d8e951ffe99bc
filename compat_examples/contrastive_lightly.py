"""The same contrastive encoder with lightly's projection head and loss.

pip install 'fam-plugins[lightly]'
python compat_examples/contrastive_lightly.py --out out
"""

from __future__ import annotations

import contrastive

try:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
except ImportError as error:
    raise SystemExit(
        f"this example needs lightly ({error}): pip install 'fam-plugins[lightly]'"
    ) from error


def encoder() -> contrastive.ContrastiveEncoder:
    return contrastive.ContrastiveEncoder(SimCLRProjectionHead(128, 128, 64))


if __name__ == "__main__":
    contrastive.main(encoder, NTXentLoss(temperature=0.2), "contrastive_lightly")
