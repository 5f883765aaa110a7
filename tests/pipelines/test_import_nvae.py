"""A checkpoint of NVAE's released training script, as that lays it out, becomes an experiment's VAE; others are refused."""

import argparse
import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import made_images
import pytest
import torch
from safetensors.torch import load_file, safe_open
from tiny import tiny, write_params

from datasets.registry import DATASETS, Preparer
from models import nvae_released
from models.nvae import NVAE
from pipelines import cli, tracking
from pipelines.config import read
from pipelines.recipe import Recipe
from pipelines.stages import Pipeline
from pipelines.stored import Stored
from runtime.errors import UserError

PARITY = Path(__file__).resolve().parents[1] / "models" / "parity"
MODEL = {
    "name": "nvae",
    "groups_per_scale": [3],
    "latent_channels": 2,
    "width": 4,
    "halvings": 1,
    "likelihood": "pixel-normal",
}


def write_checkpoint(path, **changes):
    """The official fixture as the training script saves it: a fused optimiser's shared storages, other states, flags."""
    with safe_open(PARITY / "official-cifar-normal.safetensors", "pt") as file:
        flags = json.loads(file.metadata()["config"])
    state = load_file(PARITY / "official-cifar-normal.safetensors")
    by_shape = {}
    for name, tensor in state.items():
        by_shape.setdefault((tensor.shape, tensor.dtype), []).append(name)
    for names in by_shape.values():
        stacked = torch.stack([state[name] for name in names])
        state |= dict(zip(names, stacked, strict=True))
    change = changes.pop("state", lambda state: state)
    old = ("ada_groups", "min_groups_per_scale")  # which flags of old files lack
    given = {name: value for name, value in (flags | changes).items() if name not in old}
    content = {
        "epoch": 400,
        "state_dict": change(state),
        "optimizer": {"state": {0: {"step": 7, "exp_avg": torch.zeros(3), "exp_inf": torch.ones(3)}}, "param_groups": []},
        "global_step": 312_000,
        "args": argparse.Namespace(**given, save="/tmp/eval", distributed=True, global_rank=0, num_total_iter=312_000),
        "arch_instance": {"normal_enc": ["res_bnswish", "res_bnswish"]},
        "scheduler": {"T_max": 395, "last_epoch": 395},
        "grad_scalar": {"scale": 1024.0},
    }
    torch.save(content, path)


@pytest.fixture
def experiment(checkout, tmp_path_factory, monkeypatch):
    """A fetched data set of colour images, and an experiment whose model is the fixture's."""
    mirror = tmp_path_factory.mktemp("mirror")
    made_images.cifar10_jpeg(mirror, (4, 1))
    entry = replace(DATASETS["cifar10-jpeg"], prepare=Preparer("datasets.folders", {"validation": 8}))
    monkeypatch.setitem(DATASETS, "cifar10-jpeg", entry)
    monkeypatch.setenv("PRIORHOLE_MIRROR", str(mirror))
    monkeypatch.setattr(tracking, "record", lambda *run: None)
    deep = tiny()["experiments"]["deep"]
    ncp = deep["priors"]["ncp"] | {"steps": 2, "samplers": ["sir-20"], "held_out": 8}
    samplers = {name: deep["samplers"][name] for name in ("ancestral", "sir-20")}
    changed = {
        "dataset": "cifar10-jpeg",
        "seeds": [3],
        "model": MODEL,
        "priors": {"normal": deep["priors"]["normal"], "ncp": ncp},
        "samplers": samplers,
        "sample": deep["sample"] | {"images": 4, "batch": 4},
        "evaluate": {
            "likelihood": {"samples": [2], "normaliser": [2], "proposals": [2], "pool": 50},
            "examples": 2,
            "batch": 2,
        },
    }
    write_params(checkout, {"run": [], "experiments": {"images": deep | changed}})
    Pipeline(checkout).fetch("images")
    return checkout


def test_an_imported_vae_is_the_files_and_the_stages_after_it_run(experiment, monkeypatch, capsys):
    write_checkpoint(experiment / "checkpoint.pt")
    code, out, _ = call(monkeypatch, capsys, "checkpoint.pt")
    path = experiment / "artifacts" / "images" / "vae" / "seed-3.safetensors"
    assert code == 0
    assert out.strip() == str(path)
    pipeline = Pipeline(experiment)
    stored = Stored(Recipe(read(experiment / "params.yaml"), "images", 3, experiment))
    known = stored.vae_document["imported"]
    assert known["sha256"] == hashlib.sha256((experiment / "checkpoint.pt").read_bytes()).hexdigest()
    assert (known["flags"]["num_channels_enc"], known["global_step"]) == (4, 312_000)
    there = load_file(PARITY / "official-cifar-normal.safetensors")
    for name, own in nvae_released.names(stored.vae).items():
        assert torch.equal(stored.vae.state_dict()[own].flatten(), there[name].flatten()), name
    written = os.stat(path).st_mtime_ns
    pipeline.train_vae("images")  # has nothing to do
    assert os.stat(path).st_mtime_ns == written
    assert {stage.stage: stage.tasks for stage in pipeline.plan("images").stages}["train-vae"] == 0
    pipeline.train_prior("images")
    pipeline.sample("images")
    write_checkpoint(experiment / "other.pt", batch_size=7)
    code, _, err = call(monkeypatch, capsys, "other.pt")
    assert code == 2
    assert "is there already and not from other.pt; move it away" in err
    assert "Traceback" not in err


def call(monkeypatch, capsys, checkpoint):
    """Run the command in this process: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["priorhole", "import-nvae", "images", "--checkpoint", checkpoint])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def weights(path):
    """Of a checkpoint, for the experiment's model."""
    released, options = nvae_released.read(path), NVAE.Options(**{key: MODEL[key] for key in MODEL if key != "name"})
    nvae_released.require_flags(released, options, (3, 32, 32), 8)
    with torch.device("meta"):
        return nvae_released.translate(released, NVAE(options, (3, 32, 32)))


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


REFUSED = {
    "width": ({"num_channels_enc": 8}, "num_channels_enc is 8 there, and the experiment's width is 4"),
    "groups": (
        {"num_groups_per_scale": 2},
        r"num_groups_per_scale is [2] there, and the experiment's groups_per_scale is [3]",
    ),
    "flows": ({"num_nf": 1}, "num_nf is 1 there, and the experiment's flows is 0"),
    "gates": ({"use_se": False}, "use_se is False there, and the experiment's squeeze_excitation is True"),
    "decoder": (
        {"num_mixture_dec": 10},
        "num_mixture_dec is logistic-mixture there, and the experiment's likelihood is pixel-",
    ),
    "bits": ({"num_x_bits": 5}, "num_x_bits is 5 there, and the experiment's images.bits is 8"),
    "side": (
        {"dataset": "celeba_64"},
        "dataset is (3, 64, 64) there, and the experiment's its images' shape is (3, 32, 32)",
    ),
    "unknown data": ({"dataset": "stacked_mnist"}, "its data set is stacked_mnist, of which no image size is known"),
    "missing": ({"state": without("enc_sampler.1.bias")}, "lacks enc_sampler.1.bias, which the experiment's model has"),
    "left over": (
        {"state": lambda state: state | {"more": torch.zeros(1)}},
        "has more, which the experiment's model has not",
    ),
    "shape": (
        {"state": lambda state: state | {"stem.weight": torch.zeros(4, 3, 5, 5)}},
        "stem.weight has shape (4, 3, 5, 5) there and (4, 3, 3, 3) here",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_network_is_refused_with_the_key_and_both_values(kind, tmp_path):
    changes, message = REFUSED[kind]
    write_checkpoint(tmp_path / "checkpoint.pt", **changes)
    with pytest.raises(UserError) as error:
        weights(tmp_path / "checkpoint.pt")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


class Harmful:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing; name the checkpoint.pt"),
        ({"state_dict": {}, "args": Harmful()}, "cannot be read as a checkpoint of tensors and flags"),
        ({"weights": {}}, "has no state_dict and args"),
        ({"state_dict": {}, "args": argparse.Namespace(dataset="cifar10")}, "args lack num_channels_dec"),
    ],
)
def test_a_file_of_another_kind_is_refused_and_nothing_in_it_is_run(content, message, tmp_path):
    if content is not None:
        torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=message):
        nvae_released.read(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.97])
@pytest.mark.parametrize("archived", [True, False], ids=["as today", "as by early torch"])
def test_a_file_that_is_cut_short_is_refused_in_one_line(tmp_path, share, archived):
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path)
    if not archived:
        with torch.serialization.safe_globals([argparse.Namespace]):
            torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"cannot be read .*; if it was downloaded, compare its size") as error:
        nvae_released.read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["3", None, 2.0, True])
def test_a_flag_that_is_no_number_is_named(tmp_path, value):
    arguments = dict.fromkeys(nvae_released.REQUIRED, 1) | {"dataset": "cifar10", "num_latent_scales": value}
    torch.save({"state_dict": {}, "args": argparse.Namespace(**arguments)}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"num_latent_scales in args is .*, not a whole number"):
        nvae_released.read(tmp_path / "checkpoint.pt")


def test_early_files_lack_second_names_and_both_are_read(tmp_path):
    def early(state):
        return {name: value for name, value in state.items() if not name.endswith("weight_normalized")}

    found = []
    for change in (early, dict):
        write_checkpoint(tmp_path / "checkpoint.pt", state=change)
        found.append(weights(tmp_path / "checkpoint.pt"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
