"""explain_dataset: the rows against maps computed one by one, resuming, and what it refuses."""

from __future__ import annotations

import builtins
import doctest
import errno
import os
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fam_plugins import FAM, LayerCape, LayerFam, Rule, SimilarityModel
from fam_plugins.cape import with_cape_head
from fam_plugins.dataset import explain_dataset, read_maps, to_fiftyone
from fam_plugins.dataset import store as store_module
from tests.dataset.stored import explainer, image, items, rows_in
from tests.networks import State, classifier

pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra")


class Files(Dataset):
    """A data set that counts what it loads; some numbers cannot be loaded."""

    def __init__(self, count: int, broken: tuple[int, ...] = (), ids: bool = True) -> None:
        self.count, self.broken, self.loaded = count, broken, []
        if ids:
            self.ids = [f"{number:04d}.png" for number in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int):
        self.loaded.append(number)
        if number in self.broken:
            raise OSError(f"truncated file {number}")
        return f"{number:04d}.png", image(number)


class Stream(IterableDataset):
    def __init__(self, given) -> None:
        self.given = given

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        part = slice(None) if info is None else slice(info.id, None, info.num_workers)
        return iter(self.given[part])


def expected(made: LayerFam, given, chosen=None) -> list[tuple]:
    """The rows from one call per image and reference."""
    model, rows = made.forward_func, []
    for name, picture in given:
        with torch.no_grad():
            scores = model(picture[None])[0]
        for reference in range(len(scores)) if chosen is None else chosen(name, scores):
            maps = made.attribute(picture[None], target=int(reference))[0, 0]
            score = float(scores[reference])
            share = float(maps.sum()) / score if made.rule.adds_up else None
            rows.append((name, int(reference), model.labels[reference], score, share, maps))
    return rows


def assert_rows(out, wanted, atol: float = 1e-5) -> None:
    _, found = read_maps(out)
    found = {(row["id"], row["reference"]): row for row in found}
    assert len(found) == len(wanted) == read_maps(out)[0].count_rows()
    for name, reference, label, score, share, maps in wanted:
        row = found[name, reference]
        assert row["label"] == label
        assert row["error"] is None
        assert row["score"] == pytest.approx(score, abs=atol)
        assert row["coverage"] == (None if share is None else pytest.approx(share, abs=1e-4))
        assert row["map"].dtype == np.float16
        assert row["shape"] == list(maps.shape)
        np.testing.assert_allclose(row["map"], maps.numpy(), rtol=1e-3, atol=atol)


@pytest.mark.parametrize("rule", ["additive", "centred", "gradcam"])
def test_rows_are_those_of_one_call_per_image_and_reference(tmp_path, rule):
    made = explainer(rule, contrast="others")
    before = State.of(made.forward_func)
    explain_dataset(made, items(7), tmp_path, batch_size=3, rows_per_part=10)
    assert_rows(tmp_path, expected(made, items(7)))
    before.assert_unchanged(made.forward_func)
    assert [p.name for p in sorted(tmp_path.iterdir())] == [
        "part-00000-000000.parquet",
        "part-00000-000001.parquet",
        "part-00000-000002.parquet",
    ][: len(list(tmp_path.iterdir()))]
    schema = read_maps(tmp_path)[0].schema
    assert str(schema.field("map").type) == "list<element: halffloat>"
    assert str(schema.field("reference").type) == "int64"


def test_the_best_references_come_from_the_same_pass(tmp_path):
    made, passes = explainer(contrast="others"), []
    made.forward_func.encoder[0].register_forward_hook(lambda *_: passes.append(1))
    explain_dataset(made, items(6), tmp_path, top_k=2, batch_size=3)
    assert len(passes) == 2
    assert_rows(tmp_path, expected(made, items(6), lambda _, scores: scores.topk(2).indices))
    best = [row["score"] for row in read_maps(tmp_path)[1]]
    assert all(first >= second for first, second in zip(best[::2], best[1::2], strict=True))


def test_a_column_of_targets(tmp_path):
    made, given = explainer(), items(5)
    targets = {name: number % 4 for number, (name, _) in enumerate(given)}
    targets["0003.png"] = "class 0"
    explain_dataset(made, given, tmp_path / "a", targets=targets)
    wanted = targets | {"0003.png": 0}
    assert_rows(tmp_path / "a", expected(made, given, lambda name, _: [wanted[name]]))
    with pytest.raises(ValueError, match=r"lacks image '0005.png'"):
        explain_dataset(made, items(6), tmp_path / "a", targets=targets)


@pytest.mark.parametrize(
    "load",
    [
        lambda given: given,
        lambda given: iter(given),
        lambda given: dict(given).items(),
        lambda given: DataLoader(given, batch_size=4),
        lambda given: Stream(given),
        lambda given: [(int(name[:4]), picture) for name, picture in given],
    ],
    ids=["list", "iterator", "items", "loader", "stream", "ints"],
)
def test_whatever_loads_them(tmp_path, load):
    made = explainer()
    explain_dataset(made, items(9), tmp_path / "a", batch_size=4)
    explain_dataset(made, load(items(9)), tmp_path / "b", batch_size=4)
    found = rows_in(tmp_path / "b")
    if found[0][0] == "0":
        found = [(f"{int(name):04d}.png", *rest) for name, *rest in found]
    assert found == rows_in(tmp_path / "a")


@pytest.mark.parametrize("given", [items(9), Stream(items(9))], ids=["rows", "stream"])
def test_workers_load(tmp_path, given):
    explain_dataset(explainer(), items(9), tmp_path / "a", batch_size=4)
    explain_dataset(explainer(), given, tmp_path / "b", batch_size=4, num_workers=2)
    for found, wanted in zip(rows_in(tmp_path / "b"), rows_in(tmp_path / "a"), strict=True):
        assert found[:2] == wanted[:2]
        np.testing.assert_allclose(found[-1], wanted[-1], atol=1e-3)


def test_a_plain_classifier_and_a_rule_of_ones_own(tmp_path):
    net = classifier()
    made = LayerFam(net, "last", rule=Rule("mine", lambda _, gradients: gradients.relu()))
    explain_dataset(made, items(3), tmp_path, top_k=2)
    rows = list(read_maps(tmp_path)[1])
    assert len(rows) == 6
    assert {row["label"] for row in rows} == {row["coverage"] for row in rows} == {None}
    assert rows[0]["reference"] == int(net(image(0)[None]).argmax())


def test_layers_of_tokens_and_of_vectors(tmp_path):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(432, 5), nn.ReLU())
    made = LayerFam(SimilarityModel(encoder, torch.randn(3, 5)), "2", rule="additive")
    explain_dataset(made, items(3), tmp_path)
    rows = list(read_maps(tmp_path)[1])
    assert {row["map"].shape for row in rows} == {()}
    for row in rows:
        assert float(row["map"]) == pytest.approx(row["score"], rel=2e-3)


def test_several_sizes_one_at_a_time(tmp_path):
    given = [(str(size), image(size, size)) for size in (8, 12, 16, 12)]
    given[3] = ("again", given[3][1])
    with pytest.raises(ValueError, match=r"image '12' is \(3, 12, 12\), unlike .*batch_size=1"):
        explain_dataset(explainer(), given, tmp_path / "a")
    explain_dataset(explainer(), given, tmp_path / "b", batch_size=1)
    assert_rows(tmp_path / "b", expected(explainer(), given))


def test_a_filter_and_the_settings(tmp_path):
    explain_dataset(explainer(), items(4), tmp_path)
    field = pytest.importorskip("pyarrow.compute").field
    dataset, rows = read_maps(tmp_path, field("id") == "0002.png")
    rows = list(rows)
    assert [row["id"] for row in rows] == ["0002.png"] * 4
    assert [row["map"].tolist() for row in rows] == [r[-1] for r in rows_in(tmp_path)[8:12]]
    told = dataset.schema.metadata[b"fam_plugins"].decode()
    for word in ("additive", "encoder.2", "cosine", torch.__version__, "Sequential", "frozen"):
        assert word in told


def test_a_training_model_is_explained_in_eval_mode_and_trains_on(tmp_path):
    made = explainer()
    explain_dataset(made, items(4), tmp_path / "a")
    made.forward_func.train()
    before = State.of(made.forward_func)
    explain_dataset(made, items(4), tmp_path / "b")
    before.assert_unchanged(made.forward_func)
    assert rows_in(tmp_path / "a") == rows_in(tmp_path / "b")
    with pytest.raises(ValueError, match="unlike"):
        explain_dataset(made, [*items(2), ("x", image(0, 5))], tmp_path / "c")
    before.assert_unchanged(made.forward_func)


# Resuming


def test_resuming_explains_what_is_missing_and_no_more(tmp_path):
    made, passes = explainer(), []
    made.forward_func.encoder[0].register_forward_hook(lambda _, args, __: passes.append(args[0]))
    explain_dataset(made, items(6), tmp_path, batch_size=2, rows_per_part=8)
    assert sum(map(len, passes)) == 6
    explain_dataset(made, items(6), tmp_path, batch_size=2)
    assert sum(map(len, passes)) == 6
    explain_dataset(made, items(9), tmp_path, batch_size=2)
    assert sum(map(len, passes)) == 9
    assert_rows(tmp_path, expected(made, items(9)))


def test_known_ids_are_not_loaded_again(tmp_path):
    explain_dataset(explainer(), Files(6), tmp_path)
    grown = Files(8)
    explain_dataset(explainer(), grown, tmp_path)
    assert grown.loaded == [6, 7]
    nothing = Files(8)
    explain_dataset(explainer(), nothing, tmp_path)
    assert nothing.loaded == []
    assert len(rows_in(tmp_path)) == 32


class Stops(Exception):
    pass


@pytest.mark.parametrize("error", [Stops, KeyboardInterrupt])
def test_a_loader_that_raises_leaves_whole_parts(tmp_path, error):
    def loading():
        yield from items(10)
        raise error("the cable")

    made = explainer()
    made.forward_func.train()
    before = State.of(made.forward_func)
    with pytest.raises(error, match="the cable"):
        explain_dataset(made, loading(), tmp_path / "a", batch_size=2, rows_per_part=8)
    before.assert_unchanged(made.forward_func)
    assert not [name for name in os.listdir(tmp_path / "a") if name.startswith(".")]
    kept = rows_in(tmp_path / "a")
    assert 0 < len(kept) <= 40
    explain_dataset(made, items(12), tmp_path / "a", batch_size=2, rows_per_part=8)
    explain_dataset(made, items(12), tmp_path / "b", batch_size=2, rows_per_part=8)
    assert rows_in(tmp_path / "a") == rows_in(tmp_path / "b")


OTHERS = {
    "rule": lambda: explainer("centred"),
    "hash of contrast_embeddings": lambda: explainer(contrast=torch.ones(1, 6)),
    "scores": lambda: explainer(similarity="dot"),
    "hash of references": lambda: with_other_references(),
    "hash of encoder": lambda: with_other_weights(),
    "layer": lambda: LayerFam(explainer().forward_func, "0", rule="additive"),
    "smooth": lambda: LayerFam(explainer().forward_func, "2", rule="additive", smooth=True),
    "tail": lambda: LayerFam(explainer().forward_func, "2", rule="additive", tail="true"),
    "transform": lambda: LayerFam(
        explainer().forward_func, "2", rule="additive", reshape_transform=None
    ),
}


def with_other_weights() -> LayerFam:
    made = explainer()
    with torch.no_grad():
        made.forward_func.encoder[0].bias[3] += 1e-6
    return made


def with_other_references() -> LayerFam:
    made = explainer()
    made.forward_func.references[1, 2] += 1e-6
    return made


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings_are_refused_by_name_before_any_work(tmp_path, name):
    explain_dataset(explainer(), items(3), tmp_path)
    kept, made = rows_in(tmp_path), OTHERS[name]()
    made.forward_func.encoder[0].register_forward_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=f"other settings: .*{name}.*choose another folder"):
        explain_dataset(made, items(3), tmp_path)
    assert rows_in(tmp_path) == kept


@pytest.mark.parametrize("options", [{"top_k": 2}, {"targets": {"0000.png": 1}}])
def test_other_references_asked_for_are_other_settings(tmp_path, options):
    explain_dataset(explainer(), items(1), tmp_path)
    with pytest.raises(ValueError, match="references 'all', now"):
        explain_dataset(explainer(), items(1), tmp_path, **options)


def test_parquet_of_something_else_is_refused(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"id": ["a"]}), tmp_path / "mine.parquet")
    with pytest.raises(ValueError, match=r"mine.parquet.*not of this package"):
        explain_dataset(explainer(), items(1), tmp_path)
    with pytest.raises(ValueError, match="not of this package"):
        read_maps(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no maps"):
        read_maps(tmp_path / "nowhere")


def test_a_gallery_on_disk(tmp_path):
    np.save(tmp_path / "gallery.npy", np.random.default_rng(0).normal(size=(40, 6)))
    model = SimilarityModel(
        explainer().forward_func.encoder, np.load(tmp_path / "gallery.npy", mmap_mode="r")
    )
    made = LayerFam(model, "2", rule="additive")
    explain_dataset(made, items(3), tmp_path / "a", top_k=5)
    assert len(rows_in(tmp_path / "a")) == 15
    array = np.load(tmp_path / "gallery.npy")
    array[7, 0] += 1
    np.save(tmp_path / "other.npy", array)
    model = SimilarityModel(model.encoder, np.load(tmp_path / "other.npy", mmap_mode="r"))
    with pytest.raises(ValueError, match="hash of references"):
        explain_dataset(LayerFam(model, "2", rule="additive"), items(3), tmp_path / "a", top_k=5)


# Ids


def test_an_id_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"id '0001.png' comes twice"):
        explain_dataset(explainer(), [*items(3), items(3)[1]], tmp_path / "a")
    given = [("1", image(0)), (1, image(1))]
    with pytest.raises(ValueError, match="id '1' comes twice"):
        explain_dataset(explainer(), given, tmp_path / "b", batch_size=1)
    explain_dataset(explainer(), items(3), tmp_path / "c")
    with pytest.raises(ValueError, match=r"id '0001.png' comes twice"):
        explain_dataset(explainer(), [*items(3), items(3)[1]], tmp_path / "c")
    assert len(rows_in(tmp_path / "c")) == 12


def test_ranks_that_overlap_are_found(tmp_path, monkeypatch):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        explain_dataset(explainer(), items(2), tmp_path / rank)
    name = "part-00001-000000.parquet"
    os.rename(tmp_path / "1" / name, tmp_path / "0" / name)
    with pytest.raises(ValueError, match="repeats image .* DistributedSampler"):
        explain_dataset(explainer(), items(4), tmp_path / "0")


@pytest.mark.parametrize(
    "given",
    [
        [image(0)],
        [(image(0), 3)],
        [("a", image(0), 3)],
        ["ab"],
        [(None, image(0))],
        [(2.5, image(0))],
    ],
)
def test_what_is_no_pair_is_refused(tmp_path, given):
    with pytest.raises(TypeError, match=r"pairs \(id, image\)"):
        explain_dataset(explainer(), given, tmp_path)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (np.zeros((3, 12, 12), np.float32), TypeError, "image 'a' must be a tensor"),
        (torch.zeros(3, 12, 12, dtype=torch.uint8), TypeError, "scaled and normalised"),
        (torch.full((3, 12, 12), torch.nan), ValueError, "image 'a': it holds NaN"),
        ("no such file", ValueError, "image 'a': no such file; on_error="),
    ],
)
def test_what_is_no_image_is_refused(tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        explain_dataset(explainer(), [("a", given)], tmp_path)


@pytest.mark.parametrize("given", [[], iter(()), Stream([]), DataLoader([], batch_size=2)])
def test_nothing_is_refused(tmp_path, given):
    with pytest.raises(ValueError, match="there are no items"):
        explain_dataset(explainer(), given, tmp_path)


# Unreadable images


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_recorded(tmp_path, workers):
    given = Files(9, broken=(0, 4, 5))
    explain_dataset(
        explainer(), given, tmp_path, batch_size=2, on_error="record", num_workers=workers
    )
    errors = {row["id"]: row for row in read_maps(tmp_path)[1] if row["error"]}
    assert sorted(errors) == ["0000.png", "0004.png", "0005.png"]
    assert errors["0004.png"]["error"] == "OSError: truncated file 4"
    for column in ("reference", "label", "score", "coverage", "map", "shape"):
        assert errors["0004.png"][column] is None
    good = [row for row in rows_in(tmp_path) if row[1] is not None]
    assert len(good) == 6 * 4
    again = Files(9)
    explain_dataset(explainer(), again, tmp_path, on_error="record")
    assert again.loaded == []  # what is recorded is done


def test_unreadable_images_without_names(tmp_path):
    given = Files(4, broken=(2,), ids=False)
    explain_dataset(explainer(), given, tmp_path, on_error="record")
    assert [row["id"] for row in read_maps(tmp_path)[1] if row["error"]] == ["item 2"]
    explain_dataset(explainer(), given, tmp_path, on_error="record")
    assert len(rows_in(tmp_path)) == 13


def test_images_of_nan_and_reasons_given(tmp_path):
    given = [*items(2), ("nan", image(0) * torch.nan), ("gone", "404")]
    explain_dataset(explainer(), given, tmp_path, on_error="record")
    errors = {row["id"]: row["error"] for row in read_maps(tmp_path)[1] if row["error"]}
    assert errors == {"nan": "it holds NaN or infinite values", "gone": "404"}


def test_unreadable_images_are_fatal_by_default(tmp_path):
    with pytest.raises(OSError, match="truncated file 2"):
        explain_dataset(explainer(), Files(4, broken=(2,)), tmp_path)


# Disks


def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    explain_dataset(explainer(), items(4), tmp_path / "whole", batch_size=2)
    explain_dataset(explainer(), items(2), tmp_path / "a", batch_size=2)
    for place in (os, "fsync"), (os, "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(*place, full)
            with pytest.raises(OSError, match=r"000001.parquet cannot .*No space .*whole parts"):
                explain_dataset(explainer(), items(400), tmp_path / "a", rows_per_part=1)
        assert os.listdir(tmp_path / "a") == ["part-00000-000000.parquet"]
    explain_dataset(explainer(), items(4), tmp_path / "a", batch_size=2)
    assert rows_in(tmp_path / "a") == rows_in(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    made = explainer()
    made.forward_func.encoder[0].register_forward_hook(lambda *_: pytest.fail("it ran"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        explain_dataset(made, items(1), tmp_path / "file")

    def denied(path, flags, *rest, **options):
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really(path, flags, *rest, **options)

    really = os.open  # a user that is root may write anywhere
    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(PermissionError, match="Permission denied"):
        explain_dataset(made, items(1), tmp_path / "a")


def test_another_run_in_the_same_folder_is_not_overwritten(tmp_path):
    def loading():
        yield from items(4)
        explain_dataset(explainer(), items(4, start=100), tmp_path, rows_per_part=1)
        yield from items(4, start=4)

    with pytest.raises(OSError, match="another run writes here under the same RANK"):
        explain_dataset(explainer(), loading(), tmp_path, batch_size=4)
    assert len(rows_in(tmp_path)) == 16


def test_memory_is_bounded_by_a_slow_disk(tmp_path, monkeypatch):
    loaded, behind, write = [], [], store_module.Store._write

    def loading():
        for number, item in enumerate(items(60)):
            loaded.append(number)
            yield item

    def slow(self, *given):
        threading_wait()
        behind.append(len(loaded) - 4 * len(behind))
        write(self, *given)

    def threading_wait() -> None:
        import time

        time.sleep(0.02)

    monkeypatch.setattr(store_module.Store, "_write", slow)
    explain_dataset(explainer(), loading(), tmp_path, batch_size=2, rows_per_part=16)
    assert len(rows_in(tmp_path)) == 240
    assert max(behind) <= 4 * 3 + 2  # a part that is written, one that waits, one that grows


# Memory of the device


class Small(nn.Module):
    """Memory for two images."""

    def __init__(self, most: int = 2) -> None:
        super().__init__()
        self.most, self.sizes = most, []

    def forward(self, images):
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return images


def small(most: int) -> LayerFam:
    made = explainer()
    model = made.forward_func
    model.encoder = nn.Sequential(Small(most), *model.encoder).eval()
    return LayerFam(model, "3", rule="additive")


def test_batches_that_do_not_fit_are_halved_and_said_once(tmp_path):
    made = small(2)
    with pytest.warns(UserWarning, match="out of memory: from here on, 2 images") as caught:
        explain_dataset(made, items(20), tmp_path, batch_size=8)
    assert len([one for one in caught if "out of memory" in str(one.message)]) == 1
    assert made.forward_func.encoder[0].sizes == [8, 4, *[2] * 10]
    assert_rows(tmp_path, expected(made, items(20)))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        explain_dataset(small(0), items(2), tmp_path / "b")


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k of 1 to 4"),
        ({"top_k": 5}, "top_k of 1 to 4"),
        ({"top_k": 2, "targets": {}}, "top_k of 1 to 4"),
        ({"targets": [1, 2]}, "a dict from image ids"),
        ({"on_error": "skip"}, '"raise" or "record"'),
        ({"batch_size": 0}, "at least 1"),
        ({"rows_per_part": 0}, "at least 1"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        explain_dataset(explainer(), items(1), tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


def test_other_explainers_are_refused(tmp_path):
    model = explainer().forward_func
    cape = with_cape_head(classifier())
    for other in (
        LayerCape(cape),
        FAM(model, ["encoder.2"], rule="additive"),
        LayerFam(model, rule="additive"),
        LayerFam(model, "patches", rule="additive"),
        model,
    ):
        with pytest.raises(TypeError, match=r"explainer must be LayerFam\(model, .layer4."):
            explain_dataset(other, items(1), tmp_path)


def test_maps_beyond_half_precision_are_refused(tmp_path):
    made = explainer(similarity="dot")
    made.forward_func.references *= 1e7
    with pytest.raises(ValueError, match="does not fit into float16"):
        explain_dataset(made, items(1), tmp_path)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'fam-plugins\[dataset\]'"):
        explain_dataset(explainer(), items(1), tmp_path)
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(ImportError, match=r"fam-plugins\[fiftyone\]"):
        to_fiftyone(None, tmp_path)


# FiftyOne


def test_heatmaps_for_fiftyone(tmp_path, monkeypatch):
    """A stand-in: FiftyOne brings a database of its own."""

    class Samples(list):
        def iter_samples(self, autosave):
            assert autosave
            return iter(self)

    module = types.SimpleNamespace(Heatmap=lambda **given: types.SimpleNamespace(**given))
    monkeypatch.setitem(sys.modules, "fiftyone", module)
    given = [*items(3), ("broken", "404")]
    explain_dataset(explainer(), given, tmp_path, on_error="record")
    samples = Samples({"filepath": name, "other": name} for name, _ in [*given, ("new", None)])
    to_fiftyone(samples, tmp_path)
    to_fiftyone(samples, tmp_path, "again", key="other")
    for sample, (name, picture) in zip(samples, given[:3], strict=False):
        best = explainer().forward_func(picture[None]).argmax()
        maps = explainer().attribute(picture[None], target=int(best))[0, 0].numpy()
        for field in ("fam", "again"):
            np.testing.assert_allclose(sample[field].map, maps, atol=1e-3, err_msg=name)
            assert sample[field].range == [
                -abs(sample[field].map).max(),
                abs(sample[field].map).max(),
            ]
    assert "fam" not in samples[3]
    assert "fam" not in samples[4]


# Documentation


@pytest.mark.parametrize("function", [explain_dataset, read_maps])
def test_the_examples_run(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = explainer()
    names = {
        "LayerFam": lambda model, _, rule: LayerFam(model, "2", rule=rule),
        "model": made.forward_func,
        "image": image(0),
        "explain_dataset": explain_dataset,
        "read_maps": read_maps,
    }
    if function is read_maps:
        explain_dataset(made, items(1), "maps", top_k=2)
    text = function.__doc__.replace("  # doctest: +SKIP", "").replace("(4, 4)", "(5, 5)")
    test = doctest.DocTestParser().get_doctest(text, names, function.__name__, None, 0)
    runner = doctest.DocTestRunner(verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        runner.run(test, out=lambda said: builtins.print(said))
    assert runner.summarize(verbose=False).failed == 0
    assert runner.tries > 0
    assert (tmp_path / "maps").exists()
