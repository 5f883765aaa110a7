"""params.yaml says what it looks like, and what cannot come to an end is refused before anything begins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import tiny, tiny_beyond, write_params

from pipelines import cli, strict_yaml
from pipelines.config import ANY, LARGEST, NAME, Experiment, read, validate
from pipelines.stages import Pipeline
from priors.ncp import NoiseContrastivePrior
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["fetch", "train-vae", "train-prior", "sample", "evaluate", "publish"]
COMMANDS = [["list"], *[[stage, "flat"] for stage in STAGES], ["report"], ["compare"]]


def refused(monkeypatch, capsys, *arguments):
    """The one line of a refusal."""
    monkeypatch.setattr(sys, "argv", ["priorhole", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2
    (line,) = err.splitlines()
    return line


def set_at(params, path, value):
    """Set, or for None drop, what is at a path in ``params``; a name in it may hold dots, so it is a tuple."""
    *parents, last = path
    for name in parents:
        params = params[name]
    if value is None:
        del params[last]
    else:
        params[last] = value


def said_of(params):
    """What is said of parameters that are not valid."""
    with pytest.raises(UserError) as error:
        validate(params)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# Names

BAD = [
    "ncp.1",
    "a/b",
    "../../esc",
    ".hidden",
    "x+y",
    "-rf",
    "--dry-run",
    "_x",
    "a b",
    "a\nb",
    "$(ls)",
    "a;b",
    "${item}",
    "é",
    "",
]
BAD += ["n" * 61, "n" * 260, "a@b", "a:b", "*", "a,b", "a\\b", "a'b", "ncp\n"]


def rename(tree, old, new):
    """The same mapping, in the same order, with another key."""
    items = [(new if key == old else key, value) for key, value in tree.items()]
    tree.clear()
    tree.update(items)


def renamed(kind, name):
    params = tiny()
    flat = params["experiments"]["flat"]
    if kind == "experiment":
        rename(params["experiments"], "flat", name)
        params["run"] = [name, "deep"]
    elif kind == "prior":
        rename(flat["priors"], "gmm", name)
        flat["priors"]["ncp-gmm"]["base"] = name
    else:
        rename(flat["samplers"], "sir-20", name)
        for prior in ("ncp", "ncp-gmm"):
            flat["priors"][prior]["samplers"] = [name]
        params["experiments"]["deep"]["priors"]["ncp"]["samplers"] = ["langevin"]
        params["experiments"]["deep"]["samplers"] = tiny()["experiments"]["deep"]["samplers"]
    return params


@pytest.mark.parametrize("kind", ["experiment", "prior", "sampler"])
@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_what_cannot_be_a_name_is_refused_when_it_is_read(kind, name):
    said = said_of(renamed(kind, name))
    assert "letters, digits, - and _" in said
    assert len(said) < 400


@pytest.mark.parametrize("kind", ["experiment", "prior", "sampler"])
@pytest.mark.parametrize("name", ["a", "7", "A-b_c", "n" * 60, "evalp-1e-8", "x_", "123"])
def test_what_can_be_a_name_is_accepted(kind, name):
    validate(renamed(kind, name))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_refuses_a_name_before_it_works(checkout, monkeypatch, capsys, command):
    write_params(checkout, renamed("prior", "ncp.1"))
    before = sorted(checkout.rglob("*"))
    assert "priors.ncp.1: a name has" in refused(monkeypatch, capsys, *command)
    assert sorted(checkout.rglob("*")) == before


@pytest.mark.parametrize("command", [command[0] for command in COMMANDS if command[1:]])
@pytest.mark.parametrize("name", ["../../esc", "a/b", "x" * 300, "flat\n", ""], ids=ascii)
def test_every_command_refuses_an_argument_that_is_no_experiment(checkout, monkeypatch, capsys, command, name):
    before = sorted(checkout.parent.rglob("*"))
    assert "does not exist; there are flat, deep" in refused(monkeypatch, capsys, command, name)
    assert sorted(checkout.parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["data", "Data", "aggregate-posterior", "Aggregate-Posterior"])
def test_a_prior_is_not_called_what_rows_of_no_prior_are(name):
    assert f"{name!r} is what rows that belong to no prior are called" in said_of(renamed("prior", name))


@pytest.mark.parametrize("kind", ["experiments", "priors", "samplers"])
def test_names_that_some_file_systems_do_not_tell_apart_are_refused(kind):
    params = tiny()
    flat = params["experiments"]["flat"]
    names = {"experiments": params["experiments"], "priors": flat["priors"], "samplers": flat["samplers"]}[kind]
    first = "flat" if kind == "experiments" else "ncp" if kind == "priors" else "langevin"
    names[first.upper()] = names[first]
    assert f"{first!r} and {first.upper()!r} differ in capitals alone" in said_of(params)


def test_the_longest_names_fit_into_every_file_name(checkout):
    from runtime.files import exclusive

    workspace, name = Pipeline(checkout).workspace, "n" * 60
    path = workspace.samples(name, name, name, 2**32 - 1)
    path.mkdir(parents=True)
    (path / f".rows-00000000-00002000.safetensors.{2**22}.tmp").touch()
    with exclusive(workspace.locks, f"{name}/samples/{name}+{name}/seed-{2**32 - 1}"):
        pass


def test_every_name_that_is_committed_is_one():
    config = validate(read(ROOT / "params.yaml"))
    for name, experiment in config.experiments.items():
        assert all(NAME.fullmatch(found) for found in (name, *experiment.priors, *experiment.samplers))


# Lists that are sets

TWICE = {
    "seeds": (("experiments", "flat", "seeds"), [0, 1, 0]),
    "samplers": (("experiments", "flat", "priors", "ncp", "samplers"), ["sir-20", "sir-20"]),
    "groups": (("experiments", "deep", "priors", "evalp", "groups"), [1, 1]),
    "run": (("run",), ["flat", "deep", "flat"]),
}


@pytest.mark.parametrize("key", TWICE)
def test_what_is_listed_twice_is_refused_with_its_key_and_value(key):
    path, values = TWICE[key]
    params = tiny_beyond()
    set_at(params, path, values)
    said = said_of(params)
    assert key in said
    assert f"{values[-1]!r} is listed twice" in said


# YAML

TEXTS = {
    "a key twice": ("run: []\nrun: [flat]\nexperiments: {}\n", "line 2", "'run' was given in line 1 already"),
    "a key twice, deep": ("run: []\nexperiments:\n  a: {seeds: [0],\n      seeds: [1]}\n", "line 4", "'seeds'"),
    "a key twice, in a list": ("run: [{a: 1, a: 2}]\n", "line 1", "'a' was given"),
    "a key twice, merged": ("run: []\n<<: {a: 1, a: 2}\n", "line 2", "'a' was given"),
    "a key twice, otherwise written": ("1: a\n0x1: b\n", "line 2", "was given in line 1 already"),
    "two merges": ("<<: {a: 1}\n<<: {b: 1}\n", "line 2", "'<<'"),
    "a date that is none": ("run: 2024-13-45\nexperiments: {}\n", "run", "'2024-13-45'"),
    "binary digits missing": ("run: 0b_\nexperiments: {}\n", "run", "'0b_'"),
    "a date by its tag": ("run: !!timestamp 2024-13-45\n", "line 1", "timestamp"),
    "a number by its tag": ("run: !!int abc\n", "line 1", "'abc'"),
    "a truth value by its tag": ("run: !!bool abc\n", "line 1", "'abc'"),
    "a Python object": ("run: !!python/object/apply:os.system [ls]\n", "line 1", "python"),
    "digits without end": (f"run: {'9' * 5000}\n", "line 1", "999"),
    "in itself": ("run: &a [*a]\n", "line 1", "recursive"),
    "deep": ("[" * 3000, "nested too deeply", ""),
    "no alias": ("run: *b\n", "line 1", "undefined alias"),
    "no character": ("run: \x01\n", "not valid YAML", "#x0001"),
    "a list for a key": ("? [run]\n: []\n", "line 1", "unhashable"),
    "two documents": ("run: []\n---\nexperiments: {}\n", "line 2", "another document"),
    "nothing": ("", "must be a mapping", ""),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_what_is_no_yaml_is_one_line_with_its_place(checkout, monkeypatch, capsys, kind):
    text, place, what = TEXTS[kind]
    (checkout / "params.yaml").write_text(text)
    line = refused(monkeypatch, capsys, "list")
    assert "params.yaml" in line
    assert place in line
    assert what in line


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-32", "cp1252"])
def test_another_encoding_is_one_line(checkout, monkeypatch, capsys, encoding):
    (checkout / "params.yaml").write_bytes("run: [é, €]".replace("€" if encoding == "latin-1" else "", "").encode(encoding))
    assert "save it as UTF-8" in refused(monkeypatch, capsys, "list")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_refuses_a_file_that_it_cannot_read(checkout, monkeypatch, capsys, command):
    for spoil in (Path.unlink, lambda path: path.write_bytes(b"\xe9"), lambda path: path.write_text("run: [")):
        spoil(checkout / "params.yaml")
        assert "params.yaml" in refused(monkeypatch, capsys, *command)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1e-05", 1e-5),
        ("1E3", 1e3),
        ("5.e-1", 0.5),
        (".5", 0.5),
        ("+2.0", 2.0),
        ("3", 3.0),
        ("1.0e-8", 1e-8),
    ],
)
@pytest.mark.parametrize(
    "path",
    [
        ("train", "learning_rate"),
        ("train", "clip"),
        ("model", "initial_std"),
        ("priors", "ncp", "learning_rate"),
        ("samplers", "langevin", "step_size"),
        ("sample", "temperature"),
    ],
    ids="/".join,
)
def test_a_number_is_one_however_it_is_written(checkout, path, text, value):
    params = tiny()
    params["experiments"]["flat"]["priors"] = {
        name: tiny()["experiments"]["flat"]["priors"][name] for name in ("normal", "ncp")
    }
    params["experiments"]["flat"].setdefault(path[0], {})
    set_at(params["experiments"]["flat"], path, "HERE")
    (checkout / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False).replace("HERE", text))
    found = Pipeline(checkout).config.experiments["flat"].model_dump()
    for key in path:
        found = found[key]
    assert found == value


@pytest.mark.parametrize(
    ("text", "value"), [("010", 10), ("1:30", "1:30"), ("no", "no"), ("0o17", 15), ("1_000", 1000), ("~", None)]
)
def test_the_values_are_those_that_dvc_reads(tmp_path, text, value):
    from dvc.utils.serialize import load_yaml

    (tmp_path / "a.yaml").write_text(f"a: {text}\n")
    assert strict_yaml.read(tmp_path / "a.yaml") == load_yaml(tmp_path / "a.yaml") == {"a": value}


def test_the_committed_values_are_those_that_dvc_reads():
    from dvc.utils.serialize import load_yaml

    assert strict_yaml.read(ROOT / "params.yaml") == load_yaml(ROOT / "params.yaml")


# What DVC changes

OVERRIDES = [
    ("experiments.gaussians25.train.steps", 10),
    ("experiments.gaussians25.priors.normal.samplers", ["ancestral", "langevin"]),
    ("experiments.gaussians25.evaluate.likelihood.proposals", [5]),
    ("experiments.gaussians25-20d.priors.ncp.steps", 11),
    ("experiments.digits-nvae.priors.ncp.network.depth", 2),
    ("experiments.mnist-nvae-lite-2000.train.steps", 7),
    ("run", ["gaussians25", "digits-nvae"]),
]


def flat(tree, prefix=""):
    if isinstance(tree, dict):
        return {key: value for name, inner in tree.items() for key, value in flat(inner, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): tree}


@pytest.mark.parametrize(("key", "value"), OVERRIDES, ids=[key for key, _ in OVERRIDES])
def test_dvc_changes_the_value_that_is_meant_and_no_other(tmp_path, key, value):
    from dvc.utils.hydra import apply_overrides

    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    before = flat(read(path))
    apply_overrides(path, [f"{key}={value}"])
    after = flat(read(path))
    assert before[key] != value
    assert after == before | {key: value}
    validate(read(path)) if key.endswith("steps") else None


def test_no_mapping_of_the_committed_file_stands_in_two_places():
    assert strict_yaml.shared_mappings(ROOT / "params.yaml") == []


SHARED = "run: []\nexperiments:\n  a: &a\n    train: &t {steps: 1}\n  b: {<<: *a}\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (SHARED, 1),
        ("a: &a {x: 1}\nb: *a\n", 1),
        ("a: &a {x: 1}\nb: {<<: *a, y: 2}\n", 0),
        ("a: &a [1, 2]\nb: *a\n", 0),
        ("a: &a {x: {y: 1}}\nb: {<<: *a, x: {y: 2}}\n", 0),
        ("a: &a {x: &x {y: 1}}\nb: {<<: [{z: 1}, *a]}\n", 1),
        ("a: &a {x: &x {y: 1}}\nb: {<<: *a, x: {<<: *x}}\n", 0),
    ],
)
def test_mappings_in_two_places_are_found(tmp_path, text, found):
    (tmp_path / "a.yaml").write_text(text)
    assert len(strict_yaml.shared_mappings(tmp_path / "a.yaml")) == found


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_an_experiment_of_dvc_that_can_lose_its_change_is_refused(checkout, monkeypatch, capsys, command):
    (checkout / "params.yaml").write_text(SHARED)
    monkeypatch.setenv("DVC_EXP_NAME", "puffy-name")
    line = refused(monkeypatch, capsys, *command)
    assert "experiments.b.train and experiments.a.train are one and the same (line 4)" in line


# Values that would die later

FLAT, DEEP = ("experiments", "flat"), ("experiments", "deep")
FATAL = {
    "no standard error of one example": ((*FLAT, "evaluate", "examples"), 1, "greater than or equal to 2"),
    "no FID of three images": ((*DEEP, "sample", "images"), 3, "FID needs 4 images"),
    "no metric of one image": ((*FLAT, "sample", "images"), 1, "greater than or equal to 2"),
    "seeds of scikit-learn": ((*FLAT, "seeds"), [0, 2**32], "less than 4294967296"),
    "seeds of a table": ((*FLAT, "seeds"), [2**63], "less than 4294967296"),
    "seed of the VAE": ((*FLAT, "vae_seed"), 2**32, "less than 4294967296"),
    "no base of the base": ((*FLAT, "priors", "normal", "base"), "gmm", "no base"),
    "more groups than names": ((*DEEP, "model", "groups_per_scale"), [60, 41], "the sum of"),
    "more halvings than pixels": ((*DEEP, "model", "halvings"), 10**9, "at most 10"),
    "more checks than memory": ((*FLAT, "priors", "ncp", "checks"), 10**9, "at most 100000"),
    "an infinite rate": ((*FLAT, "train", "learning_rate"), float("inf"), "finite"),
    "a rate that is no number": ((*FLAT, "priors", "ncp", "learning_rate"), float("nan"), "finite"),
    "trained in itself": ((*FLAT, "trained_in"), "flat", "the experiment itself"),
}


def test_an_experiment_is_trained_in_one_that_trains_its_own():
    """Further ones would not be looked at, and of a circle none trains anything."""
    params = tiny()
    params["experiments"] |= {name: params["experiments"]["flat"] | {"trained_in": "deep"} for name in ("other", "another")}
    validate(params)
    params["experiments"]["another"]["trained_in"] = "other"
    assert "experiments.another.trained_in: other is itself trained in deep; name that one" in said_of(params)
    params["experiments"]["other"]["trained_in"] = "another"
    assert "is itself trained in" in said_of(params)


def test_what_a_prior_or_a_sampler_would_pay_no_heed_to_is_refused():
    params = tiny_beyond()
    deep = params["experiments"]["deep"]
    deep["sample"] = deep["sample"] | {"temperature": 0.7}
    del deep["priors"]["evalp"]["groups"]
    assert "sample.temperature: 'amortised' brings a density of its own" in said_of(params)
    del deep["sample"]["temperature"]
    deep["sample"]["readjust"] = 1
    validate(params)
    deep["samplers"] = deep["samplers"] | {"joint": {"method": "joint-langevin", "steps": 1, "step_size": 0.01}}
    deep["priors"]["ncp"] = deep["priors"]["ncp"] | {"samplers": ["joint"]}
    assert "sample.readjust: 'joint' goes down the model at every step" in said_of(params)
    deep["sample"]["readjust"] = 0
    validate(params)


UNBUILDABLE = {
    "a group that the model has not": ((*DEEP, "priors", "evalp", "groups"), [0, 3], "priors.evalp.groups: 3 is too many"),
    "a mixture of more latents than codes": (
        (*FLAT, "model", "latents"),
        50,
        "priors.gmm: 2 full covariances of 50 latents",
    ),
    "a VAE without an end": ((*FLAT, "model", "width"), 2**16, "parameters"),
    "a network without an end": ((*FLAT, "priors", "ncp", "network"), {"width": 2**16, "depth": 4}, "parameters"),
}
ONE_PIXEL = {"name": "nvae", "groups_per_scale": [2], "latent_channels": 1, "width": 4, "halvings": 3, "outer_cells": 1}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("kind", FATAL)
def test_a_value_that_would_die_later_is_refused_when_it_is_read(checkout, monkeypatch, capsys, kind, command):
    path, value, what = FATAL[kind]
    params = tiny_beyond()
    set_at(params, path, value)
    write_params(checkout, params)
    line = refused(monkeypatch, capsys, *command)
    assert path[-1] in line
    assert what in line
    assert not (checkout / "artifacts").exists()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", UNBUILDABLE)
def test_what_cannot_be_built_is_refused_before_any_work(checkout, monkeypatch, capsys, kind, stage):
    path, value, what = UNBUILDABLE[kind]
    params = tiny_beyond()
    set_at(params, path, value)
    params["experiments"]["flat"]["model"]["depth"] = 4
    write_params(checkout, params)
    assert what in refused(monkeypatch, capsys, stage, path[1])
    assert not (checkout / "data").exists()
    assert not (checkout / "artifacts").exists()


@pytest.mark.parametrize(("wrong", "shape"), [(lambda r: r[..., None], "(2, 3, 1)"), (lambda r: r.mean(0), "(3,)")])
@pytest.mark.parametrize("method", ["log_ratio", "prepared_log_ratio"])
def test_a_prior_whose_ratio_has_another_shape_is_refused_before_it_is_trained(
    checkout, monkeypatch, capsys, method, wrong, shape
):
    """A forgotten ``squeeze``, say: its loss may well be a number, and the first sampler would break on it."""
    right = getattr(NoiseContrastivePrior, method)
    monkeypatch.setattr(NoiseContrastivePrior, method, lambda *given: wrong(right(*given)))
    if method == "prepared_log_ratio":  # which log_ratio goes by
        monkeypatch.setattr(
            NoiseContrastivePrior, "log_ratio", lambda self, z, context: right(self, z, self.prepare(context))
        )
    line = refused(monkeypatch, capsys, "train-prior", "flat")
    named = f"experiments.flat.priors.ncp: {method} of NoiseContrastivePrior, given z of the shape (2, 3, 2), "
    assert f"{named}returns {shape}: it has to" in line
    assert not (checkout / "artifacts").exists()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "change", [{"train": {"batch": 1}}, {"sample": {"batch": 1, "readjust": 1}}], ids=["train", "sample"]
)
def test_statistics_of_a_single_number_are_refused_before_any_work(checkout, monkeypatch, capsys, stage, change):
    params = tiny()
    deep = params["experiments"]["deep"]
    deep["model"] = ONE_PIXEL
    for key, values in change.items():
        deep[key] = deep[key] | values
    write_params(checkout, params)
    line = refused(monkeypatch, capsys, stage, "deep")
    assert f"experiments.deep.{next(iter(change))}.batch" in line
    assert "more than 1 value per channel" in line


@pytest.mark.parametrize("path", [("train",), ("priors", "ncp"), ("priors", "gmm")], ids=".".join)
def test_a_batch_that_the_training_examples_do_not_fill_is_refused_before_the_vae_is_trained(checkout, path):
    params = tiny()
    deep = params["experiments"]["deep"]
    deep["priors"]["gmm"] = tiny()["experiments"]["flat"]["priors"]["gmm"]
    set_at(deep, (*path, "batch"), 1198)
    write_params(checkout, params)
    pipeline = Pipeline(checkout)
    pipeline.fetch("deep")
    with pytest.raises(UserError, match=rf"experiments.deep.{'.'.join(path)}.batch: a batch of 1198 does not fit the 1197"):
        pipeline.train_vae("deep")
    assert not (checkout / "artifacts" / "deep").exists()


def whole_numbers(options, path=""):
    """The dotted keys of every whole number among an experiment's options, and its values."""
    for key, value in flat(options).items():
        if isinstance(value, int) and not isinstance(value, bool) and "seed" not in key:
            yield key


@pytest.mark.parametrize("name", ["flat", "deep"])
def test_every_whole_number_has_a_largest(name):
    params = tiny_beyond()
    keys = list(whole_numbers(params["experiments"][name]))
    assert len(keys) > 20
    for key in keys:
        changed = tiny_beyond()
        set_at(changed, ("experiments", name, *key.split(".")), max(ANY, LARGEST.get(key.split(".")[-1], ANY)) + 1)
        assert key.split(".")[-1] in said_of(changed)


def test_a_limit_goes_by_the_option_and_not_by_what_a_prior_is_called():
    for name in LARGEST:
        params = renamed("prior", name.replace("_", "-") if name == "steps" else name)
        params["experiments"]["flat"]["priors"]["ncp"]["patience"] = 10**8
        validate(params)


@pytest.mark.parametrize("kind", ["text", "number", "list", "nothing", "long"])
def test_what_is_wrong_is_shown_with_its_key(kind):
    value = {"text": "many", "number": -3, "list": [1, 2], "nothing": True, "long": "x" * 5000}[kind]
    params = tiny()
    params["experiments"]["flat"]["train"]["steps"] = value
    said = said_of(params)
    assert said.startswith("params.yaml: experiments.flat.train.steps: ")
    assert repr(value)[:70] in said
    assert len(said) < 300


def test_the_path_of_an_unknown_key_is_its_own_where_a_method_and_a_key_are_called_alike():
    params = tiny_beyond()
    params["experiments"]["flat"]["priors"]["flow"] = {"method": "flow", "steps": 1, "batch": 2, "flow": {}, "samplers": []}
    params["experiments"]["flat"]["priors"]["flow"]["stepz"] = 3
    assert "experiments.flat.priors.flow.stepz: " in said_of(params)


def test_a_chain_of_bases_may_be_long():
    params = tiny()
    priors = params["experiments"]["flat"]["priors"]
    before = "normal"
    for index in range(1500):
        priors[f"n{index}"] = {"method": "normal", "base": before, "samplers": []}
        before = f"n{index}"
    experiment = validate(params).experiments["flat"]
    assert isinstance(experiment, Experiment)
    assert len(experiment.chain(before)) == 1501


# Whose code runs


def test_a_checkout_is_not_worked_in_by_the_code_of_another(checkout, monkeypatch, capsys):
    (checkout / "pipelines").mkdir()
    (checkout / "pipelines" / "stages.py").touch()
    for command in COMMANDS:
        line = refused(monkeypatch, capsys, *command)
        assert f"{checkout} holds code of its own, and that of {ROOT} is running" in line
        assert "make .venv/installed" in line
    assert Pipeline(ROOT).config


def test_the_revision_is_of_this_checkout_alone(tmp_path):
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "inner"
    (inner / "runtime").mkdir(parents=True)
    for name in ("__init__", "errors", "identity"):
        (inner / "runtime" / f"{name}.py").write_text((ROOT / "runtime" / f"{name}.py").read_text())
    script = [sys.executable, "-c", "from runtime.identity import revision; print(revision())"]
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]

    def revision(**variables):
        environment = os.environ | {"PYTHONPATH": str(inner)} | variables
        return subprocess.run(script, cwd=inner, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    def committed(folder):
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
            subprocess.run([*git, *command], cwd=folder, check=True)
        head = ["git", "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(head, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    assert revision() == "unversioned"
    committed(outer)
    assert revision() == "unversioned"
    assert revision(GIT_DIR=str(outer / ".git"), GIT_WORK_TREE=str(inner)) == "unversioned"
    own = committed(inner)
    assert revision() == own
    assert revision(GIT_DIR=str(outer / ".git")) == own
    (inner / "runtime" / "errors.py").write_text((ROOT / "runtime" / "errors.py").read_text() + "\n")
    assert revision() == f"{own}-dirty"
