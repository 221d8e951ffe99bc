"""A layer pass under a rule: what both adapters do between a model and a map."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fam_plugins.core.layer_pass import LayerPass, LayerTensors
from fam_plugins.core.rules import Rule
from fam_plugins.core.similarity import Frozen, frozen_scores

__all__ = ["RulePass", "check_finite"]


T = TypeVar("T")


class RulePass:
    """One forward pass whose scores are frozen if the rule asks for it.

    Args:
        layers: The layers to explain.
        names: What to call them in messages.
        rule: The rule that the gradients are for.
        at_input: Take each layer's input instead of its output.

    Example:
        >>> import torch
        >>> from fam_plugins.core.rules import RULES
        >>> net = nn.Sequential(nn.ReLU(), nn.Flatten())
        >>> one = RulePass([net[0]], ["relu"], RULES["additive"])
        >>> out = one.run(lambda: net(torch.tensor([[-1.0, 2.0]])))
        >>> one.gradients(lambda: out[:, 1])
        [(tensor([[0., 1.]]),)]
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        names: Sequence[str],
        rule: Rule,
        *,
        at_input: bool = False,
    ) -> None:
        self._where = (layers, names)
        self._at_input = at_input
        self._rule = rule
        self._frozen = Frozen()
        self._pass = LayerPass(layers, names, at_input=at_input)

    def run(self, forward: Callable[[], T]) -> T:
        """Run the model once; errors as for :meth:`fam_plugins.core.layer_pass.LayerPass.run`."""
        with self.frozen():
            return self._pass.run(forward)

    @property
    def activations(self) -> list[LayerTensors]:
        """What each layer gave, detached."""
        return self._pass.activations

    def gradients(self, score: Callable[[], Tensor], **grad_kwargs: Any) -> list[LayerTensors]:
        """Differentiate the score that ``score`` computes from the output of :meth:`run`.

        Warns:
            UserWarning: If the rule is ``fam`` and the score has a contrast set.
        """
        with self.frozen():
            found = self._pass.gradients(score, **grad_kwargs)
        self.warn_about_contrast(stacklevel=4)
        return found

    def many_gradients(self, output: Tensor, cotangents: Tensor) -> list[list[Tensor]]:
        """As :meth:`fam_plugins.core.layer_pass.LayerPass.many_gradients`."""
        return self._pass.many_gradients(output, cotangents)

    def frozen(self) -> AbstractContextManager[object]:
        """Within the block, scores are frozen if the rule asks for it, as during :meth:`run`."""
        return frozen_scores(self._frozen) if self._rule.frozen else nullcontext()

    def warn_about_contrast(self, *, stacklevel: int = 3) -> None:
        """Warn if the rule is ``fam`` and a score so far had a contrast set."""
        if self._rule.name == "fam" and self._frozen.contrasted:
            warnings.warn(
                'rule "fam" rescales every channel to [0, 1], which undoes the contrast: with '
                'contrast use rule="centred" (recommended), "additive" or "gradcam"',
                UserWarning,
                stacklevel=stacklevel + 1,
            )

    def constant(self, forward: Callable[[], Tensor]) -> Tensor:
        """Evaluate the score at a layer of zeros: the part that no region can be given.

        Costs a second forward pass. The scores stay frozen where :meth:`run` froze them.

        Args:
            forward: Runs the model on the same inputs and selects the score ``[B]``.
        """
        zeros = LayerPass(*self._where, at_input=self._at_input, zeros=True)
        with frozen_scores(self._frozen, replay=True):
            return zeros.run(forward)


def check_finite(attribution: Tensor) -> Tensor:
    """Return a map as it is, or refuse it: pictures and metrics would show NaN as evidence.

    Args:
        attribution: A map of any shape.

    Raises:
        ValueError: If a value is NaN or infinite.

    Example:
        >>> check_finite(torch.ones(1))
        tensor([1.])
    """
    if not torch.isfinite(attribution).all():
        raise ValueError(
            "the map holds NaN or infinite values: check the input and the weights, and for "
            "float16 the range (bfloat16 or float32 have more)"
        )
    return attribution
