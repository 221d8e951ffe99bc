"""easyfsl's own classifiers against the model that is made of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fam_plugins import LayerFam, SimilarityModel
from fam_plugins.interop.easyfsl import from_easyfsl
from tests.networks import State, encoder

methods = pytest.importorskip("easyfsl.methods")

SUPPORT = torch.randn(8, 3, 8, 10, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 2])
QUERIES = torch.randn(5, 3, 8, 10, generator=torch.Generator().manual_seed(1))


def fitted(kind, backbone=None, **options):
    classifier = kind(backbone or encoder(), **options).eval()
    classifier.process_support_set(SUPPORT, LABELS)
    return classifier


@pytest.mark.parametrize("kind", [methods.PrototypicalNetworks, methods.SimpleShot])
@pytest.mark.parametrize("centre", [None, torch.linspace(0, 0.3, 6)], ids=["plain", "centred"])
@pytest.mark.parametrize("power", [None, 1.0, 2.0])
def test_scores_are_those_of_the_classifier(kind, centre, power):
    classifier = fitted(kind, feature_centering=centre, feature_normalization=power)
    before = State.of(classifier)
    model = from_easyfsl(classifier)
    before.assert_unchanged(classifier)
    torch.testing.assert_close(model(QUERIES), classifier(QUERIES), rtol=1e-6, atol=1e-6)
    assert model.labels == (0, 1, 2, 3)
    assert "references" in model.state_dict()
    assert not model.references.requires_grad
    layer = classifier.backbone.last
    best = model(QUERIES).argmax(1)
    for rule in ("centred", "gradcam"):
        maps = LayerFam(model, layer, rule=rule).attribute(QUERIES, best)
        assert maps.shape == (5, 1, 4, 5)
        if rule == "gradcam":
            expected = LayerFam(classifier, layer, rule=rule).attribute(QUERIES, best)
            torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [True, False])
def test_the_centre_is_part_of_the_model_and_the_mode_that_of_the_classifier(mode):
    centre = torch.linspace(0, 0.3, 6)
    classifier = fitted(methods.SimpleShot, feature_centering=centre).train(mode)
    model = from_easyfsl(classifier)
    assert torch.equal(model.state_dict()["encoder.centre"], centre)
    assert {part.training for part in model.modules()} == {mode}


def test_predicted_against_the_runner_up():
    classifier = fitted(methods.PrototypicalNetworks)
    scores = classifier(QUERIES[:1])
    best, second = scores.argsort(descending=True)[0, :2].tolist()
    model = from_easyfsl(classifier, contrast=classifier.prototypes[second : second + 1].detach())
    torch.testing.assert_close(model(QUERIES[:1])[0, best], scores[0, best] - scores[0, second])


def test_a_cosine_classifier_of_the_users_own():
    class Own(methods.FewShotClassifier):
        def forward(self, query_images):
            return self.cosine_distance_to_prototypes(self.compute_features(query_images))

        @staticmethod
        def is_transductive():
            return False

    classifier = fitted(Own)
    torch.testing.assert_close(from_easyfsl(classifier)(QUERIES), classifier(QUERIES))


@pytest.mark.parametrize("power", [None, 2.0])
def test_a_squared_distance_is_told_from_the_distance(power):
    class Squared(methods.PrototypicalNetworks):
        def forward(self, query_images):
            return -super().forward(query_images).square()

    found = {}
    for kind in (methods.SimpleShot, methods.PrototypicalNetworks, Squared):
        classifier = fitted(kind, feature_normalization=power)
        model = from_easyfsl(classifier)
        torch.testing.assert_close(model(QUERIES), classifier(QUERIES), rtol=1e-5, atol=1e-6)
        found[kind.__name__] = model.similarity.split()[0]
    assert found == {
        "SimpleShot": "cosine",
        "PrototypicalNetworks": "euclidean",
        "Squared": "sqeuclidean",
    }


class Warmer(methods.SimpleShot):
    def forward(self, query_images):
        return 1.05 * super().forward(query_images)


def with_feature_maps():
    classifier = fitted(methods.PrototypicalNetworks)
    classifier.prototypes = torch.ones(4, 6, 2, 2)
    return classifier


class Shuffled(methods.SimpleShot):
    def forward(self, query_images):
        return super().forward(query_images).exp()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: methods.PrototypicalNetworks(encoder()), ValueError, "process_support_set"),
        (lambda: fitted(methods.SimpleShot, use_softmax=True), ValueError, "use_softmax = False"),
        (lambda: fitted(methods.BDCSPN), ValueError, "transductive"),
        (
            lambda: fitted(methods.MatchingNetworks, feature_dimension=6),
            ValueError,
            r"attention over its whole support set.*LayerFam\(classifier, layer\)",
        ),
        (lambda: fitted(Shuffled), ValueError, "something other than the cosine"),
        (lambda: fitted(Warmer), ValueError, "something other than the cosine"),
        (with_feature_maps, ValueError, r"shape \(4, 6, 2, 2\), not \[N, D\]"),
        (encoder, TypeError, "no backbone"),
        (lambda: nn.ReLU(), TypeError, "no backbone"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_with_the_reason(make, error, message):
    with pytest.raises(error, match=message):
        from_easyfsl(make())


def test_a_class_without_shots_is_refused():
    classifier = methods.PrototypicalNetworks(encoder()).eval()
    classifier.process_support_set(SUPPORT[:3], torch.tensor([0, 2, 2]))
    with pytest.raises(ValueError, match="class without any support"):
        from_easyfsl(classifier)


def with_relations():
    """A backbone of maps, which this method compares."""
    backbone = encoder()
    backbone.pool, backbone.head = nn.Identity(), nn.Unflatten(1, (6, 4, 5))
    return fitted(methods.RelationNetworks, backbone, feature_dimension=6)


ATTENTION = {"attention_module": nn.MultiheadAttention(6, 2, batch_first=True)}
OUTCOMES = {
    "PrototypicalNetworks": (lambda: fitted(methods.PrototypicalNetworks), ""),
    "SimpleShot": (lambda: fitted(methods.SimpleShot), ""),
    "FEAT": (lambda: fitted(methods.FEAT, **ATTENTION), ""),
    "MatchingNetworks": (
        lambda: fitted(methods.MatchingNetworks, feature_dimension=6),
        r"explain it as it is, LayerFam\(classifier, layer\)",
    ),
    "RelationNetworks": (
        with_relations,
        r"compares feature maps, not embeddings: .* LayerFam\(classifier, layer\)",
    ),
    "Finetune": (
        lambda: fitted(methods.Finetune, fine_tuning_lr=0.1),
        r"trains its prototypes anew in every call: call it once, then SimilarityModel\(",
    ),
    **{
        name: (
            lambda name=name: fitted(getattr(methods, name)),
            "transductive: a score depends on the other queries too; explain SimpleShot on the",
        )
        for name in ("BDCSPN", "LaplacianShot", "PTMAP", "TIM", "TransductiveFinetuning")
    },
}


def test_every_method_of_the_library_has_its_outcome():
    base = methods.FewShotClassifier
    kinds = [kind for kind in vars(methods).values() if isinstance(kind, type)]
    found = {kind.__name__ for kind in kinds if issubclass(kind, base) and kind is not base}
    assert found == set(OUTCOMES)


@pytest.mark.parametrize("name", OUTCOMES)
def test_a_method_has_the_same_scores_or_is_refused_with_what_to_do(name):
    make, message = OUTCOMES[name]
    classifier = make()
    before, prototypes = State.of(classifier), getattr(classifier, "prototypes", None)
    noted = None if prototypes is None else prototypes.detach().clone()
    if message:
        with pytest.raises(ValueError, match=message):
            from_easyfsl(classifier)
    else:
        model = from_easyfsl(classifier)
        torch.testing.assert_close(model(QUERIES), classifier(QUERIES))
    before.assert_unchanged(classifier)
    if noted is not None:  # the method's own training, too, has not begun
        assert classifier.prototypes is prototypes
        assert torch.equal(classifier.prototypes, noted)


def test_what_a_refused_method_is_told_to_do_works():
    classifier = OUTCOMES["Finetune"][0]()
    scores = classifier(QUERIES)
    model = SimilarityModel(classifier.backbone, classifier.prototypes)
    torch.testing.assert_close(model(QUERIES), scores)
    maps = LayerFam(model, "encoder.last", rule="centred").attribute(QUERIES, 1)
    assert maps.shape == (5, 1, 4, 5)
    for name in ("MatchingNetworks", "RelationNetworks"):
        classifier = OUTCOMES[name][0]()
        maps = LayerFam(classifier, "backbone.last", rule="gradcam").attribute(QUERIES, 1)
        assert maps.shape == (5, 1, 4, 5)
        assert maps.any()
