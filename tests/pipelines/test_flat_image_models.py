"""A deterministic autoencoder and a convolutional VAE go through every stage; what the former cannot have is refused."""

import pandas as pd
import pytest
from tiny import tiny, write_params

from pipelines import config
from pipelines.stages import Pipeline
from runtime.errors import UserError

NETWORKS = {"latents": 3, "widths": [4, 6], "kernel": 4}
GAUSSIAN = {"method": "gmm", "codes": 100, "batch": 50, "samplers": ["ancestral"]}


def params():
    deep = tiny()["experiments"]["deep"]
    ncp = deep["priors"]["ncp"]
    flow = {"method": "flow", "steps": 20, "batch": 16, "flow": {"transforms": 1, "width": 8, "depth": 1}}
    fitted = {
        "normal": GAUSSIAN | {"components": 1},
        "gmm": GAUSSIAN | {"components": 2},
        "flow": flow | {"samplers": ["ancestral"]},
        # Langevin dynamics needs a smooth density, which a mixture's is not counted as.
        "ncp": ncp | {"base": "normal", "samplers": ["sir-20"]},
        "ncp-flow": ncp | {"base": "flow", "samplers": ["sir-20"]},
    }
    auto = deep | {
        "model": NETWORKS | {"name": "rae", "code_penalty": 0.1, "regulariser": "spectral-norm"},
        "priors": fitted,
        "evaluate": {"batch": 20, "features": "own", "reference": "test", "reference_images": 200},
    }
    vae = deep | {"model": NETWORKS | {"name": "conv-vae", "std": 0.3}, "seeds": [0]}
    return {"run": [], "experiments": {"auto": auto, "vae": vae}}


def test_both_go_through_every_stage(checkout):
    write_params(checkout, params())
    pipeline = Pipeline(checkout)
    for name in ("auto", "vae"):
        for stage in ("fetch", "train_vae", "train_prior", "sample", "evaluate"):
            getattr(pipeline, stage)(name)
    pipeline.report()
    table = pd.read_csv(checkout / "reports" / "results.csv", keep_default_na=False)
    auto, vae = (table[table.experiment == name] for name in ("auto", "vae"))
    assert not auto.metric.str.startswith(("loglik", "kl/", "elbo")).any()
    assert vae.metric.str.startswith("loglik").any()
    measured = auto[auto.metric == "fid-digits-30"]
    assert set(measured.prior) == {"normal", "gmm", "flow", "ncp", "ncp-flow", "aggregate-posterior"}
    assert measured.features.str.endswith("; against 200 test images").all()
    assert auto[(auto.prior == "data") & (auto.metric == "fid-digits-200")].seed.tolist() == [0, 1]  # of validation images
    assert not vae.features.str.contains("against").any()
    assert set(auto.model) == {"rae/normal"}
    assert {"mmd2/k00", "ess-fraction/k00", "kid-digits-30"} <= set(auto.metric)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"priors.normal": {"method": "normal", "samplers": []}},
            "method gmm and components 1: rae has no prior of its own",
        ),
        ({"priors.normal.components": 2}, "method gmm and components 1"),
        ({"priors.ncp.base": None}, "priors.ncp: rae has no prior to put it on; name a gmm or a flow as its base"),
        ({"priors.other": {"method": "normal", "samplers": []}}, "priors.other: rae has no prior to put it on"),
        (
            {"evaluate.likelihood": {"samples": [1], "normaliser": [5], "proposals": [5]}},
            "rae is deterministic and has none",
        ),
    ],
)
def test_what_a_deterministic_autoencoder_cannot_have_is_one_line(change, message):
    raw = params()
    for key, value in change.items():
        at = raw["experiments"]["auto"]
        *path, last = key.split(".")
        for name in path:
            at = at[name]
        at[last] = value
    with pytest.raises(UserError, match=message) as error:
        config.validate(raw)
    assert "\n" not in str(error.value)


def test_a_model_with_a_likelihood_says_how_it_is_measured():
    raw = params()
    raw["experiments"]["vae"]["evaluate"] = {"batch": 20}
    with pytest.raises(UserError, match=r"evaluate\.likelihood is missing: conv-vae has one"):
        config.validate(raw)
