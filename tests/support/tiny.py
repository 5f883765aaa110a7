"""Experiments small enough for a test, and tasks that another process can import."""

import os
import signal

import yaml


def tiny():
    """Two experiments at a budget of seconds: a flat model with everything, and a hierarchical one with three groups."""
    ncp = {"method": "ncp", "steps": 30, "batch": 16, "network": {"width": 8, "depth": 1}}
    common = {
        "seeds": [0, 1],
        "train": {"steps": 40, "batch": 16, "learning_rate": 0.002, "precision": "fp32", "ema": 0.9},
        "samplers": {
            "ancestral": {"method": "ancestral"},
            "sir-20": {"method": "sir", "proposals": 20},
            "langevin": {"method": "langevin", "steps": 3, "step_size": 0.01, "metropolis": True},
        },
        "sample": {"images": 30, "batch": 20, "decoding": "mean"},
        "evaluate": {
            "likelihood": {"samples": [1, 4], "normaliser": [5, 20], "proposals": [5, 20], "resamples": 2, "pool": 4096},
            "examples": 30,
            "batch": 20,
        },
    }
    priors = {
        "normal": {"method": "normal", "samplers": ["ancestral"]},
        "gmm": {"method": "gmm", "components": 2, "codes": 100, "batch": 50, "samplers": ["ancestral"]},
        "ncp": ncp | {"samplers": ["sir-20", "langevin"]},
        "ncp-gmm": ncp | {"base": "gmm", "samplers": ["sir-20"]},
    }
    flat = {
        "dataset": "gaussians25",
        "model": {"name": "mlp-vae", "latents": 2, "width": 16, "initial_std": 0.1},
        "priors": priors,
    }
    deep = {
        "dataset": "digits",
        "model": {"name": "residual-hvae", "groups_per_scale": [2, 1], "latent_channels": 2, "width": 8, "halvings": 1},
        "priors": {name: priors[name] for name in ("normal", "ncp")},
        "evaluate": common["evaluate"] | {"features": "own"},
    }
    return {"run": ["flat", "deep"], "experiments": {"flat": common | flat, "deep": common | deep}}


def tiny_beyond():
    """The same with energies, amortised samplers and what is put on them."""
    params = tiny()
    flat, deep = (params["experiments"][name]["priors"] for name in ("flat", "deep"))
    evalp = {"method": "evalp", "steps": 20, "batch": 16, "flow": {"transforms": 1, "width": 8, "depth": 1}}
    flat["evalp-gmm"] = evalp | {"base": "gmm", "samplers": ["sir-20"]}
    deep["evalp"] = evalp | {"groups": [0], "samplers": ["sir-20"]}
    deep["amortised"] = {"method": "amortised", "base": "evalp", "samplers": ["ancestral"]}
    deep["ncp-amortised"] = flat["ncp"] | {"base": "amortised", "samplers": ["langevin"]}
    return params


def write_params(folder, params):
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


ALL_ROWS = "rows-00000000-00000030.safetensors"
"""The file of all samples of a draw."""


def kill_self(report):
    os.kill(os.getpid(), signal.SIGKILL)


def double(report, x):
    return 2 * x
