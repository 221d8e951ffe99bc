"""What new users come for, each in five lines at most, from files to a picture or a number.

Weights are random here; theirs are not: ``weights="DEFAULT"``, ``pretrained=True``.
"""

from __future__ import annotations

import pytest
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images

TASKS = {
    "a pair, torchvision": """
from torchvision.models import resnet18, ResNet18_Weights as Weights
from fam_plugins import explain_pair
encoder, transform = resnet18(weights=None), Weights.DEFAULT.transforms()
encoder.fc = torch.nn.Identity()
found = explain_pair(encoder, "layer4", "a.jpg", "b.jpg", transform=transform).plot()
""",
    "a pair, timm": """
import timm; from fam_plugins import explain_pair
encoder = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0)
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
found = explain_pair(encoder, None, "a.jpg", "b.jpg", transform=transform).plot()
""",
    "a pair, transformers": """
from transformers import AutoImageProcessor, AutoModel
from fam_plugins import explain_pair
model, processor = AutoModel.from_pretrained("dino"), AutoImageProcessor.from_pretrained("dino")
found = explain_pair(model, "patches", "a.jpg", "b.jpg", transform=processor, rule="centred").plot()
""",
    "one image, a classifier, instead of Grad-CAM": """
from fam_plugins import LayerFam, load_images
from fam_plugins.plots import plot_map
image = load_images("a.jpg", transform)
maps = LayerFam(classifier, "layer4", rule="gradcam").attribute(image, target=3)
found = plot_map(image, maps, transform=transform)
""",
    "Captum's own picture": """
from captum.attr import visualization
from fam_plugins import LayerFam, load_images
image = load_images("a.jpg", transform)
maps = LayerFam(classifier, "layer4", rule="centred").attribute(image, target=3)
found, _ = visualization.visualize_image_attr(maps[0].movedim(0, 2).numpy(), use_pyplot=False)
""",
    "which of these references?": """
from fam_plugins import LayerFam, SimilarityModel, load_images, plots
query, references = (load_images(of, transform) for of in ("c.jpg", ["a.jpg", "b.jpg"]))
model = SimilarityModel(encoder, references, contrast="others")
maps = LayerFam(model, "layer4", rule="centred").attribute_references(query)
found = plots.plot_episode("c.jpg", ["a.jpg", "b.jpg"], maps, transform=transform, rule="centred")
""",
    "a ranked list": """
from fam_plugins import explain_hits
hits = ["a.jpg", "b.jpg", "c.jpg"]  # best first, from faiss or any other search
found = explain_hits(encoder, "layer4", "c.jpg", hits, transform=transform, rule="centred").plot()
""",
    "which regions match?": """
from fam_plugins import explain_pair
pair = explain_pair(encoder, "layer4", "a.jpg", "c.jpg", transform=transform, joint=True)
found = pair.plot_matches()
""",
    "same or different?": """
from fam_plugins import calibrate_threshold, explain_pair
threshold = calibrate_threshold([0.9, 0.8, 0.3], [True, True, False]).threshold
pair = explain_pair(encoder, "layer4", "a.jpg", "c.jpg", transform=transform)
found = pair.margin(threshold).plot(); print("same" if pair.same(threshold) else "different")
""",
    "captions": """
import open_clip; from fam_plugins import LayerFam, SimilarityModel, load_images, plots
tokenizer, captions = open_clip.get_tokenizer("ViT-S-32-alt"), ["a temple", "a flower"]
explainer = LayerFam(SimilarityModel.from_text(clip, tokenizer, captions), rule="centred")
maps = explainer.attribute_references(load_images("a.jpg", preprocess))
found = plots.plot_episode("a.jpg", None, maps, labels=captions, transform=preprocess)
""",
    "how good are maps on my images?": """
from torchvision.datasets import ImageFolder
from fam_plugins.quality import evaluate
data, rules = ImageFolder("photos", transform), {"ours": "centred", "theirs": "gradcam"}
found = evaluate(rules, encoder, "layer4", data, shots=1, mosaics=2, singles=2)
print(found); found = found.plot()
""",
    "a head whose map is a probability": """
from fam_plugins import LayerCape, load_images, plots
from fam_plugins.cape import with_cape_head
model = with_cape_head(classifier)
maps = LayerCape(model).attribute(load_images("a.jpg", transform), target=3)
found = plots.plot_map("a.jpg", maps, transform=transform, label="probability")
""",
}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with files, and the names that a user already has."""
    from PIL import Image
    from torchvision.models import resnet18
    from torchvision.transforms._presets import ImageClassification

    temple, flower = map(Image.fromarray, load_sample_images().images)
    for name, image in (("a", temple), ("b", flower), ("c", temple.crop((60, 0, 480, 400)))):
        image.save(tmp_path / f"{name}.jpg")
        for label in ("one", "two", "three", "four"):
            (tmp_path / "photos" / label).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "photos" / label / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    encoder, classifier = resnet18(weights=None).eval(), resnet18(weights=None).eval()
    encoder.fc = torch.nn.Identity()
    # Of torchvision's newer releases: half the size, for speed.
    transform = ImageClassification(crop_size=64, resize_size=64)
    return {"torch": torch, "encoder": encoder, "classifier": classifier, "transform": transform}


def published(task: str, desk: dict) -> None:
    """Stand-ins for weights on a hub."""
    if task == "a pair, timm":
        pytest.importorskip("timm")
    if task == "captions":
        open_clip = pytest.importorskip("open_clip")
        desk["clip"], _, desk["preprocess"] = open_clip.create_model_and_transforms("ViT-S-32-alt")
    if task == "a pair, transformers":
        transformers = pytest.importorskip("transformers")
        config = transformers.Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
        )
        transformers.Dinov2Model(config).save_pretrained("dino")
        size = {"height": 28, "width": 28}
        transformers.ViTImageProcessor(size=size).save_pretrained("dino")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.filterwarnings("ignore:.*layers are unused:UserWarning")
def test_five_lines_are_enough(task, desk):
    code = TASKS[task].strip()
    assert len(code.splitlines()) <= 5
    published(task, desk)
    before = dict(desk)
    exec(compile(code, "block", "exec"), desk)
    assert isinstance(desk["found"], Figure)
    assert not any(parameter.grad is not None for parameter in before["encoder"].parameters())
