"""The ``priorhole`` command. Heavy imports wait inside the commands, so that --help answers at once."""

import os
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.surroundings import name_user, refusal, require_folder, usable_streams
from runtime import interruption
from runtime.errors import UserError

app = typer.Typer(
    help="How much better does a VAE get when its prior is learned? Run one stage, or let 'dvc repro' run them all.",
    epilog="Example: priorhole list; then priorhole fetch gaussians25, and so on through the stages; priorhole report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _known(incomplete: str) -> list[str]:
    """For the shell's completion: the experiments that begin so."""
    import yaml

    try:
        names = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))["experiments"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return []
    return [name for name in names if name.startswith(incomplete)]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        from runtime.identity import revision

        typer.echo(f"priorhole {version('priorhole')}, revision {revision()}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version and the revision, and stop."),
    ] = False,
) -> None:
    """What all commands share."""


Name = Annotated[str, typer.Argument(help="Experiment, as named in params.yaml.", autocompletion=_known)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")]
THREADS = "CPU threads of each task (can change a last bit)."
WORKERS = "Tasks side by side; 0: as many as the cores allow."
SHARDS = "Parts into which a prior's groups are dealt; above 1 they are Ray tasks (RAY_ADDRESS names a cluster)."

PROCESSES = "Processes that train one VAE together, a part of every batch each; above 1 Ray starts them."

Threads = Annotated[int, typer.Option(min=1, envvar="PRIORHOLE_THREADS", help=THREADS)]
Workers = Annotated[int, typer.Option(min=0, envvar="PRIORHOLE_WORKERS", help=WORKERS)]
Shards = Annotated[int, typer.Option(min=1, envvar="PRIORHOLE_SHARDS", help=SHARDS)]
Processes = Annotated[int, typer.Option(min=1, envvar="PRIORHOLE_PROCESSES", help=PROCESSES)]
Images = Annotated[
    int | None,
    typer.Option(min=2, help="A quick look: likelihoods on so many test images, in a table of its own; all if left out."),
]
Gpus = Annotated[
    float, typer.Option(min=0, help="GPUs of each task; 0.5 lets two share one. 0: one each, if there are any here.")
]


def _pipeline(threads: int = 1, workers: int = 0, shards: int = 1, gpus: float = 0.0, processes: int = 1):
    from pipelines.fanout import Machine
    from pipelines.stages import Pipeline
    from runtime.processes import cores

    workers = workers or max(1, cores() // threads)
    return Pipeline(Path.cwd(), Machine(threads, workers, shards, processes, gpus, ray=bool(os.environ.get("RAY_ADDRESS"))))


def _show(name: str) -> None:
    import yaml

    from pipelines.config import plain

    typer.echo(yaml.safe_dump(plain(_pipeline().config.experiment(name)), sort_keys=False), nl=False)


def _print(*parts: Any) -> None:
    """On the terminal as wide as it is, elsewhere wide enough for tables."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    for part in parts:
        console.print(part, highlight=False, markup=False)


@app.command("list", epilog="Example: priorhole list --json | jq -r '.[] | select(.missing == []) | .name'")
def list_experiments(json: Json = False) -> None:
    """List the experiments: data set, model, priors, what is pretrained, planned cost, which stages have not run here."""
    from pipelines.reporting import overview

    pipeline = _pipeline()
    found = overview.overviews(pipeline.workspace, pipeline.config)
    if json:
        _echo_json([asdict(one) for one in found])
    else:
        _print(overview.listed(found))


@app.command(epilog="Example: priorhole show gaussians25")
def show(experiment: Name, json: Json = False) -> None:
    """Show an experiment's results so far: means over seeds and 95 % intervals, likelihoods in nats, times in seconds."""
    from pipelines.reporting import overview

    pipeline = _pipeline()
    found = overview.overview(pipeline.workspace, pipeline.config, experiment)
    frame = overview.measured(pipeline.workspace, experiment)
    if json:
        _echo_json(overview.document(found, frame))
        return
    _print(overview.listed([found]))
    _print(
        *(
            overview.shown(frame)
            if len(frame)
            else [f"nothing is measured yet; run: priorhole {(found.missing or ['evaluate'])[0]} {experiment}"]
        )
    )


@app.command(epilog="Example: priorhole plan celeba64-nvae --shards 15 --gpus 1")
def plan(
    experiment: Name,
    threads: Threads = 1,
    workers: Workers = 0,
    shards: Shards = 1,
    gpus: Gpus = 0.0,
    json: Json = False,
) -> None:
    """Say what an experiment would take on this machine, from a few measured steps: nothing of it is run."""
    found = _pipeline(threads, workers, shards, gpus).plan(experiment)
    typer.echo(found.json() if json else found.text())


def _echo_json(document: Any) -> None:
    import json

    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


@app.command(epilog="Example: priorhole fetch gaussians25")
def fetch(experiment: Name, workers: Workers = 0, dry_run: DryRun = False) -> None:
    """Fetch, verify and prepare an experiment's data set. Goes on from where it was stopped."""
    _show(experiment) if dry_run else _pipeline(workers=workers).fetch(experiment)


@app.command(epilog="Example: priorhole train-vae cifar10-nvae --processes 8 --gpus 1")
def train_vae(
    experiment: Name,
    threads: Threads = 1,
    workers: Workers = 0,
    processes: Processes = 1,
    gpus: Gpus = 0.0,
    dry_run: DryRun = False,
) -> None:
    """Stage 1: train the VAEs, one a seed. Goes on from where it was stopped, by another number of processes too."""
    _show(experiment) if dry_run else _pipeline(threads, workers, gpus=gpus, processes=processes).train_vae(experiment)


@app.command(epilog="Example: priorhole import-nvae celeba64-nvae-mixture --checkpoint eval-celeba64/checkpoint.pt")
def import_nvae(
    experiment: Name,
    checkpoint: Annotated[Path, typer.Option(help="The checkpoint.pt that NVAE's released training script wrote.")],
    seed: Annotated[
        int | None, typer.Option(min=0, help="Which of the experiment's VAEs it is, if there are several.")
    ] = None,
) -> None:
    """In place of stage 1: take an NVAE that was trained by its released code. The data set has to be fetched."""
    typer.echo(_pipeline().import_nvae(experiment, checkpoint, seed))


@app.command(epilog="Example: priorhole train-prior digits-nvae --shards 4")
def train_prior(
    experiment: Name,
    threads: Threads = 1,
    workers: Workers = 0,
    shards: Shards = 1,
    gpus: Gpus = 0.0,
    dry_run: DryRun = False,
) -> None:
    """Stage 2: learn the priors with the VAEs frozen. Goes on from where it was stopped."""
    _show(experiment) if dry_run else _pipeline(threads, workers, shards, gpus).train_prior(experiment)


@app.command(epilog="Example: priorhole sample digits-nvae")
def sample(experiment: Name, threads: Threads = 1, workers: Workers = 0, gpus: Gpus = 0.0, dry_run: DryRun = False) -> None:
    """Draw from every prior by each of its samplers. Goes on from where it was stopped."""
    _show(experiment) if dry_run else _pipeline(threads, workers, gpus=gpus).sample(experiment)


@app.command(epilog="Example: priorhole evaluate digits-nvae --images 100")
def evaluate(
    experiment: Name,
    threads: Threads = 1,
    workers: Workers = 0,
    images: Images = None,
    gpus: Gpus = 0.0,
    dry_run: DryRun = False,
) -> None:
    """Measure likelihoods, sample quality and sampler diagnostics. Goes on from where it was stopped."""
    if dry_run:
        _show(experiment)
        return
    from pipelines import results

    path = _pipeline(threads, workers, gpus=gpus).evaluate(experiment, images)
    typer.echo(path)
    if images is not None:
        table = results.over_seeds(results.read(path, f"priorhole evaluate {experiment}"))
        typer.echo(table[["prior", "sampler", "metric", "value", "interval", "n"]].to_string(index=False))


@app.command(epilog="Example: priorhole publish mnist-nvae-lite")
def publish(experiment: Name) -> None:
    """Write small copies of the trained files to pretrained/; sampling and measuring work from them."""
    paths = _pipeline().publish(experiment)
    typer.echo(f"{len(paths)} files, {sum(path.stat().st_size for path in paths) / 1e6:.1f} MB, in pretrained/{experiment}")


@app.command(epilog="Example: priorhole verify gaussians25")
def verify(experiment: Name) -> None:
    """Read all that is kept of an experiment and hold it against its digests: data, checkpoints, samples, features."""
    files, size = _pipeline().verify(experiment)
    typer.echo(f"{experiment}: {files} files and folders, {size / 1e9:.2f} GB, are as they were written")


@app.command(epilog="Example: priorhole report; then open reports/index.html")
def report() -> None:
    """Gather the experiments' tables into reports/: pages to read (index.html), tables and figures."""
    for path in _pipeline().report():
        typer.echo(path)


@app.command(epilog="Example: priorhole compare --json | jq '.[] | select(.verdict == \"contradicted\")'")
def compare(json: Json = False) -> None:
    """Hold the results against the papers' claims. Exits 1 if one comes out otherwise than targets.yaml says."""
    from pipelines import claims

    verdicts = _pipeline().verdicts()
    if json:
        _echo_json([claims.plain(verdict) for verdict in verdicts])
    else:
        _print(claims.console(verdicts))
    if any(verdict.failed for verdict in verdicts):
        raise typer.Exit(1)


@app.command(epilog="Example: priorhole ui --port 5001; then open the address that it prints.")
def ui(port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 5000) -> None:
    """Browse the runs in MLflow, those of stages that are running too."""
    from pipelines.tracking import store

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"port {port} cannot be used ({error.strerror}); choose another one with --port") from error
    page = f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning"  # left alone, it opens at its assistants
    typer.echo(f"in some seconds: {page}")
    sys.stdout.flush()  # what is buffered would be lost
    options = ["--workers", "1", "--port", str(port), "--backend-store-uri", store(Path.cwd())]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", *options])  # whoever stops this stops the server itself


def main() -> None:
    """Run the command; a UserError, and what the surroundings refuse, becomes one line and exit code 2.

    A signal becomes one line and 128 + its number (:mod:`runtime.interruption`).
    """
    interruption.end_at_signals()
    with usable_streams():
        try:
            require_folder()
            name_user()
            app()
        except UserError as error:
            message = str(error)
        except OSError as error:
            message = refusal(error)
        typer.echo(f"error: {message}", err=True)
        sys.exit(2)
