"""One model, several threads that explain it, several that only call it: a web server's day."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from fam_plugins import FAM, LayerFam, SimilarityModel, explain_pair
from tests.networks import State, encoder

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def fam(model: SimilarityModel) -> torch.Tensor:
    cam = FAM(model, ["last"], rule="additive")
    cam(IMAGES)
    return cam.attributions[0]


EXPLAIN: dict[str, Callable[[SimilarityModel], torch.Tensor]] = {
    "LayerFam": lambda m: LayerFam(m, "last", rule="additive").attribute(IMAGES, 1),
    "attribute_references": lambda m: LayerFam(m, "last", rule="additive").attribute_references(
        IMAGES
    ),
    "FAM": fam,
    "explain_pair": lambda m: explain_pair(m.encoder, "last", IMAGES, IMAGES.flip(0)).map_a,
}


def run_side_by_side(jobs: list[Callable[[], None]], rounds: int) -> list[BaseException]:
    failed: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def repeat(job: Callable[[], None]) -> None:
        start.wait()
        try:
            for _ in range(rounds):
                job()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=repeat, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


@pytest.mark.parametrize("name", EXPLAIN)
def test_explaining_disturbs_nobody(name):
    model = SimilarityModel(encoder(), ROWS)
    expected, scores = EXPLAIN[name](model), model(IMAGES).detach()
    before = State.of(model)

    def explain() -> None:
        torch.testing.assert_close(EXPLAIN[name](model), expected)

    def only_call() -> None:
        with torch.no_grad():
            found = model(IMAGES)
        assert not found.requires_grad
        torch.testing.assert_close(found, scores)

    assert not run_side_by_side([explain] * 4 + [only_call] * 4, rounds=25)
    before.assert_unchanged(model)


@pytest.mark.parametrize("name", ["FAM", "explain_pair"])
def test_eval_mode_held_by_several_threads_is_given_back(name):
    """The mode that counts is the one before the first thread, not what another one left."""
    model = SimilarityModel(encoder(), ROWS).train()
    model.encoder.norm.eval()
    before = State.of(model)
    expected = EXPLAIN[name](model)

    def explain() -> None:
        torch.testing.assert_close(EXPLAIN[name](model), expected)

    assert not run_side_by_side([explain] * 4, rounds=40)
    before.assert_unchanged(model)
