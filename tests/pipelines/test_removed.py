"""What params.yaml no longer names is moved aside, wherever it lies, and can be taken back."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from tiny import tiny, write_params

from pipelines import identities
from pipelines.fanout import Machine
from pipelines.stages import Pipeline
from runtime.errors import UserError
from runtime.files import exclusive

ROOT = Path(__file__).resolve().parents[2]


class Stopped(Exception):
    pass


@pytest.fixture
def stage(checkout, monkeypatch):
    """Runs a stage of ``flat`` up to the point where it would start to work."""

    def stop(*_):
        raise Stopped

    monkeypatch.setattr(Pipeline, "_run", stop)

    def run(name):
        with pytest.raises((Stopped, UserError)) as stopped:
            getattr(Pipeline(checkout), name)("flat")
        assert stopped.type is Stopped or "missing" in str(stopped.value)  # stage 2 looks for the VAE first

    return run


def write(checkout, files, content="first"):
    for name in files:
        path = checkout / "artifacts" / "flat" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}: {name}")


def contents(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def one_seed(flat):
    flat["seeds"] = [0]


def shared_vae(flat):
    flat["vae_seed"] = 5


def no_ncp(flat):
    del flat["priors"]["ncp"]


def no_langevin(flat):
    flat["priors"]["ncp"]["samplers"] = ["sir-20"]


def others(flat):
    flat["priors"] = {"normal": flat["priors"]["normal"], "ncp-05": flat["priors"]["ncp"]}


VAES = [f"vae/seed-{seed}{kind}.safetensors" for seed in (0, 1, 10) for kind in ("", ".partial")]
PRIORS = [
    f"priors/{prior}/seed-{seed}/{file}.safetensors"
    for prior in ("normal", "gmm", "ncp", "ncp-gmm", "ncp-05")
    for seed in (0, 1)
    for file in ("k00", "k01.partial")
]
SAMPLES = [
    f"samples/{draw}/seed-{seed}{kind}.safetensors"
    for draw in ("normal+ancestral", "gmm+ancestral", "ncp+sir-20", "ncp+langevin", "ncp-gmm+sir-20")
    for seed in (0, 1)
    for kind in ("", ".partial")
]

CASES = [
    # stage, its files, what changes in params.yaml, which of the files stay
    ("train_vae", VAES, None, r"vae/seed-[01]\..*"),
    ("train_vae", VAES, one_seed, r"vae/seed-0\..*"),
    ("train_vae", VAES, shared_vae, r"nothing"),
    ("train_prior", PRIORS, None, r"priors/(normal|gmm|ncp|ncp-gmm)/.*"),
    ("train_prior", PRIORS, no_ncp, r"priors/(normal|gmm|ncp-gmm)/.*"),
    ("train_prior", PRIORS, one_seed, r"priors/(normal|gmm|ncp|ncp-gmm)/seed-0/.*"),
    ("train_prior", PRIORS, others, r"priors/(normal|ncp-05)/.*"),
    ("sample", SAMPLES, no_ncp, r"samples/(normal|gmm|ncp-gmm)\+.*"),
    ("sample", SAMPLES, no_langevin, r"samples/[^/]*\+(ancestral|sir-20)/.*"),
    ("sample", SAMPLES, one_seed, r"samples/.*/seed-0\..*"),
]


@pytest.mark.parametrize(("name", "files", "change", "stays"), CASES)
def test_it_is_moved_aside_with_one_line_that_tells_how_to_take_it_back(checkout, stage, capsys, name, files, change, stays):
    params = tiny()
    if change is not None:
        change(params["experiments"]["flat"])
        write_params(checkout, params)
    write(checkout, files)
    before = contents(checkout / "artifacts")
    stage(name)
    gone = {file for file in files if not re.fullmatch(stays, file)}
    assert contents(checkout / "artifacts" / "flat") == {file: f"first: {file}" for file in files if file not in gone}
    assert contents(checkout / "artifacts" / ".removed" / "flat") == {file: f"first: {file}" for file in gone}
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"moved to artifacts/.removed/flat/{files[0].split('/')[0]}, which can be deleted" in said
    subprocess.run(said.split("the stage runs: ")[1], shell=True, check=True, cwd=checkout)
    assert contents(checkout / "artifacts") == before


@pytest.mark.parametrize(("name", "files"), [("train_vae", VAES[:4]), ("train_prior", PRIORS[:16]), ("sample", SAMPLES)])
def test_what_is_named_stays_without_a_word(checkout, stage, capsys, name, files):
    write(checkout, files)
    before = contents(checkout / "artifacts")
    stage(name)
    assert contents(checkout / "artifacts") == before
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "file", "moved"),
    [
        ("train_vae", "vae/seed-7.safetensors", "vae/seed-7.safetensors"),
        ("train_prior", "priors/old/seed-0/k00.safetensors", "priors/old"),
        ("train_prior", "priors/ncp/seed-7/k00.safetensors", "priors/ncp/seed-7"),
        ("sample", "samples/old+sir-20/seed-0.safetensors", "samples/old+sir-20"),
        ("sample", "samples/ncp+sir-20/seed-7.safetensors", "samples/ncp+sir-20/seed-7.safetensors"),
    ],
)
def test_nothing_moved_aside_before_is_lost(checkout, stage, name, file, moved):
    for content in ("first", "second", "third"):
        write(checkout, [file], content)
        stage(name)
    inside = file.removeprefix(moved)
    assert contents(checkout / "artifacts" / ".removed" / "flat") == {
        file: f"third: {file}",
        f"{moved}.1{inside}": f"first: {file}",
        f"{moved}.2{inside}": f"second: {file}",
    }


def test_a_file_that_was_never_whole_is_deleted_once_nobody_writes_it(checkout, stage, capsys):
    write(checkout, ["vae/.seed-0.safetensors.123.tmp"])
    (half,) = (checkout / "artifacts" / "flat" / "vae").iterdir()
    stage("train_vae")
    assert half.exists()  # another process may be at it
    os.utime(half, (0, 0))
    stage("train_vae")
    assert not half.exists()
    assert not (checkout / "artifacts" / ".removed").exists()
    assert capsys.readouterr().err == ""


def test_dvc_does_not_see_what_is_moved_aside():
    assert "/artifacts/.removed/" in (ROOT / ".dvcignore").read_text().splitlines()
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
    for stage in stages:
        for output in stage.get("do", stage).get("outs", []):
            name = output if isinstance(output, str) else next(iter(output))
            assert not Path("artifacts/.removed").is_relative_to(name)


def slip(settings, *keys):
    """Another number under those keys."""
    for key in keys[:-1]:
        settings = settings[key]
    settings[keys[-1]] *= 2


@pytest.mark.parametrize(
    ("stage", "keys", "files"),
    [
        ("train_vae", ("train", "steps"), "vae/*"),
        ("train_prior", ("priors", "ncp", "steps"), "priors/ncp/*/*"),
        ("sample", ("samplers", "sir-20", "proposals"), "samples/*+sir-20/*/*"),
    ],
)
def test_what_an_edited_setting_would_write_anew_is_kept_and_can_be_taken_back(done, capsys, stage, keys, files):
    params = tiny()
    slip(params["experiments"]["flat"], *keys)
    made, kept = done / "artifacts" / "flat", done / "artifacts" / ".removed" / "flat"
    before = {path.relative_to(made): path.read_bytes() for path in made.glob(files)}
    unfinished = next(made.glob(files)).with_suffix(".partial.safetensors")
    if stage != "sample":  # which keeps no unfinished file
        shutil.copy(next(made.glob(files)), unfinished)
        before[unfinished.relative_to(made)] = unfinished.read_bytes()
    write_params(done, params)
    getattr(Pipeline(done, Machine(workers=1)), stage)("flat")
    assert {path.relative_to(kept): path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before
    said = capsys.readouterr().err
    assert f"{keys[-1]} is " in said
    back = re.findall(r"before the stage runs: (.*)", said)
    subprocess.run(" && ".join(back), shell=True, cwd=done, check=True)
    assert before.items() <= {path.relative_to(made): path.read_bytes() for path in made.glob(files)}.items()
    write_params(done, tiny())
    getattr(Pipeline(done, Machine(workers=1)), stage)("flat")
    assert not [path for path in kept.rglob("*") if path.is_file() and path.suffix == ".safetensors"]


def test_what_other_code_made_is_kept_when_it_is_made_anew(done, capsys, monkeypatch):
    monkeypatch.setattr(identities, "vae_source", lambda _: "of other code")
    Pipeline(done, Machine(workers=1)).train_vae("flat")
    assert len(list((done / "artifacts" / ".removed" / "flat" / "vae").iterdir())) == 2
    assert "is of other code: moved to artifacts/.removed/flat/vae" in capsys.readouterr().err


def test_one_process_at_a_time_runs_a_stage(done):
    """A second one by mistake would clear away what the first is writing."""
    with exclusive(done / "artifacts" / ".locks", "flat/train-vae"):
        files = sorted((done / "artifacts").rglob("*"))
        with pytest.raises(UserError, match="flat/train-vae is being written by another process"):
            Pipeline(done).train_vae("flat")
    assert sorted((done / "artifacts").rglob("*")) == files
