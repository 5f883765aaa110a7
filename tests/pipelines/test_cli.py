"""Bad input gets one line, exit code 2 and no traceback; good input gets its answer."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from started import PROGRESS
from tiny import tiny, tiny_beyond, write_params

from pipelines import cli, results


def call(monkeypatch, capsys, *arguments):
    """Run the command in this process: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["priorhole", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def refused(monkeypatch, capsys, *arguments):
    """The one line of a refusal."""
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "Traceback" not in err
    (line,) = (line for line in err.strip().splitlines() if not PROGRESS.match(line))
    return line


def changed(path, value):
    """The tiny parameters with one key, given by its path, set (or dropped, for None)."""
    params = tiny_beyond()
    *parents, last = path.split(".")
    at = params
    for name in parents:
        at = at[int(name)] if isinstance(at, list) else at[name]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return params


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("experiments.flat.model.latent", 3, ("experiments.flat.model.latent", "not permitted")),
        ("experiments.flat.train.steps", "many", ("experiments.flat.train.steps", "valid integer")),
        ("experiments.flat.train.steps", None, ("experiments.flat.train.steps", "required")),
        ("experiments.flat.model.latents", 0, ("experiments.flat.model.latents", "greater than or equal to 1")),
        ("experiments.deep.model.groups_per_scale", [], ("experiments.deep.model.groups_per_scale", "at least 1 item")),
        ("experiments.deep.model.groups_per_scale", [2, 0], ("groups_per_scale.1", "greater than or equal to 1")),
        ("experiments.flat.samplers.sir-20.proposals", 0, ("samplers.sir-20.proposals", "greater than or equal to 1")),
        ("experiments.flat.model.initial_std", -0.1, ("experiments.flat.model.initial_std", "greater than 0")),
        ("experiments.flat.samplers.langevin.step_size", 0.0, ("samplers.langevin.step_size", "greater than 0")),
        ("experiments.flat.dataset", "imagenet", ("experiments.flat", "imagenet", "gaussians25, digits, mnist")),
        ("experiments.flat.model.name", "gan", ("experiments.flat.model", "'mlp-vae', 'nvae', 'rae', 'residual-hvae'")),
        ("experiments.flat.priors.ncp.method", "magic", ("experiments.flat.priors.ncp", "'normal', 'gmm', 'ncp'")),
        ("experiments.flat.priors.ncp.steps", -5, ("experiments.flat.priors.ncp.steps", "greater than or equal to 1")),
        ("experiments.flat.priors.ncp.samplers", ["ancestral"], ("priors.ncp.samplers", "use sir or langevin")),
        ("experiments.flat.priors.ncp.samplers", ["sir-9"], ("priors.ncp.samplers", "'sir-9'")),
        ("experiments.flat.priors.ncp-gmm.base", "ncp-gmm", ("priors.ncp-gmm.base", "listed before")),
        ("experiments.flat.priors.ncp-gmm.base", "ncp", ("priors.ncp-gmm.base", "no exact density")),
        (
            "experiments.deep.priors.amortised",
            {"method": "amortised", "samplers": ["ancestral"]},
            ("priors.amortised", "name that one as its base"),
        ),
        ("experiments.deep.priors.amortised.base", "normal", ("priors.amortised.base", "has no sampler of its own")),
        ("experiments.deep.priors.amortised.groups", [0], ("priors.amortised.groups", "leave it out")),
        ("experiments.deep.priors.amortised.samplers", ["sir-20"], ("priors.amortised.samplers", "draw it by ancestral")),
        ("experiments.deep.priors.evalp.samplers", ["ancestral"], ("priors.evalp.samplers", "use sir or langevin")),
        ("experiments.deep.priors.evalp.kl", -1, ("priors.evalp.kl", "greater than or equal to 0")),
        ("experiments.flat.priors.normal", None, ("experiments.flat", "priors must include 'normal'")),
        ("experiments.flat.seeds", [0, 0], ("experiments.flat", "seeds must differ")),
        ("experiments.flat.trained_in", "shallow", ("experiments.flat.trained_in", "does not exist")),
        ("experiments.flat.evaluate.features", "vgg", ("experiments.flat.evaluate.features", "'own'")),
        ("experiments.flat.evaluate.features", "own", ("experiments.flat", "has no images")),
        ("experiments.deep.evaluate.features", ["own", "own"], ("experiments.deep", "'own' is listed twice")),
        ("experiments.flat.evaluate.likelihood.normaliser", [2**21], ("evaluate.likelihood", "fewer than the largest")),
        ("experiments.flat.model.likelihood", "bernoulli", ("experiments.flat", "use normal")),
        ("experiments.flat.priors.gmm.components", 1000, ("experiments.flat.priors.gmm", "raise codes")),
        ("run", ["nothing"], ("nothing", "not among the experiments")),
        ("run", "flat", ("run", "valid list")),
    ],
)
def test_a_wrong_parameter_is_named_by_its_path(checkout, monkeypatch, capsys, path, value, says):
    write_params(checkout, changed(path, value))
    line = refused(monkeypatch, capsys, "train-vae", "flat")
    assert line.startswith("error: params.yaml: ")
    assert all(part in line for part in says), line


def test_a_model_that_cannot_take_the_data_says_so(checkout, monkeypatch, capsys):
    write_params(
        checkout, changed("experiments.flat.model", tiny()["experiments"]["deep"]["model"] | {"likelihood": "normal"})
    )
    for stage in ("fetch", "train-vae"):
        line = refused(monkeypatch, capsys, stage, "flat")
        assert "experiments.flat.model: residual-hvae needs square images, not data of shape (2,)" in line


def test_an_experiment_params_or_yaml_that_is_not_there(checkout, monkeypatch, capsys):
    assert "there are flat, deep" in refused(monkeypatch, capsys, "fetch", "celebrities")
    (checkout / "params.yaml").write_text("run: [")
    assert "not valid YAML" in refused(monkeypatch, capsys, "list")
    (checkout / "params.yaml").write_text("- a list")
    assert "must be a mapping" in refused(monkeypatch, capsys, "list")
    (checkout / "params.yaml").unlink()
    assert "run priorhole in the folder that holds it" in refused(monkeypatch, capsys, "list")


def test_each_stage_names_the_one_that_has_to_come_before(checkout, monkeypatch, capsys):
    assert "priorhole fetch" in refused(monkeypatch, capsys, "train-vae", "flat")
    cli_run = lambda *arguments: call(monkeypatch, capsys, *arguments)  # noqa: E731
    assert cli_run("fetch", "flat")[0] == 0
    assert "priorhole train-vae flat" in refused(monkeypatch, capsys, "train-prior", "flat")
    assert cli_run("train-vae", "flat")[0] == 0
    assert "priorhole train-prior flat" in refused(monkeypatch, capsys, "sample", "flat")
    path = checkout / "artifacts" / "flat" / "vae" / "seed-1.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    assert "seed-1.safetensors is corrupt" in refused(monkeypatch, capsys, "train-prior", "flat")
    path.write_bytes(content)
    write_params(checkout, changed("experiments.flat.model.width", 24))
    assert "model.width is 16 there and 24 here" in refused(monkeypatch, capsys, "train-prior", "flat")
    assert path.read_bytes() == content
    (checkout / "data" / "prepared" / "gaussians25" / "train.npy").write_bytes(b"partial")
    assert "gaussians25 is corrupt" in refused(monkeypatch, capsys, "train-vae", "flat")
    assert "results.csv is missing; make it with: priorhole report" in refused(monkeypatch, capsys, "compare")


def test_a_full_disk_stops_a_stage_with_one_line_and_keeps_what_was_written(checkout):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000)); "
    script = "import sys; sys.argv = ['priorhole', 'train-vae', 'flat']; from pipelines import cli; "
    fetch = [sys.executable, "-c", script.replace("train-vae", "fetch") + "cli.main()"]
    assert subprocess.run(fetch, cwd=checkout).returncode == 0
    done = subprocess.run(
        [sys.executable, "-c", script + limit + "cli.main()"], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .endswith("no space left on the device; free some and run the same command again")
    )
    assert (checkout / "data" / "prepared" / "gaussians25" / "document.json").exists()


def test_verify_reads_everything_and_names_what_is_not_as_it_was_written(done, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "verify", "flat")
    assert code == 0
    assert re.fullmatch(r"flat: \d+ files and folders, 0\.\d\d GB, are as they were written\n", out)
    folders = sorted((done / "artifacts" / "flat").iterdir())
    kept = [next(folder.rglob("*.safetensors"), None) for folder in folders]  # one of each kind
    kept = [*filter(None, kept), done / "data" / "prepared" / "gaussians25" / "test.npy"]
    stages = set()
    for path in kept:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        said = refused(monkeypatch, capsys, "verify", "flat")
        assert str(path if path.suffix == ".safetensors" else path.parent) in said
        stages.add(re.search(r"run: priorhole ([a-z-]+) flat", said)[1])
        path.write_bytes(content)
    assert stages == {"fetch", "train-vae", "train-prior", "sample", "evaluate"}
    assert call(monkeypatch, capsys, "verify", "flat")[0] == 0
    for folder in ("artifacts", "data"):
        shutil.rmtree(done / folder)
    assert "nothing is kept of flat; begin with: priorhole fetch flat" in refused(monkeypatch, capsys, "verify", "flat")


def test_a_dry_run_prints_the_resolved_configuration_and_writes_nothing(checkout, monkeypatch, capsys):
    before = sorted(checkout.rglob("*"))
    code, out, _ = call(monkeypatch, capsys, "train-vae", "flat", "--dry-run")
    assert code == 0
    resolved = yaml.safe_load(out)
    assert resolved["train"]["steps"] == 40
    assert resolved["train"]["warmup"] == 100  # a default, spelt out
    assert sorted(checkout.rglob("*")) == before


def test_list_marks_what_a_plain_repro_runs(checkout, monkeypatch, capsys):
    write_params(checkout, changed("run", ["deep"]))
    flat, deep = (line for line in call(monkeypatch, capsys, "list")[1].splitlines() if "fetch, train-vae" in line)
    assert re.search(r"  flat\s.*gaussians25\s.*mlp-vae\s.* 2 ", flat)
    assert re.search(r"\* deep\s.*digits\s", deep)


def measured(seed, **changes):
    """A row of an experiment called flat."""
    known = {
        "experiment": "flat", "dataset": "gaussians25", "model": "mlp-vae/normal", "prior": "normal", "sampler": "",
        "metric": "loglik", "samples": 4, "normaliser": 0, "proposals": 0, "step": 0, "value": -1.1, "stderr": 0.01, "n": 9,
        "seed": seed, "vae_seed": seed, "seconds": 0.0, "device": "cpu", "precision": "fp32", "features": "", "target": "",
        "revision": "r", "fingerprint": "",
    }  # fmt: skip
    return results.Row(**known | changes)


def test_what_is_listed_and_shown_is_what_there_is(checkout, monkeypatch, capsys):
    def answer(*arguments):
        return json.loads(call(monkeypatch, capsys, *arguments, "--json")[1])

    assert answer("list")[0]["missing"] == ["fetch", "train-vae", "train-prior", "sample", "evaluate"]
    assert "run: priorhole fetch flat" in call(monkeypatch, capsys, "show", "flat")[1]
    assert answer("show", "flat")["results"] == []
    results.write(checkout / "reports" / "results.csv", results.frame([measured(seed) for seed in (0, 1)]))
    assert "2 seeds, each with its own VAE" in call(monkeypatch, capsys, "show", "flat")[1]
    (number,) = answer("show", "flat")["results"]
    assert (number["metric"], number["seeds"], number["value"]) == ("loglik", 2, pytest.approx(-1.1))
    assert call(monkeypatch, capsys, "--version")[1].startswith("priorhole 0.")


def test_a_stage_that_left_half_of_what_it_makes_is_missing(done, monkeypatch, capsys):
    """One of its groups, or the last images of a draw, as when it was stopped."""

    def missing():
        return json.loads(call(monkeypatch, capsys, "show", "deep", "--json")[1])["missing"]

    assert missing() == []
    shutil.copytree(done / "artifacts", done / "whole")
    (done / "artifacts" / "deep" / "priors" / "ncp" / "seed-1" / "k02.safetensors").unlink()
    assert missing() == ["train-prior"]
    shutil.copytree(done / "whole", done / "artifacts", dirs_exist_ok=True)
    (drawn,) = (done / "artifacts" / "deep" / "samples" / "ncp+sir-20" / "seed-1").iterdir()
    drawn.rename(drawn.with_name("rows-00000000-00000020.safetensors"))
    assert missing() == ["sample"]


def test_data_are_not_fetched_for_what_is_not_trained(checkout, monkeypatch, capsys):
    line = refused(monkeypatch, capsys, "evaluate", "flat")
    assert "is missing; make it with: priorhole train-vae flat" in line
    assert not (checkout / "data").exists()


def test_compare_exits_1_when_a_verdict_is_not_the_expected_one(checkout, monkeypatch, capsys):
    from pipelines import fingerprints
    from pipelines.stages import Pipeline

    claim = {
        "id": "one", "paper": "NCP-VAE", "statement": "a statement", "source": "a table", "standing": "seed",
        "experiment": "flat", "subject": {"prior": "ncp", "metric": "loglik-sampler", "proposals": 20}, "kind": "absolute",
        "direction": "higher", "value": -1.0, "tolerance": {"value": 0, "reason": "r"}, "criterion": {"after_result": "r"},
    }  # fmt: skip
    (checkout / "reports" / "targets.yaml").write_text(yaml.safe_dump({"claims": [claim]}))
    today = fingerprints.expected(Pipeline(checkout).config)("flat", "ncp", "", "loglik-sampler")
    assert today is not None

    def compared(value, fingerprint=today):
        named = {"prior": "ncp", "metric": "loglik-sampler", "proposals": 20}
        row = measured(0, **named, value=value, fingerprint=fingerprint)
        results.write(checkout / "reports" / "results.csv", results.frame([row]))
        code, out, _ = call(monkeypatch, capsys, "compare")
        return code, " ".join(out.split())

    code, out = compared(-0.2)
    assert code == 0
    assert "reproduced" in out
    code, out = compared(-2.0)
    assert code == 1
    assert "contradicted" in out
    code, out = compared(-2.0, "another+" + today.partition("+")[2])
    assert code == 0
    assert "untested" in out
    code, out = compared(-2.0, today.partition("+")[0] + "+another")
    assert code == 1
    assert "earlier code" in out
