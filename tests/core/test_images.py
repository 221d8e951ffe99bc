"""Images of every form: read the same way, or refused with both readings named."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import v2
from torchvision.transforms._presets import ImageClassification

from fam_plugins import load_images
from fam_plugins.core.images import normalisation, pictures

BYTES = np.random.default_rng(0).integers(0, 256, (10, 14, 3)).astype(np.uint8)
UNIT = torch.from_numpy(BYTES).permute(2, 0, 1) / 255
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NORMAL = T.Normalize(MEAN, STD)


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(BYTES).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


FORMS = {
    "a path": lambda photo: photo,
    "a file name": lambda photo: str(photo),
    "PIL": lambda photo: Image.open(photo),
    "[H, W, 3] bytes": lambda photo: BYTES,
    "[H, W, 3] floats": lambda photo: BYTES / 255,
    "[3, H, W] bytes, a tensor": lambda photo: torch.from_numpy(BYTES).permute(2, 0, 1),
    "[3, H, W] floats, a tensor": lambda photo: UNIT,
    "[3, H, W] up to 255": lambda photo: UNIT * 255,
    "[H, W, 3] up to 255": lambda photo: BYTES.astype(np.float32),
    "integers": lambda photo: BYTES.astype(np.int64),
    "half precision": lambda photo: torch.from_numpy(BYTES).permute(2, 0, 1).half() / 255,
    "[1, 3, H, W]": lambda photo: UNIT[None],
    "[1, H, W, 3]": lambda photo: BYTES[None],
    "a list": lambda photo: [BYTES],
    "requires gradient": lambda photo: UNIT.clone().requires_grad_(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_picture(form, photo):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (picture,) = pictures(FORMS[form](photo))
    assert picture.dtype == torch.float32
    torch.testing.assert_close(picture, UNIT, rtol=0, atol=2e-3 if "half" in form else 1e-6)
    if form != "half precision":  # which rounds to other bytes
        loaded = load_images(FORMS[form](photo), T.ToTensor())
        torch.testing.assert_close(loaded, UNIT[None], rtol=0, atol=1e-6)


def compose(*parts):
    return T.Compose([T.ToTensor(), *parts])


@pytest.mark.parametrize(
    "transform",
    [
        compose(NORMAL),
        T.Compose([T.Resize((10, 14)), compose(NORMAL)]),
        v2.Compose([v2.ToImage(), v2.Normalize(MEAN, STD)]),
        ImageClassification(crop_size=10, resize_size=10),
        torch.nn.Sequential(T.Resize(10), NORMAL),
    ],
    ids=["Compose", "nested", "v2", "preset", "Sequential"],
)
def test_a_normalisation_is_found_and_undone(transform):
    assert list(map(float, normalisation(transform)[0])) == MEAN
    for undo in ({"transform": transform}, {"mean": MEAN, "std": STD}):
        normalised = NORMAL(UNIT)
        for given in (normalised, normalised.permute(1, 2, 0), normalised[None].numpy()):
            (picture,) = pictures(given, **undo)
            torch.testing.assert_close(picture, UNIT, rtol=0, atol=1e-6)
    (picture,) = pictures(BYTES, mean=MEAN, std=STD)  # bytes were never normalised
    torch.testing.assert_close(picture, UNIT)


def test_a_picture_is_drawn_as_the_encoder_saw_it(photo):
    middle = T.Compose([T.CenterCrop(6), T.ToTensor(), NORMAL])
    for given in (photo, BYTES, UNIT, Image.open(photo), [photo]):
        (picture,) = pictures(given, transform=middle)
        torch.testing.assert_close(picture, UNIT[:, 2:8, 4:10], rtol=0, atol=1e-6)


def test_no_normalisation_is_made_up():
    assert normalisation(T.ToTensor()) is None
    assert normalisation(lambda image: image) is None
    assert normalisation(None) is None


def test_grey_images_and_several():
    grey = torch.rand(5, 6)
    for form in (grey, grey[None], grey[..., None], grey.numpy(), grey[None, None]):
        (picture,) = pictures(form)
        torch.testing.assert_close(picture, grey.expand(3, -1, -1))
    assert len(pictures(torch.rand(4, 3, 5, 6))) == 4
    assert [tuple(p.shape) for p in pictures([grey, UNIT])] == [(3, 5, 6), (3, 10, 14)]


def test_an_image_processor_is_called_and_its_output_drawn():
    transformers = pytest.importorskip("transformers")
    processor = transformers.ViTImageProcessor(size={"height": 10, "width": 14}, image_std=STD)
    batch = load_images([BYTES, BYTES], processor)
    assert batch.shape == (2, 3, 10, 14)
    for given in (batch, processor(images=[BYTES] * 2, return_tensors="pt")):
        for picture in pictures(given, transform=processor):
            torch.testing.assert_close(picture, UNIT, rtol=0, atol=1e-5)


def test_a_transform_of_timm_works():
    timm = pytest.importorskip("timm")
    transform = timm.data.create_transform(input_size=(3, 8, 8), is_training=False)
    batch = load_images(BYTES, transform)
    assert batch.shape == (1, 3, 8, 8)
    (picture,) = pictures(batch, transform=transform)
    assert 0 <= picture.min() < picture.max() <= 1


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.fromarray(BYTES).save(tmp_path / "turned.png", exif=exif)
    for form in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        (picture,) = pictures(form)
        torch.testing.assert_close(picture, UNIT.rot90(-1, (1, 2)))


def test_palettes_and_transparency_become_rgb(tmp_path):
    image = Image.fromarray(BYTES).convert("RGBA")
    torch.testing.assert_close(pictures(image)[0], UNIT)
    assert pictures(image.convert("P"))[0].shape == UNIT.shape


def test_what_is_ready_is_taken_as_it_is():
    batch = torch.randn(2, 3, 4, 4)
    assert load_images(batch) is batch
    assert load_images(batch[0]).shape == (1, 3, 4, 4)
    assert load_images({"pixel_values": batch}) is batch


AMBIGUOUS = [
    (torch.rand(3, 8, 3), "channels first, 8 x 3 pixels, and as channels last, 3 x 8"),
    (torch.rand(2, 3, 8, 3), "channels first, 8 x 3 pixels, and as channels last, 3 x 8"),
    (torch.rand(3, 8, 8) * 3, "dark image of bytes.*overshot"),
    (torch.rand(4, 8, 8), "1 or 3 channels"),
    (torch.randn(3, 8, 8), "model's normalisation.*mean= and std="),
    (torch.rand(3, 8, 8) * 1000, "can be read"),
    (torch.rand(3, 8, 8) / 0, "NaN or infinite"),
    (torch.rand(3, 8, 8) * torch.nan, "NaN or infinite"),
    (torch.rand(3), "shape"),
    (torch.rand(3, 0, 8), "shape"),
]


@pytest.mark.parametrize(("given", "message"), AMBIGUOUS)
def test_what_can_be_read_in_two_ways_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        pictures(given, "image")


@pytest.mark.parametrize(
    ("images", "transform", "error", "message"),
    [
        (BYTES, None, TypeError, "ndarray.*weights.transforms"),
        ("a.jpg", None, TypeError, "weights.transforms"),
        (torch.from_numpy(BYTES), None, TypeError, "uint8.*weights.transforms"),
        ("no such.jpg", T.ToTensor(), FileNotFoundError, "no file 'no such.jpg'"),
        (NORMAL(UNIT), T.ToTensor(), ValueError, "leave transform= out"),
        (NORMAL(UNIT).numpy(), T.ToTensor(), ValueError, "leave transform= out"),
        (BYTES, T.Resize(4), TypeError, "what the transform makes of images"),
        ([BYTES, BYTES[:5]], T.ToTensor(), ValueError, r"one size \[C, H, W\].*Resize"),
        (object(), T.ToTensor(), TypeError, "images must be a tensor"),
        (None, T.ToTensor(), TypeError, "NoneType"),
        ([], T.ToTensor(), ValueError, "no images"),
    ],
)
def test_bad_input_names_the_fix(images, transform, error, message):
    with pytest.raises(error, match=message):
        load_images(images, transform)


def test_wrong_normalisations_are_refused():
    for undo in ({"mean": MEAN}, {"std": STD}, {"mean": [0, 0], "std": [1, 1]}):
        with pytest.raises(ValueError, match="takes mean= and std=, 1 or 3 values"):
            pictures(UNIT, **undo)
    with pytest.raises(ValueError, match="values from"):
        pictures(NORMAL(UNIT), mean=2, std=5)


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "notes.jpg").write_text("hello")
    with pytest.raises(OSError, match=r"notes\.jpg' cannot be read"):
        pictures(tmp_path / "notes.jpg")
    Image.fromarray(BYTES[..., 0].astype(np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="mode I"):
        pictures(tmp_path / "deep.tif")
