"""Experiments on colour images go through all stages on drawn images, in the layouts of the real ones.

All of the flat models; of the hierarchical ones, which differ by sizes, one with posterior flows.
"""

from pathlib import Path

import made_images
import pandas as pd
import pytest
import torch
import yaml
from tiny import write_params

from datasets.registry import DATASETS
from metrics import features
from metrics.features import FeatureNetwork
from pipelines import config, results
from pipelines.fanout import Machine
from pipelines.stages import Pipeline
from runtime.checkpoints import load_document
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())["experiments"]
KINDS = {name: entry.kind for name, entry in DATASETS.items()}
EXPERIMENTS = [name for name, experiment in PARAMS.items() if KINDS[experiment["dataset"]] == "images"]
FLAT = [name for name in EXPERIMENTS if PARAMS[name]["model"]["name"] != "nvae"]
STEPS = {"steps": 4, "batch": 16, "checks": 2, "held_out": 20}


class Colours(FeatureNetwork):
    """A quarter of an image has a mean of each colour: twelve features, in place of a network's."""

    name, digest = "colours", "0" * 8

    def batch(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture(autouse=True)
def small_images(tmp_path_factory, monkeypatch):
    """All image data sets, drawn; and a feature network that is nearly nothing."""
    mirror = tmp_path_factory.mktemp("mirror")
    for name, entry in made_images.write_all(mirror).items():
        monkeypatch.setitem(DATASETS, name, entry)
    monkeypatch.setenv("PRIORHOLE_MIRROR", str(mirror))
    for name in features.PRETRAINED:
        monkeypatch.setitem(features.PRETRAINED, name, Colours)


def shrunk(experiment):
    """An experiment at the least budget: the same keys, priors, samplers and metrics."""
    small = experiment | {"seeds": experiment["seeds"][:1], "train": experiment["train"] | {"steps": 4, "batch": 16}}
    least = {"groups_per_scale": [1, 1], "latent_channels": 1, "width": 4, "cells": 1, "outer_cells": 1}
    flat = {"latents": 3, "widths": [4, 6, 8, 10]}
    small["model"] = experiment["model"] | (least if experiment["model"]["name"] == "nvae" else flat)
    small["priors"] = {
        name: prior
        | ({"codes": 48, "batch": 16, "components": min(2, prior["components"])} if prior["method"] == "gmm" else {})
        | (STEPS if "steps" in prior else {})
        | {key: {"width": 8, "depth": 1} for key in ("network", "energy") if key in prior}
        | ({"flow": {"transforms": 1, "width": 8, "depth": 1}} if "flow" in prior else {})
        for name, prior in experiment["priors"].items()
    }
    small["samplers"] = {
        name: sampler | {key: min(5, sampler[key]) for key in ("proposals", "steps") if key in sampler}
        for name, sampler in experiment["samplers"].items()
    }
    small["sample"] = experiment["sample"] | {"images": 30, "batch": 20}
    small["evaluate"] = experiment["evaluate"] | {"batch": 10}
    if "reference_images" in experiment["evaluate"]:
        small["evaluate"]["reference_images"] = 60
    if "likelihood" in experiment["evaluate"]:
        small["evaluate"]["likelihood"] = {"samples": [1, 4], "normaliser": [5], "proposals": [5], "pool": 100}
        small["evaluate"]["examples"] = 20
    return small


@pytest.mark.parametrize("name", [*FLAT, "cifar10-nvae"])
def test_it_goes_through_all_stages(name, checkout):
    experiment = shrunk(PARAMS[name])
    write_params(checkout, {"run": [], "experiments": {name: experiment}})
    pipeline = Pipeline(checkout, Machine(workers=1))
    for stage in ("fetch", "train_vae", "train_prior", "sample", "evaluate"):
        getattr(pipeline, stage)(name)
    pipeline.report()
    table = pd.read_csv(checkout / "reports" / "results.csv", keep_default_na=False)
    drawn = {(prior, sampler) for prior, options in experiment["priors"].items() for sampler in options["samplers"]}
    networks = ["colours", *([experiment["dataset"]] if "own" in experiment["evaluate"]["features"] else [])]
    for network in networks:
        fids = table[table.metric == f"fid-{network}-30"]
        assert set(zip(fids.prior, fids.sampler, strict=True)) == {*drawn, ("aggregate-posterior", "")}
        assert fids.value.between(0, 10).all()
        assert fids.features.str.match(rf"{network}@.*; from (zip|folder|cifar-10)").all()
    assert table[table.prior == "data"].metric.str.match(f"(fid|kid)-({'|'.join(networks)})-").all()
    assert set(table.fingerprint.str.len()) == {25}
    assert not table.duplicated([*results.KEYS, "seed"]).any()
    deterministic = experiment["model"]["name"] == "rae"
    assert table.metric.str.startswith("loglik").any() != deterministic
    assert (checkout / "reports" / "figures" / f"{name}-samples.png").exists()


def test_how_images_are_shown_is_part_of_what_later_stages_depend_on(checkout):
    """DVC sees a data set by the file that names it; a model trained on other bits or flips is another model."""
    experiment, seen = shrunk(PARAMS["cifar10-vae-lite"]), []
    for images in ({}, {"images": {"flip": True}}, {"images": {"bits": 5}}):
        write_params(checkout, {"run": [], "experiments": {"shown": experiment | images}})
        pipeline = Pipeline(checkout, Machine(workers=1))
        pipeline.fetch("shown")
        pipeline.train_vae("shown")
        digest = load_document(checkout / "artifacts" / "shown" / "vae" / "seed-0.safetensors", "")["digest"]
        seen.append(((checkout / "data" / "shown.json").read_text(), digest))
    assert len({named for named, _ in seen}) == len({digest for _, digest in seen}) == 3


def test_recompressed_images_are_never_held_against_an_absolute_target():
    """An absolute target is of the original images, under Inception's features."""
    claims = yaml.safe_load((ROOT / "reports" / "targets.yaml").read_text())["claims"]
    judged = [claim for claim in claims if claim.get("experiment") in EXPERIMENTS]
    assert judged
    for claim in judged:
        assert claim["kind"] != "absolute" or PARAMS[claim["experiment"]]["dataset"] != "cifar10-jpeg", claim["id"]
    validated = config.validate({"run": [], "experiments": PARAMS}).experiments
    for name in EXPERIMENTS:
        networks = validated[name].evaluate.networks
        assert networks == (["efficientnet-lite0", "own"] if "-lite" in name else ["pytorch-fid"]), name


def test_images_without_classes_have_no_classifier_of_their_own():
    experiment = PARAMS["celeba64-vae"]
    named = experiment | {"evaluate": experiment["evaluate"] | {"features": ["pytorch-fid", "own"]}}
    with pytest.raises(UserError, match="celeba64-140 has no classes; name another"):
        config.validate({"run": [], "experiments": {"faces": named}})
