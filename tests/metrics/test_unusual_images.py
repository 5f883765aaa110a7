"""Images that no picture can be: pixels outside [0, 1], and features that are not numbers."""

import math

import pytest
import torch

from metrics import features, frechet, kid
from metrics.features import CleanFID, EfficientNetLite, FeatureNetwork, Labelled, OwnClassifier, PytorchFID
from runtime.errors import UserError
from runtime.identity import Identity


class Pixels(FeatureNetwork):
    """Features are the pixels themselves."""

    name, digest = "pixels", ""

    def batch(self, images):
        return images.flatten(1)


def own_classifier(folder, monkeypatch):
    monkeypatch.setattr(OwnClassifier, "steps", 2)
    labelled = Labelled(torch.rand(40, 1, 8, 8).__getitem__, torch.arange(40) % 4)
    return OwnClassifier("toy", labelled, labelled, folder / "features.safetensors", Identity("toy", 0))


def pytorch_fid(folder, monkeypatch):
    network = PytorchFID.__new__(PytorchFID)  # the weights are not at hand: colours stand in for what they make
    network.network = lambda images: [images.mean((2, 3), keepdim=True)]
    return network


def clean_fid(folder, monkeypatch):
    from cleanfid.resize import make_resizer

    network = CleanFID.__new__(CleanFID)
    network.network = lambda images: images.mean((2, 3))
    network._resize = make_resizer("PIL", False, "bicubic", (299, 299))
    return network


def efficientnet(folder, monkeypatch):
    network = EfficientNetLite.__new__(EfficientNetLite)
    network.side, network.network = 16, torch.nn.Module()
    network.network.extract_features = lambda images: images
    return network


BUILDERS = {
    Pixels: lambda folder, monkeypatch: Pixels(),
    OwnClassifier: own_classifier,
    PytorchFID: pytorch_fid,
    CleanFID: clean_fid,
    EfficientNetLite: efficientnet,
}


def test_every_network_is_among_them():
    assert {OwnClassifier, *features.PRETRAINED.values()} <= BUILDERS.keys()


@pytest.mark.parametrize("kind", BUILDERS, ids=lambda kind: kind.__name__)
def test_a_network_sees_what_a_picture_shows(kind, tmp_path, monkeypatch):
    network = BUILDERS[kind](tmp_path, monkeypatch)
    # More than a batch, and strays in the first batch, the second, both ways.
    images = torch.rand(130, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    strays = images.clone()
    strays[3] += 0.7
    strays[7] -= 0.7
    strays[120] = 5 * strays[120] - 2
    kept = strays.clone()
    found = network(strays)
    assert torch.equal(found, network(strays.clamp(0, 1)))
    assert torch.equal(strays, kept)  # the caller's images are left alone
    untouched = [row for row in range(130) if row not in (3, 7, 120)]
    assert torch.equal(found[untouched], network(images)[untouched])
    with torch.no_grad():
        unclamped = network.batch(strays[:100]).float().cpu()
    for row in (3, 7):
        assert not torch.allclose(found[row], unclamped[row])


MEASURES = {"fid": frechet.fid, "kid": kid.kid}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("broken", ["features", "reference"])
@pytest.mark.parametrize("measure", MEASURES)
def test_features_that_are_not_finite_are_refused_in_one_line_that_names_them(measure, broken, value):
    noise = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(50, 4, generator=noise) for name in ("features", "reference")}
    MEASURES[measure](rows["features"], rows["reference"], 0)
    rows[broken][17, 2] = rows[broken][30, :] = value
    with pytest.raises(UserError, match=f"^{broken}: the features of 2 of 50 images are not finite") as error:
        MEASURES[measure](rows["features"], rows["reference"], 0)
    assert "\n" not in str(error.value)
