"""Experiments on image data sets, made here: from an archive through the stages, and what their settings enter."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import made_images
import pytest
import yaml
from started import PROGRESS, as_in_a_terminal, marked, survivors, wait_until
from tiny import tiny, write_params

from datasets import dataset
from datasets.registry import DATASETS
from pipelines import fingerprints, results
from pipelines.config import validate
from pipelines.recipe import Recipe
from pipelines.stages import Pipeline
from pipelines.stored import Stored
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
COUNTS = (200, 60, 60)
STAGES = ("fetch", "train_vae", "train_prior", "sample", "evaluate")


def params(**changes):
    """One experiment on faces at the least budget, and one on digits."""
    found = tiny()
    deep = found["experiments"]["deep"]
    faces = deep | {
        "dataset": "celeba64",
        "images": {"bits": 5, "flip": True},
        "seeds": [0],
        "model": deep["model"] | {"likelihood": "normal", "halvings": 3, "groups_per_scale": [1, 1]},
        "train": deep["train"] | {"steps": 5},
        "priors": {"normal": deep["priors"]["normal"]},
        "sample": deep["sample"] | {"images": 8, "batch": 4},
        "evaluate": deep["evaluate"] | {"examples": 4, "batch": 2, "features": None},
    }
    found["experiments"]["faces"] = faces | changes
    return found


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """A mirror with a small CelebA, and that one's checksums."""
    folder = tmp_path_factory.mktemp("mirror")
    return folder, made_images.celeba(folder, COUNTS)


@pytest.fixture
def faces(checkout, mirror, monkeypatch):
    """A checkout with an experiment on faces."""
    folder, checksums = mirror
    monkeypatch.setenv("PRIORHOLE_MIRROR", str(folder))
    monkeypatch.setitem(DATASETS, "celeba64", replace(DATASETS["celeba64"], checksums=checksums))
    write_params(checkout, params())
    return checkout


SCRIPT = """
import os, sys, time
from dataclasses import replace

sys.path[:0] = [{root!r}, {support!r}]
from datasets.registry import DATASETS

DATASETS["celeba64"] = replace(DATASETS["celeba64"], checksums={checksums!r})

if __name__ == "__main__":
    from datasets import decoding, pictures
    from pipelines import cli, fanout

    pictures.BYTES_AT_ONCE, fanout.LINE_SECONDS = 20 * 64 * 64 * 3, 0.2
    found, seconds = decoding.pictures, float(os.environ["SECONDS_AN_IMAGE"])

    def slow(*arguments):
        there = found(*arguments)
        return replace(there, read=lambda name: (time.sleep(seconds), there.read(name))[1])

    decoding.pictures = slow
    cli.main()
"""


def test_a_fetch_of_faces_shows_its_progress_and_goes_on_after_a_kill(faces, mirror, tmp_path):
    script = tmp_path / "made.py"
    script.write_text(SCRIPT.format(root=str(ROOT), support=str(SUPPORT), checksums=mirror[1]))
    environment, mark = marked()
    command = [sys.executable, str(script), "fetch", "faces", "--workers", "2"]
    state = faces / "artifacts" / ".progress" / "fetch-faces" / "0.json"
    files = faces / "data" / "raw" / ".decoded-celeba64" / "img_align_celeba"
    slow, quick = environment | {"SECONDS_AN_IMAGE": "0.05"}, environment | {"SECONDS_AN_IMAGE": "0"}
    running = subprocess.Popen(command, cwd=faces, env=slow, stderr=subprocess.PIPE, preexec_fn=as_in_a_terminal, text=True)
    wait_until(lambda: len(list(files.glob("rows-*.safetensors"))) >= 2)
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=60)[1].splitlines()
    assert running.returncode == 128 + signal.SIGTERM
    assert not survivors(mark)
    assert said[-1].startswith("stopped by SIGTERM")
    assert [line for line in said[:-1] if re.fullmatch(r"data set celeba64: \d+/320 .*", line) and PROGRESS.match(line)]
    assert not (faces / "data" / "prepared" / "celeba64" / "document.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in files.glob("rows-*.safetensors")}
    done = subprocess.run(command, cwd=faces, env=quick, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(state.read_text())["done"] == 320
    assert len(kept) >= 2
    assert not files.parent.exists()
    data = dataset.load("celeba64", faces / "data" / "prepared" / "celeba64")
    assert tuple(data.size(split) for split in ("train", "validation", "test")) == COUNTS
    dataset.fetch("celeba64", tmp_path / "undisturbed", tmp_path / "raw")
    assert dataset.load("celeba64", tmp_path / "undisturbed").digest == data.digest


def test_a_broken_image_is_one_line_of_the_command_without_progress_or_traceback(faces, mirror, tmp_path):
    script, other = tmp_path / "made.py", tmp_path / "mirror"
    checksums = made_images.celeba(other, (4, 2, 2))
    script.write_text(SCRIPT.format(root=str(ROOT), support=str(SUPPORT), checksums=checksums))
    archive = other / "celeba" / "img_align_celeba.zip"
    archive.write_bytes(b"<!DOCTYPE html>")
    done = subprocess.run(
        [sys.executable, str(script), "fetch", "faces"],
        cwd=faces,
        env=os.environ | {"SECONDS_AN_IMAGE": "0", "PRIORHOLE_MIRROR": str(other)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert re.fullmatch(rf"error: {archive} is a web page .*\n", done.stderr)


def test_faces_go_through_all_stages_and_are_shown_as_the_experiment_says(faces):
    pipeline = Pipeline(faces)
    for stage in STAGES:
        getattr(pipeline, stage)("faces")
    pipeline.report()
    table = results.read(faces / "reports" / "results.csv", "priorhole report")
    assert {"loglik", "seconds-per-image"} <= set(table.metric)
    stored = Stored(Recipe(params(), "faces", 0, faces))
    assert stored.dataset.options.bits == 5
    assert stored.vae_document["config"]["images"] == {"bits": 5, "flip": True}
    before = stored.samples_identity("normal", "ancestral").config
    other = params(images={"bits": 8, "flip": True})
    with pytest.raises(UserError, match=r"images\.bits is 5 there and 8 here"):
        Stored(Recipe(other, "faces", 0, faces)).samples_identity("normal", "ancestral")
    assert before["vae digest"] == stored.vae_document["digest"]


def test_how_images_are_shown_enters_what_it_changes_and_nothing_else(faces):
    Pipeline(faces).fetch("deep")
    digits = Stored(Recipe(params(), "deep", 0, faces)).identities.vae().config
    assert digits.keys() == {"dataset", "model", "train", "seed"}

    def prints(**changes):
        experiment = validate(params(**changes)).experiments["faces"]
        return fingerprints.fingerprint(experiment, "normal", "", "loglik")

    assert prints() != prints(images={"bits": 8, "flip": True})
    assert prints() != prints(images={"bits": 5})
    assert prints(images={"bits": 8}) == prints(images=None) == prints(images={})  # defaults, spelt out or not


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dataset": "digits"}, r"experiments.faces: images: digits holds binary-images, which have no bits or flips"),
        ({"dataset": "gaussians25"}, r"experiments.faces: images: gaussians25 holds points"),
        ({"images": {"bits": 7}}, r"experiments.faces.images.bits: Input should be 5 or 8 \(it is 7\)"),
        ({"images": {"flip": 1}}, r"experiments.faces.images.flip: .*boolean \(it is 1\)"),
        ({"images": {"crop": 1}}, r"experiments.faces.images.crop: Extra inputs"),
        ({"images": 5}, r"experiments.faces.images: .* \(it is 5\)"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(changes, says):
    with pytest.raises(UserError) as error:
        validate(params(**changes))
    assert re.match(rf"params.yaml: {says}", str(error.value))
    assert "\n" not in str(error.value)


def test_bernoulli_does_not_fit_levels():
    found = params()
    found["experiments"]["faces"]["model"]["likelihood"] = "bernoulli"
    with pytest.raises(UserError, match="celeba64 is not binary, so bernoulli does not fit; use normal"):
        validate(found)


def test_a_mixtures_levels_are_those_of_the_images():
    found = params()
    model = {"name": "nvae", "groups_per_scale": [2], "latent_channels": 1, "width": 4, "halvings": 1}
    found["experiments"]["faces"]["model"] = model | {"likelihood": "logistic-mixture"}
    with pytest.raises(UserError, match="a mixture of 8 bits does not fit images of 5; change either"):
        validate(found)
    found["experiments"]["faces"]["model"]["bits"] = 5
    validate(found)


def test_the_docs_settings_of_images_are_valid():
    readme = (ROOT / "docs" / "extending.md").read_text()
    shown = yaml.safe_load(re.search(r"```yaml\n(dataset: .*?)```", readme, re.DOTALL)[1])
    assert validate(params(images=shown["images"])).experiments["faces"].shown.flip
