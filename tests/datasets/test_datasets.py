import gzip
import hashlib
import os
import shutil
import struct
from dataclasses import replace

import made_images
import numpy as np
import pytest
import torch

from datasets import dataset, gaussians25, mnist, registry
from datasets.registry import DATASETS
from runtime.errors import UserError

SPLITS = ("train", "validation", "test")
IDX = {
    "train-images-idx3-ubyte": (5_200, 28, 28),
    "train-labels-idx1-ubyte": (5_200,),
    "t10k-images-idx3-ubyte": (100, 28, 28),
    "t10k-labels-idx1-ubyte": (100,),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A mirror that holds small stand-ins for the data sets of images, and their entries."""
    mirror = tmp_path_factory.mktemp("made")
    return mirror, made_images.write_all(mirror)


@pytest.fixture
def small(tmp_path, small_mnist, made, monkeypatch):
    """A mirror that holds small stand-ins for all data sets."""
    mirror, entries = made
    for folder in mirror.iterdir():
        (tmp_path / "mirror" / folder.name).symlink_to(folder)
    for name, entry in entries.items():
        monkeypatch.setitem(DATASETS, name, entry)


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """A mirror that holds a small stand-in for MNIST, with its checksums."""
    folder = tmp_path / "mirror" / "mnist"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, shape in IDX.items():
        values = draw.integers(0, 256 if len(shape) == 3 else 10, shape, dtype=np.uint8)
        content = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + values.tobytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        monkeypatch.setitem(mnist.CHECKSUMS, name, hashlib.md5(content).hexdigest())
    monkeypatch.setenv("PRIORHOLE_MIRROR", str(tmp_path / "mirror"))
    return folder


def fetched(name, tmp_path):
    folder = tmp_path / name
    dataset.fetch(name, folder, tmp_path / "raw")
    return dataset.load(name, folder)


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_keeps_the_contract(name, tmp_path, small):
    data, again = fetched(name, tmp_path), fetched(name, tmp_path)
    assert data.digest == again.digest
    shape = DATASETS[name].shape
    batch = data.train_batch(16, seed=1, step=3)
    assert batch.shape == (16, *shape)
    assert batch.dtype == torch.float32
    assert torch.equal(batch, again.train_batch(16, seed=1, step=3))
    assert not torch.equal(batch, data.train_batch(16, seed=1, step=4))
    assert not torch.equal(batch, data.train_batch(16, seed=2, step=3))
    for split in SPLITS:
        examples = data.examples(split)
        assert examples.shape[1:] == shape
        assert torch.equal(examples, again.examples(split))
        if DATASETS[name].kind == "binary-images":
            assert set(examples.unique().tolist()) <= {0.0, 1.0}
            assert data.images(split).min() >= 0
            assert data.images(split).max() <= 1
            assert len(data.labels(split)) == len(examples)
        if DATASETS[name].kind == "images":
            assert torch.equal(data.images(split), examples)
            assert torch.equal((examples * 255).round() / 255, examples)
            assert len(examples.unique(dim=0)) > 0.9 * len(examples)
            assert {"source", "jpeg"} == data.provenance.keys()


@pytest.mark.parametrize("name", DATASETS)
def test_a_second_fetch_keeps_a_current_file_and_heals_a_broken_one(name, tmp_path, small):
    digest = fetched(name, tmp_path).digest
    files = sorted((tmp_path / name).iterdir())
    written = [path.stat().st_mtime_ns for path in files]
    assert fetched(name, tmp_path).digest == digest
    assert [path.stat().st_mtime_ns for path in files] == written
    for path in files:
        content = path.read_bytes()
        for damaged in (b"", content[: len(content) // 2], None):
            path.unlink()  # loaded tensors are maps of the old file
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"(is corrupt|is missing).*: priorhole fetch") as error:
                dataset.load(name, tmp_path / name)
            assert "\n" not in str(error.value)
            assert fetched(name, tmp_path).digest == digest


@pytest.mark.parametrize("name", DATASETS)
def test_some_examples_are_those_of_the_whole_split(name, tmp_path, small):
    data = fetched(name, tmp_path)
    rows = torch.tensor([3, 0, 77])
    for split in SPLITS:
        assert torch.equal(data.examples(split, rows), data.examples(split)[rows])
        assert torch.equal(data.examples(split, slice(5, 9)), data.examples(split)[5:9])
        assert data.size(split) == len(data.examples(split))
        if DATASETS[name].kind != "points":
            assert torch.equal(data.images(split, rows), data.images(split)[rows])


def test_an_epoch_sees_every_example_once_in_an_order_of_its_own(monkeypatch):
    plain = replace(DATASETS["digits"], kind="points", shift=0)
    monkeypatch.setitem(DATASETS, "numbered", plain)
    data = dataset.Dataset("numbered", {"train": torch.arange(24.0)}, digest="")
    epochs = torch.stack([data.train_batch(6, 0, step) for step in range(12)]).view(3, 24)
    assert torch.equal(epochs.sort().values, torch.arange(24.0).expand(3, 24))
    assert len(epochs.unique(dim=0)) == 3
    # What a batch size leaves over waits for the next epoch: no batch mixes two.
    assert len(torch.cat([data.train_batch(7, 0, step) for step in range(3)]).unique()) == 21
    with pytest.raises(UserError, match="lower batch"):
        data.train_batch(25, 0, 0)


def test_binarisation_is_right_on_average(tmp_path):
    data = fetched("digits", tmp_path)
    drawn = torch.stack([data._as_examples(data._tensors["test"], torch.Generator().manual_seed(s)) for s in range(200)])
    assert (drawn.mean(0) - data.images("test")).abs().max() < 0.2
    assert abs(drawn.mean() - data.images("test").mean()) < 1e-3


def test_shifts_move_content_and_lose_nothing_but_the_edge():
    images = torch.zeros(500, 1, 8, 8)
    images[:, :, 4, 4] = 1
    moved = dataset._shifted(images, 1, torch.Generator().manual_seed(0))
    places = moved.flatten(1).argmax(1)
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(500))
    assert set(places.tolist()) == {8 * row + column for row in (3, 4, 5) for column in (3, 4, 5)}


def test_the_grid_of_gaussians_has_the_density_it_claims(tmp_path):
    x = gaussians25.fresh(200_000, torch.Generator().manual_seed(0)).double()
    assert gaussians25.log_density(x).mean().item() == pytest.approx(gaussians25.CEILING, abs=0.01)
    assert pytest.approx(-0.0648, abs=1e-3) == gaussians25.CEILING
    ticks = torch.linspace(-2.5, 2.5, 1001, dtype=torch.float64)
    plane = torch.cartesian_prod(ticks, ticks)
    mass = sum(gaussians25.log_density(part).exp().sum() for part in plane.split(100_000)) * (ticks[1] - ticks[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-3)


def test_the_digits_are_split_by_class_without_overlap(tmp_path):
    data = fetched("digits", tmp_path)
    counts = torch.stack([data.labels(split).bincount() for split in SPLITS])
    assert counts.sum(1).tolist() == [1197, 200, 400]
    assert (counts / counts.sum(1, keepdim=True) - 0.1).abs().max() < 0.01
    rows = [set(map(bytes, data._tensors[split].flatten(1).numpy())) for split in SPLITS]
    assert len(set.union(*rows)) == sum(map(len, rows))


def test_a_missing_or_wrong_or_unknown_data_set_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"missing; make it with: priorhole fetch"):
        dataset.load("digits", tmp_path / "none")
    fetched("digits", tmp_path)
    with pytest.raises(UserError, match="another configuration"):
        dataset.load("gaussians25", tmp_path / "digits")
    with pytest.raises(UserError, match="there are gaussians25, digits, mnist"):
        registry.spec("imagenet")


def test_points_have_neither_images_nor_labels(tmp_path):
    data = fetched("gaussians25", tmp_path)
    with pytest.raises(UserError, match="points, not images"):
        data.images("test")
    with pytest.raises(UserError, match="no labels"):
        data.labels("test")


@pytest.mark.parametrize("damage", ["truncate", "other content", "missing"])
def test_a_bad_mirror_file_is_refused_by_name_and_not_half_used(tmp_path, small_mnist, damage):
    victim = small_mnist / "t10k-images-idx3-ubyte.gz"
    content = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(content[: len(content) // 2] if damage == "truncate" else gzip.compress(b"something else"))
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte") as error:
        fetched("mnist", tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "mnist").exists()
    victim.write_bytes(content)
    assert len(fetched("mnist", tmp_path).examples("test")) == 100


def test_a_corrupt_download_is_refused_and_an_intact_one_is_used_without_a_mirror(tmp_path, small_mnist, monkeypatch):
    fetched("mnist", tmp_path)
    monkeypatch.delenv("PRIORHOLE_MIRROR")
    shutil.rmtree(tmp_path / "mnist")
    fetched("mnist", tmp_path)
    shutil.rmtree(tmp_path / "mnist")
    (tmp_path / "raw" / "MNIST" / "raw" / "train-labels-idx1-ubyte").write_bytes(b"partial")
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte is corrupt or partial"):
        fetched("mnist", tmp_path)


def test_no_network_names_the_cause_and_the_mirror_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("PRIORHOLE_MIRROR", raising=False)
    closed = ["http://127.0.0.1:9/"]  # the discard port: nobody listens
    monkeypatch.setattr(mnist.import_torchvision().datasets.MNIST, "mirrors", closed)
    with pytest.raises(UserError, match=r"127\.0\.0\.1.*PRIORHOLE_MIRROR") as error:
        fetched("mnist", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.skipif("PRIORHOLE_MIRROR" not in os.environ, reason="needs a mirror of the real MNIST")
def test_the_real_mnist_is_what_everyone_knows(tmp_path):
    data = fetched("mnist", tmp_path)
    assert [len(data.images(split)) for split in SPLITS] == [55_000, 5_000, 10_000]
    assert torch.cat([data.images("train"), data.images("validation")]).mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert data.labels("test").bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
