"""Every stage on a pretend accelerator, which refuses any mix of devices: all models, priors, samplers and networks."""

import hashlib

import pandas as pd
import pytest
import torch
from inception import random_inception
from pretend import MixedDevicesError, accelerator
from tiny import tiny, write_params

from metrics.features import EfficientNetLite, OwnClassifier, PytorchFID
from models.registry import MODELS
from pipelines import blueprint, tracking
from pipelines.fanout import Machine
from pipelines.stages import Pipeline
from priors.registry import PRIORS, SAMPLERS
from runtime import checkpoints, hardware, randomness, training

STAGES = ("fetch", "train_vae", "train_prior", "sample", "evaluate")
FEW = {"steps": 3, "batch": 8, "held_out": 8, "checks": 1}
NCP = FEW | {"method": "ncp", "network": {"width": 8, "depth": 1}}
EVALP = FEW | {"method": "evalp", "flow": {"transforms": 1, "width": 8, "depth": 1}}
FLOW = FEW | {"method": "flow", "flow": {"transforms": 1, "width": 8, "depth": 1}}
FITTED = {"method": "gmm", "codes": 40, "batch": 20, "samplers": ["ancestral"]}
MAPS = {"groups_per_scale": [1, 1], "latent_channels": 2, "halvings": 1}
TRAINED = {"steps": 3, "batch": 8, "learning_rate": 0.002, "precision": "fp32"}


def in_half_precision(experiment):
    """The same with everything that has a ``precision`` in bf16, which the device is said to gain from."""
    auto = {"precision": "auto"}
    options = experiment["priors"].items()
    return experiment | {
        "train": experiment["train"] | auto,
        "priors": {name: prior | (auto if "steps" in prior else {}) for name, prior in options},
        "samplers": {n: s | (auto if s["method"] == "sir" else {}) for n, s in experiment["samplers"].items()},
    }


def params():
    """An experiment of every model."""
    common = tiny()["experiments"]["deep"] | {
        "seeds": [0],
        "dataset": "digits",
        "train": TRAINED,
        "samplers": {
            "ancestral": {"method": "ancestral"},
            "sir-20": {"method": "sir", "proposals": 20},
            "sir-early": {"method": "sir", "proposals": 120, "until_ess": 2},
            "langevin": {"method": "langevin", "steps": 1, "step_size": 0.01, "metropolis": True},
            "both": {"method": "sir-langevin", "proposals": 20, "steps": 1, "step_size": 0.01, "precision": "fp32"},
            "joint": {"method": "joint-langevin", "steps": 1, "step_size": 0.01, "metropolis": True},
        },
        "sample": {"images": 4, "batch": 3, "decoding": "sample"},
    }
    likelihood = {"samples": [1, 3], "normaliser": [4], "proposals": [4], "resamples": 2, "pool": 64}
    common["evaluate"] = {"likelihood": likelihood, "examples": 3, "batch": 2, "features": "own"}
    flat = common | {
        "dataset": "gaussians25",
        "model": {"name": "mlp-vae", "latents": 2, "width": 8},
        "priors": {
            "normal": {"method": "normal", "samplers": ["ancestral"]},
            "gmm": FITTED | {"components": 2},
            "flow": FLOW | {"samplers": ["ancestral"]},
            "evalp-gmm": EVALP | {"base": "gmm", "samplers": ["sir-20"]},
            "ncp": NCP | {"samplers": ["sir-20"]},
        },
    }
    flat["evaluate"] = {key: value for key, value in common["evaluate"].items() if key != "features"}
    deep = common | {
        "model": MAPS | {"name": "residual-hvae", "width": 8},
        "priors": {
            "normal": {"method": "normal", "samplers": ["ancestral"]},
            "evalp": EVALP | {"groups": [0], "samplers": ["sir-20"]},
            "amortised": {"method": "amortised", "base": "evalp", "samplers": ["ancestral"]},
            "ncp": NCP | {"samplers": ["sir-early", "langevin", "both", "joint"]},
        },
    }
    nvae = common | {
        "model": MAPS | {"name": "nvae", "groups_per_scale": [1], "width": 4, "outer_cells": 1, "cells": 1},
        "train": TRAINED | {"optimizer": "adamax", "spectral": 0.01, "ema": 0.9, "steps": 4, "restarts": {3: 0.001}},
        "priors": {"ncp": NCP | {"samplers": ["sir-20"]}, "normal": {"method": "normal", "samplers": ["ancestral"]}},
        "sample": common["sample"] | {"temperature": 0.7, "readjust": 1},
    }
    networks = {"latents": 3, "widths": [4, 6], "kernel": 4}
    rae = common | {
        "model": networks | {"name": "rae", "code_penalty": 0.1, "regulariser": "spectral-norm"},
        "priors": {"normal": FITTED | {"components": 1}, "ncp": NCP | {"base": "normal", "samplers": ["sir-20"]}},
        "evaluate": {"batch": 20, "features": "own", "reference": "test", "reference_images": 40},
    }
    vae = common | {
        "model": networks | {"name": "conv-vae", "std": 0.3},
        "priors": {"normal": {"method": "normal", "samplers": ["ancestral"]}, "ncp": NCP | {"samplers": ["sir-20"]}},
    }
    half = in_half_precision(nvae)
    return {"run": [], "experiments": {"flat": flat, "deep": deep, "nvae": half, "rae": rae, "vae": vae}}


@pytest.fixture
def device(checkout, monkeypatch):
    """The pipeline's device is the pretend one, whose generators are the CPU's."""
    monkeypatch.setattr(OwnClassifier, "steps", 3)
    monkeypatch.setattr(OwnClassifier, "batch_size", 8)
    monkeypatch.setattr(tracking, "record", lambda *_: None)  # which has no tensors, and takes longer than the rest
    monkeypatch.setattr(blueprint, "check", lambda *_: None)  # which is about shapes alone
    monkeypatch.setattr(hardware, "gains_from_bf16", lambda kind: True)
    of_cpu = randomness.generator
    monkeypatch.setattr(randomness, "generator", lambda *names: of_cpu(*names[:4]))
    with accelerator() as found:
        monkeypatch.setattr(hardware, "device", lambda: found)
        yield found


def run(folder, experiment):
    pipeline = Pipeline(folder, Machine(workers=1))
    for stage in STAGES:
        getattr(pipeline, stage)(experiment)
    return pd.read_csv(pipeline.workspace.evaluation(experiment) / "results.csv")


def test_what_is_mixed_is_refused(device):
    on, off = torch.ones(3, device=device), torch.ones(3)
    with pytest.raises(MixedDevicesError, match=r"add.Tensor was given tensors on other and on cpu"):
        on + off
    with pytest.raises(MixedDevicesError):
        off[on.long()]
    assert ((on + 1)[off > 0] * torch.tensor(2)).cpu().tolist() == [4, 4, 4]


def test_every_registered_thing_is_driven():
    experiments = params()["experiments"].values()
    assert {experiment["model"]["name"] for experiment in experiments} == set(MODELS)
    assert {prior["method"] for experiment in experiments for prior in experiment["priors"].values()} == set(PRIORS)
    used = {e["samplers"][s]["method"] for e in experiments for p in e["priors"].values() for s in p["samplers"]}
    assert used == set(SAMPLERS)


@pytest.mark.parametrize("name", params()["experiments"])
def test_every_stage_runs_on_it(device, checkout, name):
    write_params(checkout, params())
    table = run(checkout, name)
    assert table.metric.str.startswith(("loglik", "fid")).any()
    assert set(table.precision.dropna()) == ({"fp32", "bf16"} if name == "nvae" else {"fp32"})


@pytest.mark.parametrize("network", [PytorchFID, EfficientNetLite])
def test_pretrained_networks_find_the_same_features_on_it(device, network, tmp_path, monkeypatch):
    if network is PytorchFID:
        path = tmp_path / "weights.pth"
        torch.save(random_inception(), path)
        monkeypatch.setenv(network.variable, str(path))
        monkeypatch.setattr(network, "checksum", hashlib.sha256(path.read_bytes()).hexdigest())
    images = torch.rand(2, 3, 32, 32, device="cpu")
    found = network()(images)
    monkeypatch.setattr(hardware, "device", lambda: torch.device("cpu"))
    expected = network()(images)
    scale = expected.abs().max()  # random weights make features as small as 1e-7
    torch.testing.assert_close(found / scale, expected / scale)


class StoppedError(Exception):
    pass


def test_trainings_go_on_on_it(device, checkout, monkeypatch):
    name, raw = "vae", params()
    raw["experiments"][name]["train"] |= {"ema": 0.9, "optimizer": "adamax"}
    write_params(checkout, raw)
    pipeline, stopped = Pipeline(checkout, Machine(workers=1)), set()

    def digests():
        paths = sorted((checkout / "artifacts" / name).rglob("*.safetensors"))
        return {path: checkpoints.load(path, "")[1]["digest"] for path in paths}

    def stop(_, trainees):
        if trainees[0].step == 2 and trainees[0].path not in stopped:
            stopped.add(trainees[0].path)
            for trainee in trainees:
                trainee.save_rolling()
            raise StoppedError

    stages = (pipeline.fetch, pipeline.train_vae, pipeline.train_prior)
    for stage in stages:
        stage(name)
    whole = digests()
    for path in whole:
        path.unlink()
    monkeypatch.setattr(training._Saver, "save_if_due", stop)
    for stage in stages[1:]:
        with pytest.raises(StoppedError):
            stage(name)
        stage(name)
    assert digests() == whole
