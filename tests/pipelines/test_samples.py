"""What is kept of samples, and of what the feature network has seen: no more than is needed, and none of it twice."""

import shutil

import pytest
import torch
from PIL import Image
from tiny import ALL_ROWS, tiny, write_params

from metrics.features import BATCH, OwnClassifier
from models.protocol import Group
from pipelines import features, figures, results
from pipelines.config import validate
from pipelines.fanout import Machine
from pipelines.features import Features
from pipelines.figures import picture_digest
from pipelines.fingerprints import fingerprint
from pipelines.recipe import Recipe
from pipelines.samples import LATENT_BYTES, LATENT_ROWS, Samples, latent_rows, rows_per_file, to_store
from pipelines.stages import Pipeline
from pipelines.stored import Stored
from runtime import checkpoints, rowfiles
from runtime.identity import Identity


@pytest.fixture(autouse=True)
def quick_network(monkeypatch):
    monkeypatch.setattr(OwnClassifier, "steps", 5)


def drawn(pixels, rows=range(3), latents=2):
    x = torch.tensor([[-0.2, 0.0, 0.4999 / 255, 0.5001 / 255], [0.2, 0.5, 0.999, 1.0], [1.7, 1.0, 0.0, 0.3]])
    found = {"x": x, "z/k00": torch.arange(6.0).view(3, 2), "ess/k00": torch.arange(3.0)}
    return found, to_store(found, rows, pixels, latents)


def test_images_are_kept_as_an_image_file_would_hold_them():
    _, kept = drawn("uint8")
    assert kept["x"].dtype == torch.uint8
    assert kept["x"].tolist() == [[0, 0, 0, 1], [51, 128, 255, 255], [255, 255, 0, 76]]


@pytest.mark.parametrize("pixels", ["float32", None])
def test_floats_are_kept_as_they_are(pixels):
    found, kept = drawn(pixels)
    assert torch.equal(kept["x"], found["x"])


@pytest.mark.parametrize(("start", "left"), [(0, 2), (1, 1), (2, None), (7, None)])
def test_latents_are_kept_of_the_first_rows_alone(start, left):
    found, kept = drawn("uint8", range(start, start + 3))
    assert ("z/k00" in kept) == (left is not None)
    if left is not None:
        assert torch.equal(kept["z/k00"], found["z/k00"][:left])
    assert torch.equal(kept["ess/k00"], found["ess/k00"])


@pytest.mark.parametrize("side", [1, 8, 64, 512, 4096])
def test_latents_on_the_disk_are_bounded_whatever_their_size(side):
    layout = [Group(k, (20, side, side), (4, side, side)) for k in range(15)]
    rows = latent_rows(layout)
    assert 2 <= rows <= LATENT_ROWS
    assert rows == 2 or rows * 15 * 20 * side**2 * 4 <= LATENT_BYTES


@pytest.mark.parametrize(("wanted", "batch", "rows"), [(2000, 100, 2000), (1, 20, 100), (2000, 64, 3200), (150, 50, 200)])
def test_files_hold_whole_batches(wanted, batch, rows):
    assert rows_per_file(wanted, batch) == rows
    assert rows % batch == 0
    assert rows % BATCH == 0


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_samples_are_read_a_file_at_a_time_and_no_further_than_their_number(tmp_path, dtype):
    x = torch.randint(256, (30, 1, 2, 2), dtype=torch.uint8)
    kept = x if dtype == "uint8" else x.float() / 255
    rowfiles.fill(tmp_path, Identity("toy", 0), 30, 8, 4, lambda rows: {"x": kept[list(rows)]})
    samples = Samples(rowfiles.stored(tmp_path, ""), 27, "")
    parts = list(samples.parts())
    assert [len(part) for part in parts] == [8, 8, 8, 3]
    assert torch.equal(torch.cat(parts), x[:27].float() / 255)
    assert torch.equal(samples.first(10), x[:10].float() / 255)


def seen_by(monkeypatch):
    """The images that the network is shown from now on, one number a call."""
    shown, batch = [], OwnClassifier.batch
    monkeypatch.setattr(OwnClassifier, "batch", lambda self, images: shown.append(len(images)) or batch(self, images))
    return shown


def numbers(path):
    table = results.read(path, "")
    return table[~table.metric.str.contains("seconds")].drop(columns=["seconds", "revision"]).reset_index(drop=True)


def test_what_the_network_has_seen_is_not_shown_to_it_again(checkout, monkeypatch):
    params = tiny()
    params["experiments"]["deep"]["sample"] |= {"images": 230, "rows_per_file": 100}
    params["experiments"]["other"] = params["experiments"]["deep"] | {"trained_in": "deep"}
    write_params(checkout, params)
    pipeline = Pipeline(checkout, Machine(workers=1))
    shown = seen_by(monkeypatch)
    for stage in ("fetch", "train_vae", "train_prior", "sample"):
        getattr(pipeline, stage)("deep")
    first = numbers(pipeline.evaluate("deep"))
    data = {"train": 1197, "test": 400}
    draws, seeds, files = 3, 2, 3
    # The data set's own images once for both seeds; samples and the aggregate posterior once a file; one for the width.
    assert sum(shown) == sum(data.values()) + 2 + seeds * (draws + 1) * 230
    shown.clear()
    assert numbers(pipeline.evaluate("deep")).equals(first)
    assert not shown
    # A lost file's features are computed again, and no others.
    folder = pipeline.workspace.measured("deep") / "ncp+sir-20" / "seed-0" / "digits"
    assert len(list(folder.iterdir())) == files
    next(folder.glob("*00000100-*")).unlink()
    assert numbers(pipeline.evaluate("deep")).equals(first)
    assert sum(shown) == 100
    # Another experiment on the same data set shows its samples alone.
    shown.clear()
    for stage in ("fetch", "sample", "evaluate"):
        getattr(pipeline, stage)("other")
    assert sum(shown) == seeds * (draws + 1) * 230


def test_features_of_other_samples_are_not_taken_for_these(done, monkeypatch):
    pipeline = Pipeline(done, Machine(workers=1))
    params = tiny()
    params["experiments"]["deep"]["samplers"]["sir-20"]["proposals"] = 3
    write_params(done, params)
    pipeline.sample("deep")
    stored = Stored(Recipe(params, "deep", 0, done))
    found = Features(stored, "own", lambda *_: None)
    samples = stored.samples("ncp", "sir-20")
    assert torch.equal(found.of_samples(samples, "ncp+sir-20"), found.network(samples.first(30)))


def test_samples_that_are_here_are_shown_until_all_of_them_are(done):
    folder, recipe = done / "reports" / "figures", Recipe(tiny(), "deep", 0, done)
    away = done / "artifacts" / "deep" / "samples"
    folder.mkdir(parents=True, exist_ok=True)

    def pictures():
        paths = list(figures.of_artifacts(Stored(recipe), folder))
        return [(path.name, Image.open(path).size[0]) for path in paths]

    ((name, whole),) = pictures()
    assert name == "deep-samples.png"
    away.rename(done / "away")
    assert pictures() == []  # and the one of all samples stays
    assert (folder / name).exists()
    (folder / name).unlink()
    for count, draw in enumerate(["normal+ancestral", "ncp+sir-20", "ncp+langevin"], 1):
        shutil.copytree(done / "away" / draw, away / draw)
        ((_, width),) = pictures()
        assert width == pytest.approx(whole * count / 3, rel=0.1)
    shutil.rmtree(away / draw)
    assert pictures() == []


def test_features_of_what_the_experiment_no_longer_draws_are_dropped(done):
    pipeline = Pipeline(done, Machine(workers=1))
    folder = pipeline.workspace.measured("deep")
    assert {path.name for path in folder.iterdir()} == {
        "aggregate-posterior",
        "normal+ancestral",
        "ncp+sir-20",
        "ncp+langevin",
    }
    params = tiny()
    params["experiments"]["deep"]["priors"]["ncp"]["samplers"] = ["sir-20"]
    params["experiments"]["deep"]["seeds"] = [0]
    write_params(done, params)
    pipeline.sample("deep")
    pipeline.evaluate("deep")
    assert not (folder / "ncp+langevin").exists()
    assert [path.name for path in (folder / "ncp+sir-20").iterdir()] == ["seed-0"]


def test_experiments_on_one_data_set_share_its_preparation(checkout):
    params = tiny()
    params["experiments"]["other"] = params["experiments"]["deep"]
    write_params(checkout, params)
    pipeline = Pipeline(checkout)
    pipeline.fetch("deep")
    written = {path: path.stat().st_mtime_ns for path in pipeline.workspace.prepared("digits").iterdir()}
    pipeline.fetch("other")
    assert {path: path.stat().st_mtime_ns for path in pipeline.workspace.prepared("digits").iterdir()} == written
    assert pipeline.workspace.data("deep").read_text() == pipeline.workspace.data("other").read_text()
    assert '"dataset": "digits"' in pipeline.workspace.data("deep").read_text()


def test_quantised_samples_say_so_in_their_rows(done):
    pipeline = Pipeline(done, Machine(workers=1))
    for pixels in ("uint8", "float32"):
        params = tiny()
        params["experiments"]["deep"]["sample"]["pixels"] = pixels
        params["experiments"]["deep"]["seeds"] = [0]
        write_params(done, params)
        pipeline.sample("deep")
        table = results.read(pipeline.evaluate("deep"), "")
        said = table[table.metric.str.startswith("fid-")].features
        assert said.str.endswith("; 8-bit pixels").all() == (pixels == "uint8")
        path = pipeline.workspace.samples("deep", "ncp", "sir-20", 0) / ALL_ROWS
        assert checkpoints.load_tensor(path, "x", "").dtype == getattr(torch, pixels)


def test_how_rows_are_kept_is_part_of_a_result_only_where_it_changes_a_number():
    def digests(name, **settings):
        params = tiny()
        params["experiments"][name]["sample"] |= settings
        experiment = validate(params).experiments[name]
        return fingerprint(experiment, "ncp", "sir-20", "fid-digits-30"), picture_digest(experiment)

    assert digests("deep", rows_per_file=100) == digests("deep", rows_per_file=5000)
    assert digests("flat", pixels="uint8") == digests("flat", pixels="float32")  # points are no images
    assert not set(digests("deep", pixels="uint8")) & set(digests("deep", pixels="float32"))
    assert not set(digests("deep", images=30)) & set(digests("deep", images=40))


def test_opening_a_data_set_reads_none_of_it(checkout, monkeypatch):
    from datasets import dataset

    pipeline = Pipeline(checkout)
    pipeline.fetch("deep")
    folder = pipeline.workspace.prepared("digits")
    before = dataset.load("digits", folder)
    content = (folder / "train.npy").read_bytes()
    (folder / "train.npy").unlink()
    (folder / "train.npy").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert dataset.load("digits", folder).digest == before.digest  # the last byte is looked at when it is verified
    assert features.IMAGES_AT_ONCE % BATCH == 0
