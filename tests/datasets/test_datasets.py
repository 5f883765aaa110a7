import gzip
import hashlib
import struct

import numpy as np
import pytest
import torch

from datasets import dataset, gaussians25, mnist, registry
from datasets.registry import DATASETS
from runtime.errors import UserError

IDX = {
    "train-images-idx3-ubyte": (5_200, 28, 28),
    "train-labels-idx1-ubyte": (5_200,),
    "t10k-images-idx3-ubyte": (100, 28, 28),
    "t10k-labels-idx1-ubyte": (100,),
}


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
    path = tmp_path / f"{name}.safetensors"
    dataset.fetch(name, path, tmp_path / "raw")
    return dataset.load(name, path)


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_keeps_the_contract(name, tmp_path, small_mnist):
    data, again = fetched(name, tmp_path), fetched(name, tmp_path)
    assert data.digest == again.digest
    shape = DATASETS[name].shape
    batch = data.train_batch(16, seed=1, step=3)
    assert batch.shape == (16, *shape)
    assert batch.dtype == torch.float32
    assert torch.equal(batch, again.train_batch(16, seed=1, step=3))
    assert not torch.equal(batch, data.train_batch(16, seed=1, step=4))
    assert not torch.equal(batch, data.train_batch(16, seed=2, step=3))
    for split in ("train", "validation", "test"):
        examples = data.examples(split)
        assert examples.shape[1:] == shape
        assert torch.equal(examples, again.examples(split))
        if DATASETS[name].kind == "binary-images":
            assert set(examples.unique().tolist()) <= {0.0, 1.0}
            assert data.images(split).min() >= 0
            assert data.images(split).max() <= 1
            assert len(data.labels(split)) == len(examples)


@pytest.mark.parametrize("name", [name for name, spec in DATASETS.items() if spec.fresh is None])
def test_an_epoch_sees_every_image_once_and_binarisation_keeps_its_grey(name, tmp_path, small_mnist, monkeypatch):
    data = fetched(name, tmp_path)
    monkeypatch.setattr(data, "spec", registry.DatasetSpec(**vars(data.spec) | {"shift": 0, "kind": "points"}))
    size = len(data.examples("train")) // 4
    epoch = torch.cat([data.train_batch(size, 0, step) for step in range(4)])
    whole = data.examples("train")
    assert abs(epoch.double().sum() / whole[: len(epoch)].double().sum() - 1) < 0.05
    assert len(epoch.flatten(1).unique(dim=0)) == len(whole.flatten(1)[: len(epoch)].unique(dim=0)) or len(epoch) < len(
        whole
    )
    with pytest.raises(UserError, match="lower batch"):
        data.train_batch(10**6, 0, 0)


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


def test_splits_do_not_overlap(tmp_path):
    data = fetched("digits", tmp_path)
    assert [len(data.images(split)) for split in ("train", "validation", "test")] == [1197, 200, 400]
    rows = [set(map(bytes, data._tensors[split].flatten(1).numpy())) for split in ("train", "validation", "test")]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]


def test_a_missing_or_wrong_or_unknown_data_set_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"missing; make it with: priorhole fetch"):
        dataset.load("digits", tmp_path / "none.safetensors")
    fetched("digits", tmp_path)
    with pytest.raises(UserError, match="another configuration"):
        dataset.load("gaussians25", tmp_path / "digits.safetensors")
    with pytest.raises(UserError, match="there are gaussians25, digits, mnist"):
        registry.spec("imagenet")


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
    assert not (tmp_path / "mnist.safetensors").exists()
    victim.write_bytes(content)
    assert len(fetched("mnist", tmp_path).examples("test")) == 100


def test_a_corrupt_download_is_refused_and_an_intact_one_is_used_without_a_mirror(tmp_path, small_mnist, monkeypatch):
    fetched("mnist", tmp_path)
    monkeypatch.delenv("PRIORHOLE_MIRROR")
    (tmp_path / "mnist.safetensors").unlink()
    fetched("mnist", tmp_path)
    (tmp_path / "mnist.safetensors").unlink()
    (tmp_path / "raw" / "MNIST" / "raw" / "train-labels-idx1-ubyte").write_bytes(b"partial")
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte is corrupt or partial"):
        fetched("mnist", tmp_path)


def test_no_network_names_the_mirror_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("PRIORHOLE_MIRROR", raising=False)
    monkeypatch.setattr(
        mnist.import_torchvision().datasets.MNIST, "download", lambda self: (_ for _ in ()).throw(OSError("no"))
    )
    with pytest.raises(UserError, match="PRIORHOLE_MIRROR"):
        fetched("mnist", tmp_path)
