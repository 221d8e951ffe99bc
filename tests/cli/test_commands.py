"""Every command with a small encoder, against what the package says in Python."""

from __future__ import annotations

import re
import runpy

import numpy as np
import pytest
import torch
from PIL import Image

from fam_plugins import LayerFam, SimilarityModel, explain_hits, explain_pair, gallery_mean
from fam_plugins.cli import main
from fam_plugins.core.images import load_images
from fam_plugins.plots.figure import Picture


@pytest.fixture
def encoder(model):
    script, _, name = model[1].rpartition(":")
    made, transform = runpy.run_path(script)[name]()
    return made.eval(), transform


@pytest.fixture
def run(model, capsys, monkeypatch, tmp_path):
    """Runs a command in an empty folder; what it printed."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(command, *arguments):
        options = model if command != "layers" else []
        assert main([command, *map(str, [*arguments, *options])]) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: function -> its arguments."""
    found = {}
    for name in ("plot_pair", "plot_episode", "plot_retrieval"):
        for place in ("fam_plugins.plots", "fam_plugins.cli.commands"):
            original = getattr(__import__(place, fromlist=[name]), name, None)

            def note(*given, original=original, name=name, **options):
                found.setdefault(name, []).append((given, options))
                return original(*given, **options)

            if original is not None:
                monkeypatch.setattr(f"{place}.{name}", note)
    return found


def test_pair(run, photos, encoder, drawn, tmp_path):
    red, green = photos.parent / "red4.png", photos.parent / "green4.png"
    assert run("pair", red, green, "--gallery", photos) == "pair.png\n"
    with Image.open("pair.png") as picture:
        assert min(picture.size) > 300
    model, transform = encoder
    gallery = [*(photos / "green").iterdir(), *(photos / "red").iterdir()]
    contrast = gallery_mean(model(load_images(gallery, transform)).detach())
    options = {"rule": "centred", "smooth": True, "contrast": contrast}
    expected = explain_pair(model, "1", red, green, transform=transform, **options)
    ((_, _, map_a, map_b), told) = drawn["plot_pair"][0]
    torch.testing.assert_close(map_a, expected.map_a[0])
    torch.testing.assert_close(map_b, expected.map_b[0])
    assert told["titles"] == ("red4.png", "green4.png")


def test_pair_takes_rule_smoothing_layer_and_format(run, photos, encoder, drawn):
    red, green = photos.parent / "red4.png", photos.parent / "green4.png"
    options = ["--rule", "additive", "--no-smooth", "--layer", "0", "--out", "new/pair.svg"]
    assert run("pair", red, green, *options).endswith("pair.svg\n")
    model, transform = encoder
    expected = explain_pair(model, "0", red, green, transform=transform, contrast=None)
    torch.testing.assert_close(drawn["plot_pair"][0][0][2], expected.map_a[0])


@pytest.mark.parametrize("contrast", ["others", "gallery", None])
def test_map(run, photos, encoder, drawn, contrast):
    queries = [photos.parent / "red4.png", photos.parent / "green4.png"]
    references = [photos / "red" / "red0.png", photos / "green" / "green0.png"]
    options = ["--gallery", photos] if contrast else []
    options += ["--contrast", contrast] if contrast else []
    assert run("map", *queries, "--reference", *references, *options) == "map.png\n"
    model, transform = encoder
    gallery = [*(photos / "green").iterdir(), *(photos / "red").iterdir()]
    against = load_images(gallery, transform) if contrast == "gallery" else "others"
    scores = SimilarityModel(model, load_images(references, transform), contrast=against)
    images = load_images(queries, transform)
    expected = LayerFam(scores, "encoder.1", rule="centred", smooth=True)
    (given, told) = drawn["plot_episode"][0]
    torch.testing.assert_close(given[2], expected.attribute_references(images))
    torch.testing.assert_close(told["scores"], scores(images))
    assert told["labels"] == ["red0.png", "green0.png"]


def test_a_single_reference_has_no_others(run, photos):
    red = photos.parent / "red4.png"
    assert run("map", red, "--reference", red) == "map.png\n"


def test_search_ranks_leaves_out_the_query_and_explains_both_sides(run, photos, encoder, drawn):
    red, green = photos / "red" / "red0.png", photos.parent / "green4.png"
    out = run("search", red, green, "--gallery", photos, "-k", "3")
    assert out.split() == ["search/1-red0.png", "search/2-green4.png", "search/index.html"]
    model, transform = encoder
    files = sorted(photos.rglob("*.png"))
    embeddings = model(load_images(files, transform)).detach()
    query = model(load_images(red, transform)).detach()
    cosine = torch.cosine_similarity(query, embeddings)
    ranked = [files[row] for row in cosine.argsort(descending=True)]
    assert ranked[0] == red
    expected = explain_hits(
        model,
        "1",
        red,
        ranked[1:4],
        transform=transform,
        rule="centred",
        smooth=True,
        contrast=gallery_mean(embeddings),
    )
    (given, told) = drawn["plot_retrieval"][0]
    torch.testing.assert_close(given[2], expected.query_maps)
    torch.testing.assert_close(given[3], expected.hit_maps)
    names = [file.relative_to(photos).as_posix() for file in ranked[1:4]]
    assert told["captions"] == names
    for row, ((_, _, in_query, in_hit), told) in enumerate(drawn["plot_pair"][:3]):
        torch.testing.assert_close(in_query, expected.query_maps[row])
        torch.testing.assert_close(in_hit, expected.hit_maps[row])
        assert told["titles"] == ("red0.png", names[row])
    with open("search/index.html", encoding="utf-8") as file:
        page = file.read()
    alts = re.findall('alt="(.*?)"', page)
    assert len(alts) == 6
    score = float(expected.scores[0])
    assert alts[0] == f"hit 1. {names[0]}, score {score:.3f}, for the query red0.png"
    assert page.count("data:image/png;base64,") == 6


def test_a_picture_named_like_a_script(run, photos, tmp_path):
    evil = tmp_path / "<img src=x onerror=alert(1)>.png"
    evil.write_bytes((photos.parent / "red4.png").read_bytes())
    out = run("search", evil, "--gallery", photos, "-k", "1")
    assert out.splitlines() == [f"search/1-{evil.name}", "search/index.html"]
    with open("search/index.html", encoding="utf-8") as file:
        page = file.read()
    assert "&lt;img src=x onerror=alert(1)&gt;.png" in page
    assert "<img src=x" not in page


def test_a_gallery_of_the_query_alone_has_no_hits(run, photos, model, capsys, tmp_path):
    red = tmp_path / "alone" / "red.png"
    red.parent.mkdir()
    red.write_bytes((photos.parent / "red4.png").read_bytes())
    assert main(["search", str(red), "--gallery", str(red.parent), *model]) == 2
    assert "the gallery holds the query alone" in capsys.readouterr().err


def test_dataset(run, photos, encoder):
    pytest.importorskip("pyarrow")
    from fam_plugins.dataset import read_maps

    references = [photos.parent / "red4.png", photos.parent / "green4.png"]
    assert run("dataset", photos, "--reference", *references, "--rule", "additive") == "maps\n"
    model, transform = encoder
    files = sorted(photos.rglob("*.png"))
    scores = SimilarityModel(model, load_images(references, transform), contrast="others")
    explainer = LayerFam(scores, "encoder.1", rule="additive", smooth=True)
    expected = explainer.attribute_references(load_images(files, transform)).numpy()
    rows = {(row["id"], row["label"]): row["map"] for row in read_maps("maps")[1]}
    assert len(rows) == 16
    for i, file in enumerate(files):
        for j, reference in enumerate(references):
            found = np.asarray(rows[str(file), str(reference)], np.float32)
            np.testing.assert_allclose(found.ravel(), expected[i, j].ravel(), atol=1e-3)
    run("dataset", photos, "--reference", *references, "--rule", "additive")  # nothing left to do


def test_a_broken_picture_is_named_and_the_others_are_explained(
    photos, model, capsys, monkeypatch, tmp_path
):
    pytest.importorskip("pyarrow")
    from fam_plugins.dataset import read_maps

    whole = sorted(photos.rglob("*.png"))
    (photos / "broken.png").write_bytes(whole[0].read_bytes()[:60])
    monkeypatch.chdir(tmp_path)
    reference = ["--reference", str(photos.parent / "red4.png")]
    assert main(["dataset", str(photos), *reference, *model]) == 0
    assert "left out: images: " in capsys.readouterr().err
    rows = [*read_maps("maps")[1]]
    assert {row["id"] for row in rows if row["error"] is None} == set(map(str, whole))
    (failed,) = (row for row in rows if row["error"])
    assert failed["id"] == str(photos / "broken.png")


def test_quality(run, photos, monkeypatch):
    from fam_plugins.cli import commands

    for kind in ("blue", "grey"):
        (photos / kind).mkdir()
        for number in range(4):
            Image.effect_noise((40, 40), 50).convert("RGB").save(photos / kind / f"{number}.png")
    small = {"shots": 2, "mosaics": 2, "singles": 2, "steps": 2}
    evaluate = commands.evaluate
    monkeypatch.setattr(commands, "evaluate", lambda *a, **k: evaluate(*a, **k, **small))
    out = run("quality", photos).splitlines()
    assert out[0].startswith("| method | energy on the match")
    assert [line.split()[1] for line in out[2:4]] == ["centred", "GradCAM"]
    assert out[4:] == ["quality.png"]
    with Image.open("quality.png") as picture:
        assert picture.size[0] > 1000


def test_layers(run, model, photos, encoder):
    red, green = photos.parent / "red4.png", photos.parent / "green4.png"
    rows = [line.split() for line in run("layers", model[1], red, green).splitlines()]
    assert [row[0] for row in rows] == ["0", "1"]
    assert rows[1] == ["1", "[8,", "7,", "7]", "100%", "<-", "recommended"]
    net, transform = encoder
    images = load_images([red, green], transform)
    explainer = LayerFam(SimilarityModel(net, images), "encoder.0", rule="additive")
    maps, scores, _ = explainer.attribute_references(images, return_scores=True)
    assert rows[0][4] == f"{float(maps.sum() / scores.sum()):.0%}"
    assert "recommended" not in rows[0]


def test_layers_inside_blocks_are_left_out(run, model, photos):
    red = photos.parent / "red4.png"
    rows = [line.split()[0] for line in run("layers", f"{model[1][:-5]}nested", red).splitlines()]
    assert rows == ["0", "1"]


def test_layers_of_a_class_token_with_sample_photographs(capsys, tmp_path):
    pytest.importorskip("timm")
    script = tmp_path / "vit.py"
    script.write_text(
        "import timm, torch\nfrom torchvision import transforms as t\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    made = timm.create_model('vit_tiny_patch16_224', depth=4, embed_dim=24, num_heads=2,\n"
        "        img_size=32, num_classes=0)\n"
        "    return made, t.Compose([t.Resize((32, 32)), t.ToTensor()])\n"
    )
    assert main(["layers", f"{script}:make"]) == 0
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert {"patch_embed", "blocks.0", "blocks.1", "blocks"} <= {*rows}
    assert rows["blocks"].split()[-1] == "-"  # the last block: only the class token is read
    assert [name for name, line in rows.items() if "recommended" in line] == ["blocks.1"]
    assert not any(re.search(r"blocks\.\d+\.", name) for name in rows)
    assert "the regions carry" not in err


def test_random_weights_are_said_aloud_and_in_the_picture(capsys, photos, monkeypatch, tmp_path):
    titles = []
    save = Picture.savefig

    def note(self, *given, **options):
        titles.append(self.get_suptitle())
        save(self, *given, **options)

    monkeypatch.setattr(Picture, "savefig", note)
    red = str(photos.parent / "red4.png")
    out = str(tmp_path / "out.png")
    random = ["--model", "torchvision:squeezenet1_1", "--weights", "none", "--size", "64"]
    assert main(["map", red, "--reference", red, *random, "--out", out]) == 0
    assert titles == ["RANDOM WEIGHTS: these maps mean nothing"]
    assert "RANDOM WEIGHTS" in capsys.readouterr().err
    folder = str(tmp_path / "found")
    assert main(["search", red, "--gallery", str(photos), *random, "--out", folder]) == 0
    assert "RANDOM WEIGHTS" in (tmp_path / "found" / "index.html").read_text()


def test_a_picture_is_written_whole_or_not_at_all(photos, model, monkeypatch, tmp_path, capsys):
    def breaks(self, file, **_options):
        file.write_bytes(b"half")
        raise OSError("disk full")

    out = tmp_path / "out" / "pair.png"
    out.parent.mkdir()
    out.write_bytes(b"an earlier one")
    monkeypatch.setattr(Picture, "savefig", breaks)
    red = str(photos.parent / "red4.png")
    options = [*model, "--gallery", str(photos), "--out", str(out)]
    assert main(["pair", red, red, *options]) == 2
    assert capsys.readouterr().err == "fam-plugins: disk full\n"
    assert [file.name for file in out.parent.iterdir()] == ["pair.png"]
    assert out.read_bytes() == b"an earlier one"
